"""GPT-NeoX of the transformers package: queries, keys and values fused head by head."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention, rotary_group
from quotientopt.symmetries.adapters.layers import (
    add_attention,
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    consecutive,
    input_heads,
    interleaved,
    output_heads,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

GPT_NEOX = "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoX"


@understands(f"{GPT_NEOX}Attention")
def gpt_neox_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK and GL(r) on VO."""
    require_known_attention(module)
    rank = module.head_size
    width = present_parameter(module.dense, "weight").shape[1]
    heads = width // rank
    group = rotary_group(module.config, rank, partial=True)
    if getattr(group, "rotary_dim", 0) != module.rotary_ndims:
        raise NotUnderstoodError(f"{module.rotary_ndims} rotated rows, but {group} by config")
    query, key, value = (
        output_heads(
            module.query_key_value,
            qualified(name, "query_key_value"),
            3 * width,
            interleaved(heads, part, 3),
        )
        for part in range(3)
    )
    output = input_heads(module.dense, qualified(name, "dense"), width, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution, name, query=query, key=key, value=value, output=output, qk_group=group
    )
    return contribution


@understands(f"{GPT_NEOX}Layer")
def gpt_neox_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer, its branches parallel or one after the other."""
    contribution = Contribution()
    require(module.attention, f"{GPT_NEOX}Attention")
    require(module.mlp, f"{GPT_NEOX}MLP")
    for norm, reader, writer in (
        ("input_layernorm", "attention.query_key_value", "attention.dense"),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ):
        add_branch(contribution, module, name, readers=(reader,), writers=(writer,), norm=norm)
    return contribution


@understands(f"{GPT_NEOX}Model")
def gpt_neox_model(module: Any, name: str) -> Contribution:
    """Residual axis of the embedding, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "final_layer_norm")})
    add_embedding(contribution, module.embed_in, qualified(name, "embed_in"))
    add_norm(contribution, module.final_layer_norm, qualified(name, "final_layer_norm"), [])
    return contribution


@understands(f"{GPT_NEOX}ForCausalLM")
def gpt_neox_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, which reads all the model returns."""
    contribution = Contribution()
    require(module.gpt_neox, f"{GPT_NEOX}Model")
    add_consumer(contribution, module, name, "gpt_neox", "lm_head")
    return contribution
