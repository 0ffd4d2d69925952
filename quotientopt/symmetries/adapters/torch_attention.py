"""torch.nn.MultiheadAttention and the Transformer layers built on it."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.layers import (
    LINEAR,
    add_layer_norm,
    add_pair,
    add_residual,
    own_parameter,
    require,
    row_block,
    weight_and_bias,
)
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    qualified,
    register,
)

MULTIHEAD_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
UNKNOWN_REST = "readers and writers of the stream outside the recognised layers"


@register(MULTIHEAD_ATTENTION)
def multihead_attention(module: Any, name: str) -> Contribution:
    """GL(r) on the query-key and on the value-output pair of every head."""
    width, heads = module.embed_dim, module.num_heads
    output, _ = weight_and_bias(module.out_proj, LINEAR, (width, width))
    query, key, value = (_projection(module, name, index) for index in range(3))
    key += _appended_row(module, name, "bias_k")
    value += _appended_row(module, name, "bias_v")
    output_block = row_block(output, qualified(name, "out_proj.weight"), heads, 0, width, axis=1)
    contribution = Contribution()
    group = GL(module.head_dim)
    add_pair(contribution, qualified(name, "qk"), group, query, key)
    add_pair(contribution, qualified(name, "vo"), group, [output_block], value)
    return contribution


@register("torch.nn.modules.transformer.TransformerEncoderLayer")
@register("torch.nn.modules.transformer.TransformerDecoderLayer")
def transformer_layer(module: Any, name: str) -> Contribution:
    """Residual axes of an encoder or decoder layer; it cannot know the rest of the stream."""
    contribution = Contribution(residual_breakers=[UNKNOWN_REST])
    require(module.self_attn, MULTIHEAD_ATTENTION)
    own_parameter(module.self_attn, "in_proj_weight")
    contribution.residual_axes[qualified(name, "self_attn.in_proj_weight")] = 1
    writers = {"self_attn.out_proj": module.self_attn.out_proj, "linear2": module.linear2}
    norms = {"norm1": module.norm1, "norm2": module.norm2}
    if hasattr(module, "multihead_attn"):
        # Its in_proj_weight reads this stream and the encoder's with the same axis.
        require(module.multihead_attn, MULTIHEAD_ATTENTION)
        writers["multihead_attn.out_proj"] = module.multihead_attn.out_proj
        norms["norm3"] = module.norm3
    add_residual(contribution, require(module.linear1, LINEAR), qualified(name, "linear1"), 1)
    for part, layer in writers.items():
        add_residual(contribution, require(layer, LINEAR), qualified(name, part), 0, writes=True)
    for part, norm in norms.items():
        add_layer_norm(contribution, norm, qualified(name, part))
    return contribution


def _projection(module: Any, name: str, index: int) -> list[Block]:
    """Weight and bias blocks of the query (0), key (1) or value (2) projection."""
    width, heads = module.embed_dim, module.num_heads
    start = index * width
    blocks = []
    if module._qkv_same_embed_dim:
        weight_name, weight_start = "in_proj_weight", start
    else:
        weight_name, weight_start = f"{'qkv'[index]}_proj_weight", 0
    for parameter_name, offset in ((weight_name, weight_start), ("in_proj_bias", start)):
        parameter = own_parameter(module, parameter_name)
        if parameter is not None:
            blocks.append(
                row_block(parameter, qualified(name, parameter_name), heads, offset, width)
            )
        elif parameter_name == weight_name:
            raise NotUnderstoodError(f"{type(module).__name__} has no {weight_name}")
    return blocks


def _appended_row(module: Any, name: str, parameter_name: str) -> list[Block]:
    """Block of ``bias_k`` or ``bias_v``: an extra key or value, not an added bias."""
    row = getattr(module, parameter_name)
    if row is None:
        return []
    if not isinstance(row, nn.Parameter):
        raise NotUnderstoodError(f"{parameter_name} of {type(module).__name__} is no parameter")
    view = row.detach()[0, 0].unflatten(0, (module.num_heads, -1))
    return [Block.of(view, row, qualified(name, parameter_name))]
