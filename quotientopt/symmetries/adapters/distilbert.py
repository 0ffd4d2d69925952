"""DistilBERT of the transformers package."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

MODULE = "transformers.models.distilbert.modeling_distilbert"
DISTILBERT = f"{MODULE}.DistilBert"


@understands(f"{DISTILBERT}SelfAttention")
def distilbert_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.attention_head_size,
        heads=module.n_heads,
        layers=("q_lin", "k_lin", "v_lin", "out_lin"),
    )


@understands(f"{MODULE}.TransformerBlock")
def distilbert_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer, whose norms write to the stream (post-norm)."""
    contribution = Contribution()
    require(module.attention, f"{DISTILBERT}SelfAttention")
    require(module.ffn, f"{MODULE}.FFN")
    readers = ("attention.q_lin", "attention.k_lin", "attention.v_lin")
    for norm, reading, writer in (
        ("sa_layer_norm", readers, "attention.out_lin"),
        ("output_layer_norm", ("ffn.lin1",), "ffn.lin2"),
    ):
        add_branch(contribution, module, name, readers=reading, writers=(writer,))
        add_norm(contribution, getattr(module, norm), qualified(name, norm))
    return contribution


@understands(f"{DISTILBERT}Model")
def distilbert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, whose norm writes to the stream."""
    contribution = Contribution(outputs={name: None})
    embeddings = require(module.embeddings, f"{MODULE}.Embeddings")
    path = qualified(name, "embeddings")
    for part in ("word_embeddings", "position_embeddings"):
        add_embedding(contribution, getattr(embeddings, part), qualified(path, part))
    add_norm(contribution, embeddings.LayerNorm, qualified(path, "LayerNorm"))
    return contribution


@understands(f"{DISTILBERT}ForMaskedLM")
def distilbert_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's first layer; what follows it is another space."""
    contribution = Contribution()
    require(module.distilbert, f"{DISTILBERT}Model")
    add_consumer(contribution, module, name, "distilbert", "vocab_transform")
    return contribution
