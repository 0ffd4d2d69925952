"""Which parameters an optimizer cuts into leaves, and when it does so anew."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

# Options on which leaves, buckets and the tensors of the state depend.
PLANNED = (
    "head_frame",
    "residual_frame",
    "lora_frame",
    "foreach",
    "master_weights",
    "capturable",
)


def takes_part(parameter: Tensor) -> bool:
    """Whether a parameter is trained; a frozen one only serves as geometry."""
    return parameter.requires_grad or parameter.grad is not None


def planned_groups(
    param_groups: Sequence[Mapping[str, Any]], also: Container[Tensor] = ()
) -> list[dict[str, Any]]:
    """The param groups with the parameters that are trained, and those in ``also``."""
    return [
        {**group, "params": [p for p in group["params"] if takes_part(p) or p in also]}
        for group in param_groups
    ]


def signature_of(param_groups: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """What leaves and buckets depend on; they are made anew when it changes."""
    return tuple(
        (
            *(group[option] for option in PLANNED),
            *map(layout_of, group["params"]),
        )
        for group in param_groups
    )


def layout_of(parameter: Tensor) -> tuple[Any, ...]:
    """Which parameter it is, whether it is trained, and how it lies in memory."""
    return (
        id(parameter),
        takes_part(parameter),
        parameter.dtype,
        parameter.device,
        parameter.shape,
        parameter.stride(),
    )
