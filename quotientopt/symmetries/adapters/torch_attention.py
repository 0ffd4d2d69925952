"""torch.nn.MultiheadAttention and the Transformer layers built on it."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.branches import (
    Units,
    add_units,
)
from quotientopt.symmetries.adapters.layers import (
    HeadView,
    add_attention,
    add_branch,
    add_norm,
    add_writer,
    bias_of,
    consecutive,
    input_heads,
    narrowed,
    own_parameter,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    qualified,
)
from quotientopt.symmetries.residual import Reader

MULTIHEAD_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
UNKNOWN_REST = "readers and writers of the stream outside the recognised layers"


@understands(MULTIHEAD_ATTENTION)
def multihead_attention(module: Any, name: str) -> Contribution:
    """GL(r) on the query-key and on the value-output pair of every head."""
    width, heads = module.embed_dim, module.num_heads
    query, key, value = (_projection(module, name, index) for index in range(3))
    key += _appended_row(module, name, "bias_k")
    value += _appended_row(module, name, "bias_v")
    output = input_heads(module.out_proj, qualified(name, "out_proj"), width, consecutive(heads))
    # An appended row alone is no bias of all keys; a zero is a key that does not move.
    moves = module.in_proj_bias is not None and not module.add_zero_attn
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=query,
        key=key,
        value=value,
        output=output,
        qk_group=GL(module.head_dim),
        output_bias=bias_of(module.out_proj, qualified(name, "out_proj")),
        keys_move=moves,
        values_move=moves,
    )
    return contribution


@understands(
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torch.nn.modules.transformer.TransformerDecoderLayer",
)
def transformer_layer(module: Any, name: str) -> Contribution:
    """Residual axes of an encoder or decoder layer; it cannot know the rest of the stream."""
    contribution = Contribution(residual_breakers=[UNKNOWN_REST])
    attentions = {"self_attn": "norm1"}
    if hasattr(module, "multihead_attn"):
        attentions["multihead_attn"] = "norm2"
    for part, norm in attentions.items():
        attention = require(getattr(module, part), MULTIHEAD_ATTENTION)
        path = qualified(name, part)
        add_writer(contribution, attention.out_proj, qualified(path, "out_proj"))
        readers = None
        # The in_proj_weight of a cross-attention reads this stream and the encoder's alike.
        if part == "self_attn":
            present_parameter(attention, "in_proj_weight")
            weight = qualified(path, "in_proj_weight")
            contribution.residual_axes[weight] = 1
            bias = own_parameter(attention, "in_proj_bias")
            reader = Reader(weight, 1, None if bias is None else qualified(path, "in_proj_bias"))
            readers = [reader] if module.norm_first else None
        add_norm(contribution, getattr(module, norm), qualified(name, norm), readers)
    norm = f"norm{len(attentions) + 1}"
    add_branch(
        contribution,
        module,
        name,
        readers=("linear1",),
        writers=("linear2",),
        norm=norm if module.norm_first else None,
    )
    if not module.norm_first:
        add_norm(contribution, getattr(module, norm), qualified(name, norm))
    units = Units("linear1", "linear2", activation="activation")
    add_units(contribution, module, name, units)
    return contribution


def _projection(module: Any, name: str, index: int) -> list[HeadView]:
    """Weight and bias of the query (0), key (1) or value (2) projection."""
    width, heads = module.embed_dim, module.num_heads
    start = index * width
    views = []
    if module._qkv_same_embed_dim:
        weight_name, weight_start = "in_proj_weight", start
    else:
        weight_name, weight_start = f"{'qkv'[index]}_proj_weight", 0
    for parameter_name, offset in ((weight_name, weight_start), ("in_proj_bias", start)):
        parameter = own_parameter(module, parameter_name)
        if parameter is not None:
            pick = narrowed(heads, offset, width)
            view = pick(parameter.detach())
            views.append(HeadView(parameter, qualified(name, parameter_name), view))
        elif parameter_name == weight_name:
            raise NotUnderstoodError(f"{type(module).__name__} has no {weight_name}")
    return views


def _appended_row(module: Any, name: str, parameter_name: str) -> list[HeadView]:
    """``bias_k`` or ``bias_v``: an extra key or value, not an added bias."""
    row = getattr(module, parameter_name)
    if row is None:
        return []
    if not isinstance(row, nn.Parameter):
        raise NotUnderstoodError(f"{parameter_name} of {type(module).__name__} is no parameter")
    view = row.detach()[0, 0].unflatten(0, (module.num_heads, -1))
    return [HeadView(row, qualified(name, parameter_name), view)]
