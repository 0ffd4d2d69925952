"""The retraction check."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quotientopt.checks.points import Point, flatten, multiply
from quotientopt.checks.result import CheckResult
from quotientopt.checks.slopes import step_sizes
from quotientopt.checks.subject import Subject
from quotientopt.checks.taylor import model_error
from quotientopt.checks.verdict import Curve, judge, relative

Retraction = Callable[[Point, Point], Point]
ROUNDING = 100.0


def check_retraction(
    manifold: Any,
    x: Point | None = None,
    u: Point | None = None,
    *,
    retraction: Retraction | None = None,
    order: int = 1,
    slope_tolerance: float = 0.1,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether ``R_x(0) = x`` and ``R_x(tu) = x + t u + O(t²)``, or to second order a geodesic.

    On a manifold with ``canonical_projection`` π and ``differential`` points are compared through
    them, ``π(R_x(tu)) = π(x) + t Dπ(x)[u] + O(t²)``, so that a retraction may change the
    representative; elsewhere in the coordinates of the points. Slope 2 or more, 1 for a wrong
    velocity.

    With ``order=2`` the curve must have no acceleration. Against ``manifold.exp``, where it is
    available, the slope is 3 or more; otherwise the Taylor model of second order of a random linear
    function of π is taken, with ``manifold.hessian``: once the Hessian is known to be right
    (:func:`check_hessian`), an acceleration is all that can spoil it.

    Parameters
    ----------
    manifold : object
        With ``retract``, and for ``order=2`` with ``exp``, or with ``canonical_projection``,
        ``inner``, ``gradient`` and ``hessian``.
    x, u : point and tangent vector, optional
        Random by default.
    retraction : callable, optional
        ``retraction(x, u)``; by default ``manifold.retract``, with ``order=2`` preferably
        ``manifold.retract_second_order``.
    order : {1, 2}
    slope_tolerance, tolerance, generator, dtype
        As for :func:`check_gradient`; `tolerance` is for ``R_x(0) = x``.

    Returns
    -------
    CheckResult

    Raises
    ------
    ValueError
        If `order` is neither 1 nor 2.
    TypeError
        If the manifold lacks a method.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    u = subject.random_tangent() if u is None else u
    if retraction is None:
        names = ("retract_second_order", "retract") if order == 2 else ("retract",)
        retraction = subject.method(*names)
    image = _image(subject)
    start, resting = image(subject.x), image(retraction(subject.x, multiply(0.0, u)))
    residuals = {"R_x(0) = x": relative(_length(resting - start), _length(start))}
    if order == 1:
        curve = _first_order_error(subject, u, retraction)
        blame = "the retraction starts with another velocity"
    else:
        curve = _second_order_error(subject, u, retraction)
        blame = "the retraction has an acceleration, or a wrong velocity"
    return judge(
        "retraction" if order == 1 else "second-order retraction",
        curve=curve,
        residuals=residuals,
        tolerance=subject.tolerance,
        slope_tolerance=slope_tolerance,
        blame=blame,
    )


def _first_order_error(subject: Subject, u: Point, retraction: Retraction) -> Curve:
    image = _image(subject)
    start, velocity = image(subject.x), _velocity(subject, u)
    steps = tuple(step_sizes(subject.eps).tolist())
    errors = tuple(
        _length(image(retraction(subject.x, multiply(t, u))) - start - t * velocity) for t in steps
    )
    signal = tuple(t * _length(velocity) for t in steps)
    return Curve(steps, errors, ROUNDING * subject.eps * _length(start), signal, expected=2)


def _second_order_error(subject: Subject, u: Point, retraction: Retraction) -> Curve:
    exp = subject.exponential(u)
    if exp is None:
        cost = subject.random_linear_cost()
        gradient, hessian = subject.gradient_of(cost), subject.hessian_of(cost)
        first = subject.inner(gradient(subject.x), u)
        second = subject.inner(hessian(subject.x, u), u)
        return model_error(subject, cost, u, retraction, first, second)
    image = _image(subject)
    start, velocity = image(subject.x), _velocity(subject, u)
    steps = tuple(step_sizes(subject.eps).tolist())
    vectors = [multiply(t, u) for t in steps]
    errors = tuple(
        _length(image(retraction(subject.x, v)) - image(exp(subject.x, v))) for v in vectors
    )
    signal = tuple(t * t * _length(velocity) ** 2 / _length(start) for t in steps)
    return Curve(steps, errors, ROUNDING * subject.eps * _length(start), signal, expected=3)


def _image(subject: Subject) -> Callable[[Point], Tensor]:
    """The invariant of a point, or its coordinates where there is none, as one vector."""
    if subject.has("canonical_projection", "differential"):
        projection = subject.manifold.canonical_projection
        return lambda y: flatten(projection(y))
    return flatten


def _velocity(subject: Subject, u: Point) -> Tensor:
    """Derivative of :func:`_image` along `u`."""
    if subject.has("canonical_projection", "differential"):
        return flatten(subject.manifold.differential(subject.x, u))
    return flatten(u)


def _length(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector).item()
