"""ALBERT of the transformers package: one layer, used many times, counts once."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    add_branch,
    add_consumer,
    add_norm,
    add_reader,
    add_writer,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

ALBERT = "transformers.models.albert.modeling_albert.Albert"


@understands(f"{ALBERT}Attention")
def albert_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.attention_head_size,
        heads=module.num_attention_heads,
        layers=("query", "key", "value", "dense"),
    )


@understands(f"{ALBERT}Layer")
def albert_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer, whose norms write to the stream (post-norm)."""
    contribution = Contribution()
    require(module.attention, f"{ALBERT}Attention")
    readers = ("attention.query", "attention.key", "attention.value")
    for norm, reading, writer in (
        ("attention.LayerNorm", readers, "attention.dense"),
        ("full_layer_layer_norm", ("ffn",), "ffn_output"),
    ):
        add_branch(contribution, module, name, readers=reading, writers=(writer,))
        add_norm(contribution, module.get_submodule(norm), qualified(name, norm))
    return contribution


@understands(f"{ALBERT}Model")
def albert_model(module: Any, name: str) -> Contribution:
    """Residual axes of the map from the embeddings, which are another space, and of the pooler."""
    contribution = Contribution(outputs={name: None})
    require(module.encoder, f"{ALBERT}Transformer")
    path = "encoder.embedding_hidden_mapping_in"
    add_writer(contribution, module.get_submodule(path), qualified(name, path))
    if module.pooler is not None:
        add_reader(contribution, module.pooler, qualified(name, "pooler"))
    return contribution


@understands(f"{ALBERT}ForMaskedLM")
def albert_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's first layer; what follows it is another space."""
    contribution = Contribution()
    require(module.albert, f"{ALBERT}Model")
    require(module.predictions, f"{ALBERT}MLMHead")
    add_consumer(contribution, module, name, "albert", "predictions.dense")
    return contribution
