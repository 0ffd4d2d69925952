"""The invariance check: a group acts by isometries, and everything is equivariant."""

from collections.abc import Callable
from typing import Any

import torch

from quotientopt.checks.points import Point, deviation, multiply, number
from quotientopt.checks.result import CheckResult
from quotientopt.checks.subject import Cost, Subject
from quotientopt.checks.verdict import judge, relative


def check_invariance(
    manifold: Any,
    cost: Cost | None = None,
    x: Point | None = None,
    element: Any = None,
    *,
    act: Callable[[Any, Point], Point] | None = None,
    act_tangent: Callable[[Any, Point], Point] | None = None,
    cond: float = 10.0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether nothing that should be invariant changes under a group element g.

    Of the following what the manifold has: the canonical projection ``π(g·x) = π(x)``, the cost,
    the metric ``⟨g·u, g·v⟩_{g·x} = ⟨u, v⟩_x``; and equivariant are ``horizontal_component``,
    ``retract``, ``retract_second_order``, ``transport`` and the gradient of the cost.

    Parameters
    ----------
    manifold : object
        With ``inner``, and ``act`` and ``group`` unless `act` and `element` are given.
    cost : callable, optional
        As for :func:`check_gradient`.
    x : point, optional
        Random by default.
    element : optional
        The group element; by default a random one of ``manifold.group``.
    act : callable, optional
        ``act(element, x)``; by default ``manifold.act``.
    act_tangent : callable, optional
        The same for tangent vectors; by default `act`, for an action that is linear.
    cond : float
        Condition number of a random element.
    tolerance : float, optional
        For relative deviations; by default `cond` times ``eps^{2/3}`` of the dtype.
    generator, dtype
        As for :func:`check_gradient`.

    Returns
    -------
    CheckResult

    Raises
    ------
    TypeError
        If the manifold has no group or no action and none is given.
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    move = subject.method("act") if act is None else act
    push = move if act_tangent is None else act_tangent
    g = subject.random_element(cond) if element is None else element
    x, y = subject.x, move(g, subject.x)
    u, v = subject.random_tangent(), subject.random_tangent()
    gu, gv = push(g, u), push(g, v)

    norms = subject.norm(u) * subject.norm(v)
    residuals = {
        "metric": relative(abs(subject.inner(gu, gv, y) - subject.inner(u, v)), norms),
        "norm": relative(abs(subject.norm(gu, y) - subject.norm(u)), subject.norm(u)),
    }
    if subject.has("canonical_projection"):
        projection = subject.manifold.canonical_projection
        residuals["canonical projection"] = deviation(projection(y), projection(x))
    if subject.has("horizontal_component"):
        project, w = subject.manifold.horizontal_component, subject.random_vector()
        residuals["projection"] = deviation(project(y, push(g, w)), push(g, project(x, w)))
    for name in ("retract", "retract_second_order"):
        if subject.has(name):
            retract = getattr(subject.manifold, name)
            expected = move(g, retract(x, multiply(0.5, u)))
            residuals[name] = deviation(retract(y, multiply(0.5, gu)), expected)
    if subject.has("retract", "transport"):
        end = subject.manifold.retract(x, multiply(0.5, u))
        expected = push(g, subject.manifold.transport(x, end, v))
        residuals["transport"] = deviation(
            subject.manifold.transport(y, move(g, end), gv), expected
        )
    if cost is not None:
        values = number(cost(x)), number(cost(y))
        residuals["cost"] = relative(abs(values[0] - values[1]), abs(values[0]))
        if subject.has("gradient"):
            gradient = subject.gradient_of(cost)
            residuals["gradient"] = deviation(gradient(y), push(g, gradient(x)))
    bound = subject.tolerance if tolerance is not None else cond * subject.tolerance
    return judge("invariance", residuals=residuals, tolerance=bound)
