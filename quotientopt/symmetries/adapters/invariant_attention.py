"""InvariantAttention: the gauge of its fixed-rank parametrization; the chart has none."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.layers import (
    add_attention,
    consecutive,
    input_heads,
    output_heads,
)
from quotientopt.symmetries.registry import Contribution, qualified, register

INVARIANT_ATTENTION = "quotientopt.nn.invariant_attention.InvariantAttention"


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
        query_groups=shape.query_groups,
    )
    return contribution
