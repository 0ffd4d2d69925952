"""Layers that hold or read invariants in place of gauges: ``qo.nn``."""

from quotientopt.nn.invariant_attention import InvariantAttention
from quotientopt.nn.relational_embedding import (
    PairReadout,
    PooledReadout,
    RelationalEmbedding,
    TokenReadout,
    embed_tokens,
    tokens_of_gram,
)
from quotientopt.nn.relational_form import (
    JointGram,
    RelationalForm,
    StreamRelations,
    relational_form,
)
from quotientopt.nn.relational_layers import (
    RelationalAttention,
    RelationalFeedForward,
    RelationalLayerNorm,
    RelationalRMSNorm,
)
from quotientopt.nn.relational_transformer import RelationalTransformer, Relations
from quotientopt.nn.tokens import CausalDressing, DressedTokens, dress_tokens

__all__ = [
    "CausalDressing",
    "DressedTokens",
    "InvariantAttention",
    "JointGram",
    "PairReadout",
    "PooledReadout",
    "RelationalAttention",
    "RelationalEmbedding",
    "RelationalFeedForward",
    "RelationalForm",
    "RelationalLayerNorm",
    "RelationalRMSNorm",
    "RelationalTransformer",
    "Relations",
    "StreamRelations",
    "TokenReadout",
    "dress_tokens",
    "embed_tokens",
    "relational_form",
    "tokens_of_gram",
]
