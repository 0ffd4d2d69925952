"""The package's own GPT, Llama and vision Transformer."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.symmetries.adapters.layers import (
    EMBEDDING,
    LINEAR,
    add_pair,
    add_residual,
    require,
    weight_and_bias,
)
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    follows,
    qualified,
    register,
)

MODELS = "quotientopt.models"
ATTENTION = f"{MODELS}.attention.Attention"
LAYERS = (LINEAR, EMBEDDING, "torch.nn.modules.container.ModuleList", ATTENTION)
BLOCK_LAYERS = (*LAYERS, *(f"{MODELS}.gpt.{part}" for part in ("GPTBlock", "GELUMLP")))
GPT_LAYERS = (*BLOCK_LAYERS, f"{MODELS}.gpt.GPT")
VIT_LAYERS = (*BLOCK_LAYERS, f"{MODELS}.vit.ViT")
LLAMA_LAYERS = (
    *LAYERS,
    *(f"{MODELS}.llama.{part}" for part in ("Llama", "LlamaBlock", "SwiGLU", "RMSNorm")),
)


@register(ATTENTION)
def attention(module: Any, name: str) -> Contribution:
    """One symmetry per pair; the query heads of a key-value head are blocks of one factor."""
    shared, rank = module.key_value_heads, module.head_width
    group = module.heads // shared
    width = require(module.query, LINEAR).weight.shape[1]
    weights = {}
    for part, rows in (("query", module.heads), ("key", shared), ("value", shared)):
        weights[part], bias = weight_and_bias(getattr(module, part), LINEAR, (rows * rank, width))
        if bias is not None:
            raise NotUnderstoodError(f"{part} of {type(module).__name__} has a bias")
    output, _ = weight_and_bias(module.output, LINEAR, (width, module.heads * rank))

    def block(part: str, weight: nn.Parameter, view: Any) -> Block:
        return Block.of(view, weight, qualified(name, part, "weight"))

    queries = weights["query"].detach().unflatten(0, (shared, group, rank))
    outputs = output.detach().unflatten(1, (shared, group, rank))
    key, value = (
        block(part, weights[part], weights[part].detach().unflatten(0, (shared, rank)))
        for part in ("key", "value")
    )
    qk_group: StructureGroup = RotaryCommutant(rank, layout="half") if module.rotary else GL(rank)
    contribution = Contribution()
    add_pair(
        contribution,
        qualified(name, "qk"),
        qk_group,
        [block("query", weights["query"], queries[:, j]) for j in range(group)],
        [key],
    )
    add_pair(
        contribution,
        qualified(name, "vo"),
        GL(rank),
        [block("output", output, outputs[:, :, j].permute(1, 2, 0)) for j in range(group)],
        [value],
    )
    return contribution


@register(f"{MODELS}.gpt.GPT")
def gpt(module: Any, name: str) -> Contribution:
    """All of O(d): the norms have no gains and nothing has a bias."""
    contribution = Contribution()
    _require_layers(module, GPT_LAYERS)
    for part in ("positions", "embedding"):
        add_residual(contribution, getattr(module, part), qualified(name, part), 1)
    _add_blocks_and_head(contribution, module, name, mlp_readers=("up",))
    return contribution


@register(f"{MODELS}.vit.ViT")
def vit(module: Any, name: str) -> Contribution:
    """All of O(d), as for GPT: pooling and head commute with it."""
    contribution = Contribution()
    _require_layers(module, VIT_LAYERS)
    add_residual(contribution, module.patches, qualified(name, "patches"), 0, writes=True)
    add_residual(contribution, module.positions, qualified(name, "positions"), 1)
    _add_blocks_and_head(contribution, module, name, mlp_readers=("up",))
    return contribution


@register(f"{MODELS}.llama.Llama")
def llama(module: Any, name: str) -> Contribution:
    """O(d) once the gains of the norms are folded into the matrices that read them."""
    contribution = Contribution()
    _require_layers(module, LLAMA_LAYERS)
    add_residual(contribution, module.embedding, qualified(name, "embedding"), 1)
    _add_blocks_and_head(contribution, module, name, mlp_readers=("gate", "up"))
    for index in range(len(module.blocks)):
        block = qualified(name, "blocks", str(index))
        for norm, readers in (
            ("attention_norm", [f"attention.{part}" for part in ("query", "key", "value")]),
            ("mlp_norm", ["mlp.gate", "mlp.up"]),
        ):
            contribution.gains[qualified(block, norm, "weight")] = tuple(
                (qualified(block, reader, "weight"), 1) for reader in readers
            )
    contribution.gains[qualified(name, "norm.weight")] = ((qualified(name, "head.weight"), 1),)
    return contribution


def _add_blocks_and_head(
    contribution: Contribution, module: Any, name: str, mlp_readers: tuple[str, ...]
) -> None:
    for index, block in enumerate(module.blocks):
        prefix = qualified(name, "blocks", str(index))
        for part in ("query", "key", "value"):
            layer = getattr(block.attention, part)
            add_residual(contribution, layer, qualified(prefix, "attention", part), 1)
        for part in mlp_readers:
            layer = getattr(block.mlp, part)
            add_residual(contribution, layer, qualified(prefix, "mlp", part), 1)
        for part, layer in (
            ("attention.output", block.attention.output),
            ("mlp.down", block.mlp.down),
        ):
            add_residual(contribution, layer, qualified(prefix, part), 0, writes=True)
    add_residual(contribution, module.head, qualified(name, "head"), 1)


def _require_layers(module: nn.Module, class_names: tuple[str, ...]) -> None:
    """Refuse a model in which some layer was replaced by one of another class."""
    for path, layer in module.named_modules():
        if not any(follows(layer, class_name) for class_name in class_names):
            raise NotUnderstoodError(f"{path} is a {type(layer).__name__}")
        for parameter_name in ("weight", "bias"):
            if hasattr(layer, parameter_name) and parameter_name not in layer._parameters:
                raise NotUnderstoodError(f"{path}.{parameter_name} is not a parameter")
