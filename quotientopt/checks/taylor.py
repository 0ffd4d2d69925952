"""Taylor models of a cost along a retraction: the gradient check and the Hessian check."""

from collections.abc import Callable
from typing import Any

import torch

from quotientopt.checks.points import Point, add, multiply, number
from quotientopt.checks.result import CheckResult
from quotientopt.checks.slopes import NOISE_FACTOR, rounding_noise, step_sizes
from quotientopt.checks.subject import Cost, Subject
from quotientopt.checks.verdict import Curve, judge, relative


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
