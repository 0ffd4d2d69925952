"""docs/relational.md names everything public of the relational layers."""

from pathlib import Path

import quotientopt.nn
from quotientopt.nn import relational_embedding, relational_layers, relational_transformer

PAGE = Path(__file__).parents[2] / "docs" / "relational.md"
PUBLIC = {
    relational_layers: (
        "RelationalAttention",
        "RelationalFeedForward",
        "RelationalLayerNorm",
        "RelationalRMSNorm",
    ),
    relational_embedding: (
        "RelationalEmbedding",
        "embed_tokens",
        "tokens_of_gram",
        "PairReadout",
        "PooledReadout",
        "TokenReadout",
    ),
    relational_transformer: ("RelationalTransformer", "Relations"),
}


def test_every_public_name_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for module, names in PUBLIC.items():
        for name in names:
            assert name in text
            assert getattr(quotientopt.nn, name) is getattr(module, name)
