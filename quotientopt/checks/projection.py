"""The projection check and the transport check: what must hold to rounding."""

from collections.abc import Callable
from typing import Any

import torch

from quotientopt.checks.points import Point, add, flatten, multiply
from quotientopt.checks.result import CheckResult
from quotientopt.checks.slopes import step_sizes
from quotientopt.checks.subject import Subject
from quotientopt.checks.verdict import Curve, judge, relative

ROUNDING = 100.0


def check_projection(
    manifold: Any,
    x: Point | None = None,
    *,
    projection: Callable[[Point, Point], Point] | None = None,
    vectors: tuple[Point, Point] | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether the projection to the horizontal (tangent) space is one, and orthogonal.

    Linear, idempotent, self-adjoint in the metric, the identity on random tangent vectors, zero on
    ``manifold.vertical_vector`` where there are vertical vectors, and together with
    ``manifold.vertical_component`` the identity.

    Parameters
    ----------
    manifold : object
        With ``inner`` and ``horizontal_component``. The metric must be defined on all vectors of
        the surrounding space, as it is on a total space.
    x : point, optional
        Random by default.
    projection : callable, optional
        ``projection(x, u)``; by default ``manifold.horizontal_component``.
    vectors : pair of vectors, optional
        Of the surrounding space; random by default.
    tolerance : float, optional
        For relative deviations; by default ``eps^{2/3}`` of the dtype.
    generator, dtype
        As for :func:`check_gradient`.

    Returns
    -------
    CheckResult
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    project = subject.method("horizontal_component") if projection is None else projection
    x = subject.x
    u, v = vectors or (subject.random_vector(), subject.random_vector())
    Pu, Pv = project(x, u), project(x, v)

    def difference(a: Point, b: Point, size: float) -> float:
        return relative(subject.norm(add(a, b, -1.0)), size)

    combined = project(x, add(multiply(2.0, u), v, -3.0))
    separate = add(multiply(2.0, Pu), Pv, -3.0)
    tangent = subject.random_tangent()
    norm_u, norm_v = subject.norm(u), subject.norm(v)
    residuals = {
        "linearity": difference(combined, separate, 2 * norm_u + 3 * norm_v),
        "idempotence": difference(project(x, Pu), Pu, norm_u),
        "self-adjointness": relative(
            abs(subject.inner(Pu, v) - subject.inner(u, Pv)), norm_u * norm_v
        ),
        "identity on tangent vectors": difference(
            project(x, tangent), tangent, subject.norm(tangent)
        ),
    }
    vertical = subject.random_vertical_vector()
    if vertical is not None:
        residuals["zero on vertical vectors"] = relative(
            subject.norm(project(x, vertical)), subject.norm(vertical)
        )
    if subject.has("vertical_component"):
        whole = add(Pu, subject.manifold.vertical_component(x, u))
        residuals["horizontal + vertical = identity"] = difference(whole, u, norm_u)
    return judge("projection", residuals=residuals, tolerance=subject.tolerance)


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
