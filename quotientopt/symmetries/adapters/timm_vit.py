"""Attention and block of timm's vision Transformers: fused queries, keys and values."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.attention_groups import normalised_group
from quotientopt.symmetries.adapters.layers import (
    IDENTITY,
    add_attention,
    add_branch,
    consecutive,
    input_heads,
    output_heads,
    require,
    understands,
)
from quotientopt.symmetries.adapters.torch_attention import UNKNOWN_REST
from quotientopt.symmetries.norm import register_norm
from quotientopt.symmetries.registry import Contribution, follows, qualified

# Where timm has kept them from version to version.
ATTENTIONS = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
BLOCK = "timm.models.vision_transformer.Block"
MLP = "timm.layers.mlp.Mlp"
LAYER_SCALE = ("timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale")

# Its RmsNorm has computed different things from version to version and is not among them.
register_norm("timm.layers.norm.LayerNorm", centres=True)
register_norm("timm.layers.norm.LayerNormFp32", centres=True)


@understands(*ATTENTIONS)
def timm_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head; normalised queries and keys leave less or nothing on QK.

    A norm between the heads and the output matrix (``scale_norm``) is not understood.
    """
    heads, rank = module.num_heads, module.head_dim
    width = heads * rank
    query, key, value = (
        output_heads(module.qkv, qualified(name, "qkv"), 3 * width, consecutive(heads, part, 3))
        for part in range(3)
    )
    if hasattr(module, "norm"):
        require(module.norm, IDENTITY)
    output = input_heads(module.proj, qualified(name, "proj"), width, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=query,
        key=key,
        value=value,
        output=output,
        qk_group=normalised_group((module.q_norm, module.k_norm), GL(rank)),
    )
    return contribution


@understands(BLOCK)
def timm_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; it cannot know the rest of the stream."""
    contribution = Contribution(residual_breakers=[UNKNOWN_REST])
    require(module.attn, *ATTENTIONS)
    require(module.mlp, MLP)
    require(module.mlp.norm, IDENTITY)
    for norm, reader, writer in (
        ("norm1", "attn.qkv", "attn.proj"),
        ("norm2", "mlp.fc1", "mlp.fc2"),
    ):
        add_branch(contribution, module, name, readers=(reader,), writers=(writer,), norm=norm)
    for part in ("ls1", "ls2"):
        if not follows(getattr(module, part), IDENTITY):
            require(getattr(module, part), *LAYER_SCALE)
            contribution.residual_breakers.append(f"layer scale {qualified(name, part)}")
    return contribution
