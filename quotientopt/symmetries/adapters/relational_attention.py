"""RelationalAttention: scores and head weights are functions of invariants, without a gauge."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.registry import Contribution, register

RELATIONAL_ATTENTION = "quotientopt.nn.relational_attention.RelationalAttention"


@register(RELATIONAL_ATTENTION)
def relational_attention(module: Any, name: str) -> Contribution:
    """No matrix acts on the axis d, and none is a product of two."""
    return Contribution(gauge_free=True)
