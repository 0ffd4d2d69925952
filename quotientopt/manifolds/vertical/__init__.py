"""Vertical components of tangent vectors: one function for each structure group and metric."""

from collections.abc import Callable
from typing import Any

from quotientopt._linalg import Pair
from quotientopt.groups import GL, O, RotaryCommutant, StructureGroup
from quotientopt.manifolds.vertical import algebra, skew
from quotientopt.manifolds.vertical.base import VerticalVector

VerticalComponent = Callable[[Any, Pair], VerticalVector]

_COMPONENTS: dict[type[StructureGroup], dict[str, VerticalComponent]] = {
    GL: {
        "preconditioned": algebra.preconditioned,
        "right-invariant": algebra.right_invariant,
    },
    RotaryCommutant: {
        "preconditioned": algebra.preconditioned,
        "right-invariant": algebra.right_invariant,
    },
    O: {
        "preconditioned": skew.preconditioned,
        "right-invariant": skew.right_invariant,
        "euclidean": skew.euclidean,
    },
}


def vertical_component(group: StructureGroup, metric: str) -> VerticalComponent:
    """The function that computes vertical components.

    Raises
    ------
    ValueError
        If factor pairs are not divided by such a group, or the metric is not invariant under it.
    """
    if type(group) not in _COMPONENTS:
        known = ", ".join(kind.__name__ for kind in _COMPONENTS)
        raise ValueError(f"factor pairs are divided by one of {known}, got {group!r}")
    components = _COMPONENTS[type(group)]
    if metric not in components:
        raise ValueError(f"metric for {group!r} must be one of {tuple(components)}, got {metric!r}")
    return components[metric]


__all__ = ["VerticalComponent", "VerticalVector", "vertical_component"]
