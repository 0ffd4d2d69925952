"""T5 of the transformers package: relative position biases, RMS norms, no scaling of scores."""

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
from quotientopt.symmetries.norm import register_norm
from quotientopt.symmetries.registry import Contribution, qualified

T5 = "transformers.models.t5.modeling_t5.T5"

register_norm(f"{T5}LayerNorm")


@understands(f"{T5}Attention")
def t5_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head: the position bias is added to the scores."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.key_value_proj_dim,
        heads=module.n_heads,
        layers=("q", "k", "v", "o"),
    )


@understands(f"{T5}Block")
def t5_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; keys and values of a cross-attention read the encoder."""
    contribution = Contribution()
    first, last = module.layer[0], len(module.layer) - 1
    require(first, f"{T5}LayerSelfAttention")
    branches: list[tuple[str, str, tuple[str, ...]]]
    branches = [("layer.0", "SelfAttention", ("q", "k", "v"))]
    if module.is_decoder:
        require(module.layer[1], f"{T5}LayerCrossAttention")
        branches.append(("layer.1", "EncDecAttention", ("q",)))
    for path, part, readers in branches:
        require(module.get_submodule(f"{path}.{part}"), f"{T5}Attention")
        add_branch(
            contribution,
            module,
            name,
            readers=tuple(f"{path}.{part}.{layer}" for layer in readers),
            writers=(f"{path}.{part}.o",),
            norm=f"{path}.layer_norm",
        )
    feed_forward = require(module.layer[last], f"{T5}LayerFF").DenseReluDense
    require(feed_forward, f"{T5}DenseActDense", f"{T5}DenseGatedActDense")
    path = f"layer.{last}.DenseReluDense"
    inputs = ("wi",) if hasattr(feed_forward, "wi") else ("wi_0", "wi_1")
    add_branch(
        contribution,
        module,
        name,
        readers=tuple(f"{path}.{layer}" for layer in inputs),
        writers=(f"{path}.wo",),
        norm=f"layer.{last}.layer_norm",
    )
    return contribution


@understands(f"{T5}Stack")
def t5_stack(module: Any, name: str) -> Contribution:
    """Residual axis of the embedding, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "final_layer_norm")})
    add_embedding(contribution, module.embed_tokens, qualified(name, "embed_tokens"))
    add_norm(contribution, module.final_layer_norm, qualified(name, "final_layer_norm"), [])
    return contribution


@understands(f"{T5}Model", f"{T5}ForConditionalGeneration", f"{T5}EncoderModel")
def t5_model(module: Any, name: str) -> Contribution:
    """Residual axes of the shared embedding, of what reads the encoder, and of the head.

    Encoder and decoder have a stream each; with the embedding shared, both turn together.
    """
    contribution = Contribution()
    add_embedding(contribution, module.shared, qualified(name, "shared"))
    require(module.encoder, f"{T5}Stack")
    if hasattr(module, "decoder"):
        require(module.decoder, f"{T5}Stack")
        paths = [
            f"decoder.block.{index}.layer.1.EncDecAttention.{part}"
            for index in range(len(module.decoder.block))
            for part in ("k", "v")
        ]
        add_consumer(contribution, module, name, "encoder", *paths)
    if hasattr(module, "lm_head"):
        add_consumer(contribution, module, name, "decoder", "lm_head")
    return contribution
