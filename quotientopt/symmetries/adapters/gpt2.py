"""GPT-2 of the transformers package. Its Conv1D stores (in, out), the transpose of a Linear."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.layers import (
    EMBEDDING,
    LINEAR,
    add_layer_norm,
    add_pair,
    add_residual,
    require,
    row_block,
    weight_and_bias,
)
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.registry import Contribution, qualified, register

GPT2 = "transformers.models.gpt2.modeling_gpt2"
CONV1D = "transformers.pytorch_utils.Conv1D"


@register(f"{GPT2}.GPT2Attention")
def gpt2_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head; the scales of the scores are constants."""
    width = module.num_heads * module.head_dim
    fused: tuple[str, ...] = ("query", "key", "value")
    projections: dict[str, list[Block]] = {}
    if module.is_cross_attention:
        fused = ("key", "value")
        projections["query"] = _projection(module, name, "q_attn", 0, 1)
    for index, part in enumerate(fused):
        projections[part] = _projection(module, name, "c_attn", index, len(fused))
    output, _ = weight_and_bias(module.c_proj, CONV1D, (width, module.embed_dim))
    output_block = row_block(output, qualified(name, "c_proj.weight"), module.num_heads, 0, width)
    contribution = Contribution()
    group = GL(module.head_dim)
    add_pair(contribution, qualified(name, "qk"), group, projections["query"], projections["key"])
    add_pair(contribution, qualified(name, "vo"), group, [output_block], projections["value"])
    return contribution


@register(f"{GPT2}.GPT2Block")
def gpt2_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; what reads the encoder of a cross-attention is left out."""
    contribution = Contribution()
    require(module.attn, f"{GPT2}.GPT2Attention")
    require(module.mlp, f"{GPT2}.GPT2MLP")
    readers = {"attn.c_attn": module.attn.c_attn, "mlp.c_fc": module.mlp.c_fc}
    writers = {"attn.c_proj": module.attn.c_proj, "mlp.c_proj": module.mlp.c_proj}
    norms = {"ln_1": module.ln_1, "ln_2": module.ln_2}
    if hasattr(module, "crossattention"):
        require(module.crossattention, f"{GPT2}.GPT2Attention")
        readers["crossattention.q_attn"] = module.crossattention.q_attn
        writers["crossattention.c_proj"] = module.crossattention.c_proj
        norms["ln_cross_attn"] = module.ln_cross_attn
    for part, layer in readers.items():
        add_residual(contribution, require(layer, CONV1D), qualified(name, part), 0)
    for part, layer in writers.items():
        add_residual(contribution, require(layer, CONV1D), qualified(name, part), 1, writes=True)
    for part, norm in norms.items():
        add_layer_norm(contribution, norm, qualified(name, part))
    return contribution


@register(f"{GPT2}.GPT2Model")
def gpt2_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and the final norm."""
    contribution = Contribution()
    for part in ("wte", "wpe"):
        add_residual(
            contribution, require(getattr(module, part), EMBEDDING), qualified(name, part), 1
        )
    add_layer_norm(contribution, module.ln_f, qualified(name, "ln_f"))
    return contribution


@register(f"{GPT2}.GPT2LMHeadModel")
def gpt2_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the language-model head, tied to the embedding or not."""
    contribution = Contribution()
    add_residual(contribution, require(module.lm_head, LINEAR), qualified(name, "lm_head"), 1)
    return contribution


def _projection(module: Any, name: str, part: str, index: int, count: int) -> list[Block]:
    """Weight and bias blocks of projection ``index`` of ``count`` fused ones."""
    width = module.num_heads * module.head_dim
    weight, bias = weight_and_bias(getattr(module, part), CONV1D, (module.embed_dim, count * width))
    start = index * width
    name = qualified(name, part)
    heads = module.num_heads
    blocks = [row_block(weight, qualified(name, "weight"), heads, start, width, axis=1)]
    if bias is not None:
        blocks.append(row_block(bias, qualified(name, "bias"), heads, start, width))
    return blocks
