"""The package's own models and attentions."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.adapters.branches import (
    Units,
    add_units,
)
from quotientopt.symmetries.adapters.layers import (
    EMBEDDING,
    LINEAR,
    add_attention,
    add_branch,
    add_embedding,
    add_norm,
    add_reader,
    add_writer,
    bias_of,
    consecutive,
    input_heads,
    output_heads,
)
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    bare_modules,
    follows,
    qualified,
    register,
)
from quotientopt.symmetries.residual import register_norm

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
VIT_LAYERS = (*BLOCK_LAYERS, f"{MODELS}.vit.ViT")
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
    views = {
        part: output_heads(
            getattr(module, part), qualified(name, part), count * rank, consecutive(count)
        )
        for part, count in (("query", heads), ("key", shared), ("value", shared))
    }
    output = input_heads(module.output, qualified(name, "output"), heads * rank, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=output,
        qk_group=group,
        output_bias=bias_of(module.output, qualified(name, "output")),
    )
    return contribution


@register(INVARIANT_ATTENTION)
def invariant_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every key-value head; less on rotary queries and keys."""
    if module.parametrization != "fixed-rank":
        return Contribution(gauge_free=True)
    contribution = Contribution()
    shape = module.shape
    heads, shared, rank = shape.heads, shape.key_value_heads, shape.head_width
    query, key, value = (
        output_heads(getattr(module, part), qualified(name, part), count * rank, consecutive(count))
        for part, count in (("query", heads), ("key", shared), ("value", shared))
    )
    output = input_heads(module.output, qualified(name, "output"), heads * rank, consecutive(heads))
    add_attention(
        contribution,
        name,
        query=query,
        key=key,
        value=value,
        output=output,
        qk_group=shape.groups()["qk"],
        output_bias=bias_of(module.output, qualified(name, "output")),
    )
    return contribution


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


@register(f"{MODELS}.vit.ViT")
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
