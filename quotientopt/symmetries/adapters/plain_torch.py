"""torch.nn.MultiheadAttention and the layers built on it; this package's models and attentions."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.adapters.attention import with_output
from quotientopt.symmetries.adapters.branches import Units, add_units
from quotientopt.symmetries.adapters.layers import (
    EMBEDDING,
    LINEAR,
    HeadView,
    add_branch,
    add_embedding,
    add_norm,
    add_reader,
    add_writer,
    consecutive,
    narrowed,
    output_heads,
    own_parameter,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    bare_modules,
    follows,
    qualified,
    register,
)
from quotientopt.symmetries.residual import Reader, register_norm

# ---- torch.nn ------------------------------------------------------------------------------------


MULTIHEAD_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
UNKNOWN_REST = "readers and writers of the stream outside the recognised layers"


@understands(MULTIHEAD_ATTENTION)
def multihead_attention(module: Any, name: str) -> Contribution:
    """GL(r) on the query-key and on the value-output pair of every head."""
    query, key, value = (_projection(module, name, index) for index in range(3))
    key += _appended_row(module, name, "bias_k")
    value += _appended_row(module, name, "bias_v")
    # An appended row alone is no bias of all keys; a zero is a key that does not move.
    moves = module.in_proj_bias is not None and not module.add_zero_attn
    size, views = (module.num_heads, module.head_dim), (query, key, value)
    return with_output(
        module, name, "out_proj", size, views, GL(size[1]), keys_move=moves, values_move=moves
    )


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


# ---- models and attentions of this package -------------------------------------------------------


MODELS = "quotientopt.models"
ATTENTION = f"{MODELS}.attention.Attention"
INVARIANT_ATTENTION = "quotientopt.nn.invariant_attention.InvariantAttention"
RELATIONAL_ATTENTION = "quotientopt.nn.relational_layers.RelationalAttention"
LAYERS = (
    LINEAR,
    EMBEDDING,
    "torch.nn.modules.container.ModuleList",
    ATTENTION,
    INVARIANT_ATTENTION,
)
BLOCK_LAYERS = (*LAYERS, *(f"{MODELS}.gpt.{part}" for part in ("GPTBlock", "GELUMLP")))
GPT_LAYERS = (*BLOCK_LAYERS, f"{MODELS}.gpt.GPT")
VIT_LAYERS = (*BLOCK_LAYERS, f"{MODELS}.gpt.ViT")
LLAMA_LAYERS = (
    *LAYERS,
    *(f"{MODELS}.llama.{part}" for part in ("Llama", "LlamaBlock", "SwiGLU", "RMSNorm")),
)


register_norm(f"{MODELS}.llama.RMSNorm")


@register(ATTENTION)
def attention(module: Any, name: str) -> Contribution:
    """One symmetry per pair; the query heads of a key-value head are blocks of one factor."""
    heads, shared, rank = module.heads, module.key_value_heads, module.head_width
    for part in ("query", "key", "value"):
        if getattr(getattr(module, part), "bias", None) is not None:
            raise NotUnderstoodError(f"{part} of {type(module).__name__} has a bias")
    group: StructureGroup = RotaryCommutant(rank, layout="half") if module.rotary else GL(rank)
    return _projected(module, name, heads, shared, rank, group)


@register(INVARIANT_ATTENTION)
def invariant_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every key-value head; less on rotary queries and keys."""
    if module.parametrization != "fixed-rank":
        return Contribution(gauge_free=True)
    shape = module.shape
    size = (shape.heads, shape.key_value_heads, shape.head_width)
    return _projected(module, name, *size, shape.groups()["qk"])


def _projected(
    module: Any, name: str, heads: int, shared: int, rank: int, group: StructureGroup
) -> Contribution:
    views = [
        output_heads(getattr(module, part), qualified(name, part), count * rank, consecutive(count))
        for part, count in (("query", heads), ("key", shared), ("value", shared))
    ]
    return with_output(module, name, "output", (heads, rank), views, group)


@register(RELATIONAL_ATTENTION)
def relational_attention(module: Any, name: str) -> Contribution:
    """No matrix acts on the axis d, and none is a product of two."""
    return Contribution(gauge_free=True)


@register(f"{MODELS}.gpt.GPT")
def gpt(module: Any, name: str) -> Contribution:
    """All of O(d): the norms have no gains and nothing has a bias."""
    contribution = Contribution()
    _require_layers(module, GPT_LAYERS)
    for part in ("positions", "embedding"):
        add_embedding(contribution, getattr(module, part), qualified(name, part))
    _add_blocks_and_head(contribution, module, name, mlp_readers=("mlp.up",))
    return contribution


@register(f"{MODELS}.gpt.ViT")
def vit(module: Any, name: str) -> Contribution:
    """All of O(d), as for GPT: pooling and head commute with it."""
    contribution = Contribution()
    _require_layers(module, VIT_LAYERS)
    add_writer(contribution, module.patches, qualified(name, "patches"))
    add_embedding(contribution, module.positions, qualified(name, "positions"))
    _add_blocks_and_head(contribution, module, name, mlp_readers=("mlp.up",))
    return contribution


@register(f"{MODELS}.llama.Llama")
def llama(module: Any, name: str) -> Contribution:
    """O(d) once the gains of the norms are folded into the matrices that read them."""
    contribution = Contribution()
    _require_layers(module, LLAMA_LAYERS)
    add_embedding(contribution, module.embedding, qualified(name, "embedding"))
    _add_blocks_and_head(
        contribution,
        module,
        name,
        mlp_readers=("mlp.gate", "mlp.up"),
        norms=("attention_norm", "mlp_norm"),
    )
    return contribution


def _add_blocks_and_head(
    contribution: Contribution,
    module: Any,
    name: str,
    mlp_readers: tuple[str, ...],
    norms: tuple[str | None, str | None] = (None, None),
) -> None:
    attention_readers = ("attention.query", "attention.key", "attention.value")
    for index, block in enumerate(module.blocks):
        prefix = qualified(name, "blocks", str(index))
        for norm, readers, writer in (
            (norms[0], attention_readers, "attention.output"),
            (norms[1], mlp_readers, "mlp.down"),
        ):
            add_branch(contribution, block, prefix, readers=readers, writers=(writer,), norm=norm)
        if "mlp.gate" in mlp_readers:
            add_units(contribution, block, prefix, Units("mlp.up", "mlp.down"))
    head = add_reader(contribution, module.head, qualified(name, "head"))
    if norms[0] is not None:
        add_norm(contribution, module.norm, qualified(name, "norm"), [head])


def _require_layers(module: nn.Module, class_names: tuple[str, ...]) -> None:
    """Refuse a model in which some layer was replaced by one of another class."""
    for path, layer in bare_modules(module):
        if not any(follows(layer, class_name) for class_name in class_names):
            raise NotUnderstoodError(f"{path} is a {type(layer).__name__}")
        for parameter_name in ("weight", "bias"):
            if hasattr(layer, parameter_name) and parameter_name not in layer._parameters:
                raise NotUnderstoodError(f"{path}.{parameter_name} is not a parameter")
