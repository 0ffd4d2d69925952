"""Phi-3 of the transformers package: fused projections, partly rotated heads."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention, rotary_group
from quotientopt.symmetries.adapters.layers import (
    add_attention,
    consecutive,
    input_heads,
    narrowed,
    output_heads,
)
from quotientopt.symmetries.adapters.rotary_decoder import gated_layer, register_decoder
from quotientopt.symmetries.registry import Contribution, qualified

PHI3 = "transformers.models.phi3.modeling_phi3.Phi3"


def phi3_attention(module: Any, name: str) -> Contribution:
    """GL(r − rotated) × (C*)^{rotated/2} on QK; queries, keys and values are rows of one matrix."""
    require_known_attention(module)
    rank, groups = module.head_dim, module.num_key_value_groups
    shared = module.num_key_value_heads
    heads = shared * groups
    width, shared_width = heads * rank, shared * rank
    parts = {
        "query": (heads, 0, width),
        "key": (shared, width, shared_width),
        "value": (shared, width + shared_width, shared_width),
    }
    views = {
        part: output_heads(
            module.qkv_proj,
            qualified(name, "qkv_proj"),
            width + 2 * shared_width,
            narrowed(*where),
        )
        for part, where in parts.items()
    }
    output = input_heads(module.o_proj, qualified(name, "o_proj"), width, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=output,
        qk_group=rotary_group(module.config, rank, partial=True),
        query_groups=groups,
    )
    return contribution


def phi3_layer(module: Any, name: str, *, prefix: str) -> Contribution:
    """Residual axes of one layer, whose readers are fused."""
    return gated_layer(
        module,
        name,
        prefix=prefix,
        attention_readers=("self_attn.qkv_proj",),
        mlp_readers=("mlp.gate_up_proj",),
    )


register_decoder(PHI3, attention=phi3_attention, layer=phi3_layer)
