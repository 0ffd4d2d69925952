"""Checks along a curve ``t ↦ R_x(tu)``, by the slope of an error in t.

In reading order: Taylor models of a cost (:func:`check_gradient`, :func:`check_hessian`), the
retraction itself (:func:`check_retraction`), and vectors that are moved along it
(:func:`check_transport`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quotientopt.checks.points import Point, add, flatten, multiply, number
from quotientopt.checks.subject import Cost, Subject
from quotientopt.checks.verdict import (
    NOISE_FACTOR,
    ROUNDING,
    CheckResult,
    Curve,
    judge,
    relative,
    rounding_noise,
    step_sizes,
)

Retraction = Callable[[Point, Point], Point]


def check_gradient(
    manifold: Any,
    cost: Cost | None = None,
    x: Point | None = None,
    u: Point | None = None,
    *,
    gradient: Callable[[Point], Point] | None = None,
    retraction: Callable[[Point, Point], Point] | None = None,
    slope_tolerance: float = 0.1,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether ``f(R_x(tu)) = f(x) + t ⟨grad f(x), u⟩ + O(t²)``, and the gradient is horizontal.

    Slope 2 or more for a correct gradient, 1 for a wrong one (Boumal, *An Introduction to
    Optimization on Smooth Manifolds*, 2023, section 4.8). A vertical (not tangent) component of the
    gradient does not show in the slope and is measured by itself; a cost that is not constant along
    orbits has one.

    Parameters
    ----------
    manifold : object
        With ``inner``, ``retract``, ``gradient(x, partials)`` and, if there are such,
        ``horizontal_component``, ``random_point``, ``random_tangent``: one of ours, a geoopt or a
        pymanopt manifold, or any other.
    cost : callable, optional
        Function of a point to a scalar, or to one scalar per batch item. By default a random
        function of ``manifold.canonical_projection``.
    x, u : point and tangent vector, optional
        Random by default.
    gradient : callable, optional
        ``gradient(x)``, the Riemannian gradient; by default autograd's partial derivatives through
        ``manifold.gradient``.
    retraction : callable, optional
        ``retraction(x, u)``; by default ``manifold.retract``.
    slope_tolerance : float
        How far the slope may fall short.
    tolerance : float, optional
        For the vertical component relative to the gradient; by default ``eps^{2/3}`` of the dtype.
    generator : torch.Generator, optional
        By default one seeded with 0.
    dtype : torch.dtype
        Of a random point.

    Returns
    -------
    CheckResult

    Raises
    ------
    TypeError
        If the manifold lacks a method, or its points are not made of tensors and `gradient` is not
        given.
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    cost = subject.random_cost() if cost is None else cost
    u = subject.random_tangent() if u is None else u
    grad = (subject.gradient_of(cost) if gradient is None else gradient)(subject.x)
    curve = model_error(subject, cost, u, retraction, subject.inner(grad, u), None)
    value = abs(number(cost(subject.x)))
    residuals = _vertical(subject, grad, subject.eps**0.5 * value)
    return judge(
        "gradient",
        curve=curve,
        residuals=residuals,
        tolerance=subject.tolerance,
        slope_tolerance=slope_tolerance,
        blame="the gradient is wrong, or the retraction starts with another velocity",
    )


def check_hessian(
    manifold: Any,
    cost: Cost | None = None,
    x: Point | None = None,
    u: Point | None = None,
    *,
    gradient: Callable[[Point], Point] | None = None,
    hessian: Callable[[Point, Point], Point] | None = None,
    retraction: Callable[[Point, Point], Point] | None = None,
    slope_tolerance: float = 0.15,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether ``f(R_x(tu)) = f + t ⟨grad f, u⟩ + ½ t² ⟨Hess f[u], u⟩ + O(t³)``.

    Slope 3 or more for a correct Hessian along a second-order retraction, or along any retraction
    at a critical point; 2 for a wrong Hessian (Boumal 2023, section 6.8). The Hessian must also be
    linear, self-adjoint and horizontal, which is measured apart.

    Parameters
    ----------
    manifold, cost, x, u, gradient, slope_tolerance, generator, dtype
        As for :func:`check_gradient`.
    hessian : callable, optional
        ``hessian(x, u)``, the Riemannian Hessian applied to `u`; by default autograd's
        Hessian-vector product through ``manifold.hessian``.
    retraction : callable, optional
        By default ``manifold.retract_second_order``, else ``manifold.exp`` where it is available,
        else ``manifold.retract``.
    tolerance : float, optional
        For linearity, self-adjointness and the vertical component.

    Returns
    -------
    CheckResult
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    cost = subject.random_cost() if cost is None else cost
    u = subject.random_tangent() if u is None else u
    if retraction is None:
        exp = None if subject.has("retract_second_order") else subject.exponential(u)
        retraction = exp or subject.method("retract_second_order", "retract")
    gradient = subject.gradient_of(cost) if gradient is None else gradient
    apply = subject.hessian_of(cost) if hessian is None else hessian
    Hu = apply(subject.x, u)
    first, second = subject.inner(gradient(subject.x), u), subject.inner(Hu, u)
    curve = model_error(subject, cost, u, retraction, first, second)
    zero = subject.eps**0.5 * abs(number(cost(subject.x)))
    residuals = _vertical(subject, Hu, zero)
    v = subject.random_tangent()
    Hv = apply(subject.x, v)
    combined = apply(subject.x, add(multiply(2.0, u), v, -3.0))
    separate = add(multiply(2.0, Hu), Hv, -3.0)
    size = max(subject.norm(Hu) * subject.norm(v), subject.norm(Hv) * subject.norm(u), zero)
    residuals["linearity"] = relative(
        subject.norm(add(combined, separate, -1.0)), subject.norm(separate), zero
    )
    residuals["symmetry"] = relative(abs(subject.inner(Hu, v) - subject.inner(u, Hv)), size)
    return judge(
        "hessian",
        curve=curve,
        residuals=residuals,
        tolerance=subject.tolerance,
        slope_tolerance=slope_tolerance,
        blame="the Hessian is wrong, or the retraction is of first order and x is not critical",
    )


def model_error(
    subject: Subject,
    cost: Cost,
    u: Point,
    retraction: Callable[[Point, Point], Point] | None,
    first: float,
    second: float | None,
) -> Curve:
    """Error of the Taylor model of first or, with a `second` derivative, second order."""
    retract = subject.method("retract") if retraction is None else retraction

    def value(step: float) -> float:
        return number(cost(retract(subject.x, multiply(step, u))))

    steps = tuple(step_sizes(subject.eps).tolist())
    start = number(cost(subject.x))
    quadratic = 0.0 if second is None else second
    errors = tuple(abs(value(t) - start - t * first - t * t / 2 * quadratic) for t in steps)
    floor = NOISE_FACTOR * rounding_noise(value, subject.eps)
    if second is None:
        return Curve(steps, errors, floor, tuple(abs(first) * t for t in steps), expected=2)
    return Curve(steps, errors, floor, tuple(abs(second) * t * t / 2 for t in steps), expected=3)


def _vertical(subject: Subject, vector: Point, zero: float) -> dict[str, float]:
    """Part of a vector that the projection removes; vectors shorter than `zero` count as none."""
    if not subject.has("horizontal_component"):
        return {}
    removed = add(vector, subject.manifold.horizontal_component(subject.x, vector), -1.0)
    return {"vertical component": relative(subject.norm(removed), subject.norm(vector), zero)}


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


def check_transport(
    manifold: Any,
    x: Point | None = None,
    u: Point | None = None,
    v: Point | None = None,
    *,
    transport: Callable[[Point, Point, Point], Point] | None = None,
    slope_tolerance: float = 0.1,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether a transport along ``R_x(tu)`` is linear, horizontal at its end, and continuous.

    Transported vectors must be horizontal (tangent) where they arrive, the transport linear, the
    identity from x to x, and ``T v = v + O(t)`` in coordinates: slope 1 or more (Absil, Mahony &
    Sepulchre 2008, section 8.1). Equivariance is part of :func:`check_invariance`.

    Parameters
    ----------
    manifold : object
        With ``inner``, ``retract``, ``transport`` and ``horizontal_component``.
    x : point, optional
    u, v : tangent vectors, optional
        The direction, and the vector to be moved; random by default.
    transport : callable, optional
        ``transport(x, y, v)``; by default ``manifold.transport``.
    slope_tolerance, tolerance, generator, dtype
        As for :func:`check_gradient`; `tolerance` is for the identities.

    Returns
    -------
    CheckResult
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    move = subject.method("transport") if transport is None else transport
    retract, project = subject.method("retract"), subject.method("horizontal_component")
    x = subject.x
    u = subject.random_tangent() if u is None else u
    v = subject.random_tangent() if v is None else v
    y = retract(x, multiply(0.5, u))

    def difference(a: Point, b: Point, at: Point) -> float:
        return relative(subject.norm(add(a, b, -1.0), at), subject.norm(b, at))

    moved_u, moved_v = move(x, y, u), move(x, y, v)
    separate = add(multiply(2.0, moved_u), moved_v, -3.0)
    residuals = {
        "vertical component": difference(project(y, moved_v), moved_v, y),
        "linearity": difference(move(x, y, add(multiply(2.0, u), v, -3.0)), separate, y),
        "identity from x to x": difference(move(x, x, v), v, x),
    }
    steps = tuple(step_sizes(subject.eps).tolist())
    start = flatten(v)
    size = start.norm().item()
    ends = [move(x, retract(x, multiply(t, u)), v) for t in steps]
    errors = tuple((flatten(end) - start).norm().item() for end in ends)
    curve = Curve(steps, errors, ROUNDING * subject.eps * size, (size,) * len(steps), expected=1)
    return judge(
        "transport",
        curve=curve,
        residuals=residuals,
        tolerance=subject.tolerance,
        slope_tolerance=slope_tolerance,
        blame="transport over short steps is not near the identity",
    )
