"""GPT-2 of the transformers package. Its Conv1D stores (in, out), the transpose of a Linear."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    CONV1D,
    HeadView,
    add_attention,
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    consecutive,
    input_heads,
    output_heads,
    require,
    understands,
)
from quotientopt.symmetries.registry import Contribution, qualified

GPT2 = "transformers.models.gpt2.modeling_gpt2"


@understands(f"{GPT2}.GPT2Attention")
def gpt2_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head; the scales of the scores are constants."""
    require_known_attention(module)
    heads, width = module.num_heads, module.num_heads * module.head_dim
    fused: tuple[str, ...] = ("query", "key", "value")
    views: dict[str, list[HeadView]] = {}
    if module.is_cross_attention:
        fused = ("key", "value")
        views["query"] = output_heads(
            module.q_attn, qualified(name, "q_attn"), width, consecutive(heads), CONV1D
        )
    for index, part in enumerate(fused):
        pick = consecutive(heads, index, len(fused))
        views[part] = output_heads(
            module.c_attn, qualified(name, "c_attn"), len(fused) * width, pick, CONV1D
        )
    output = input_heads(
        module.c_proj, qualified(name, "c_proj"), width, consecutive(heads), CONV1D
    )
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=output,
        qk_group=GL(module.head_dim),
    )
    return contribution


@understands(f"{GPT2}.GPT2Block")
def gpt2_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; what reads the encoder of a cross-attention is left out."""
    contribution = Contribution()
    branches = {"attn": ("attn.c_attn", "ln_1")}
    if hasattr(module, "crossattention"):
        branches["crossattention"] = ("crossattention.q_attn", "ln_cross_attn")
    for part, (reader, norm) in branches.items():
        require(getattr(module, part), f"{GPT2}.GPT2Attention")
        add_branch(
            contribution,
            module,
            name,
            readers=(reader,),
            writers=(f"{part}.c_proj",),
            norm=norm,
            kind=CONV1D,
        )
    require(module.mlp, f"{GPT2}.GPT2MLP")
    add_branch(
        contribution,
        module,
        name,
        readers=("mlp.c_fc",),
        writers=("mlp.c_proj",),
        norm="ln_2",
        kind=CONV1D,
    )
    return contribution


@understands(f"{GPT2}.GPT2Model")
def gpt2_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "ln_f")})
    for part in ("wte", "wpe"):
        add_embedding(contribution, getattr(module, part), qualified(name, part))
    add_norm(contribution, module.ln_f, qualified(name, "ln_f"), [])
    return contribution


@understands(f"{GPT2}.GPT2LMHeadModel")
def gpt2_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the language-model head, tied to the embedding or not."""
    contribution = Contribution()
    require(module.transformer, f"{GPT2}.GPT2Model")
    add_consumer(contribution, module, name, "transformer", "lm_head")
    return contribution
