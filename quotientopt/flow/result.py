"""What a flow returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlowEvent:
    """Where an event function vanished.

    Attributes
    ----------
    times : Tensor
        Float64, ``(K,)``.
    points : list
        The points then, of the same structure as the start.
    """

    times: Tensor
    points: list[Any] = field(repr=False)


@dataclass(frozen=True, eq=False)
class FlowResult:
    """A trajectory of a projected gradient flow, on T recorded times.

    Attributes
    ----------
    t : Tensor
        Times, float64, ``(T,)``: those of `t_eval`, or the steps of the integrator.
    loss : Tensor
        Float64, ``(T,)``.
    points : point
        As the start is structured, with the time axis in front of every tensor; for a model a dict
        of parameter names to tensors. In the dtype of the start.
    charges : dict of str to Tensor
        What the flow conserves, ``(T, *batch, …)`` by the name of the pair; see
        :func:`~quotientopt.flow.projected_gradient_flow`.
    invariants : dict of str to Tensor
        Numbers that no change of gauge changes, ``(T, *batch, r)`` by the name of the pair: for
        GL(r) the singular values of AᵀB, for rotary planes ``|a| |b|``, for compact groups the
        singular values of [A B] (of the token matrix).
    gradient_norm : Tensor
        Norm of the gradient, ``(T,)``.
    vertical_share : Tensor
        Norm of the vertical part of the gradient over that of the gradient, ``(T,)``: rounding, if
        the loss is invariant.
    horizontal_length, vertical_length : Tensor
        Lengths of both parts of the gradient, integrated over time by the integrator itself, hence
        to its tolerances, ``(T,)``. The first is the length of the trajectory in the quotient. The
        second has been taken out if the flow is projected, and is moved along the orbits if not.
    sol : callable or None
        Time to point, with ``dense_output=True``.
    events : tuple of FlowEvent
        One for each event function.
    success : bool
        Whether the end, or a terminal event, was reached.
    message : str
        The integrator's own words.
    evaluations : int
        How often the integrator asked for the gradient.
    """

    t: Tensor
    loss: Tensor = field(repr=False)
    points: Any = field(repr=False)
    charges: dict[str, Tensor] = field(repr=False)
    invariants: dict[str, Tensor] = field(repr=False)
    gradient_norm: Tensor = field(repr=False)
    vertical_share: Tensor = field(repr=False)
    horizontal_length: Tensor = field(repr=False)
    vertical_length: Tensor = field(repr=False)
    sol: Callable[[float], Any] | None = field(repr=False)
    events: tuple[FlowEvent, ...] = field(repr=False)
    success: bool
    message: str
    evaluations: int

    def charge_drift(self) -> dict[str, Tensor]:
        """``‖C(t) − C(0)‖`` over all heads, ``(T,)`` by the name of the pair."""
        return {
            name: (charge - charge[0]).flatten(1).norm(dim=1)
            for name, charge in self.charges.items()
        }
