"""Checks of what must hold to rounding.

In reading order: the projection to the horizontal space (:func:`check_projection`), a group that
acts by isometries (:func:`check_invariance`), sections (:func:`check_section`), and the dimension
(:func:`check_dimension`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from quotientopt.checks.points import Point, add, deviation, flatten, multiply, number
from quotientopt.checks.subject import Cost, Subject
from quotientopt.checks.verdict import CheckResult, judge, relative

LARGEST = 3000
RESIDUALS = ("trivial", "orthogonal")


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


def check_section(
    manifold: Any,
    section: str | Callable[[Point], tuple[Point, Any]] = "svd",
    x: Point | None = None,
    element: Any = None,
    *,
    residual: str | None = None,
    cond: float = 10.0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether a section σ picks one representative of each orbit, up to its residual group.

    ``σ(x) = g·x`` with the g it returns, g in the group, σ idempotent, ``π(σ(x)) = π(x)``, and for
    a random group element h the element ``k = g(h·x) h g(x)^{-1}`` that leads from σ(x) to σ(h·x)
    is the identity, or orthogonal.

    Parameters
    ----------
    manifold : object
        With ``act``, ``canonical_projection``, ``group``, ``batch_shape``.
    section : str or callable
        A kind for ``manifold.section``, or a function of a point that returns the representative
        and the group element.
    x : point, optional
        Random by default.
    element : optional
        The group element h; by default a random one of ``manifold.group``.
    residual : {"trivial", "orthogonal"}, optional
        What k may be. By default trivial for the kinds ``"svd"`` and ``"polar"``, and where group
        elements are orthogonal anyway; orthogonal for everything else, and where points have a
        stabiliser (tokens fewer than dimensions).
    cond : float
        Condition number of h.
    tolerance : float, optional
        For relative deviations; by default `cond` times ``eps^{2/3}`` of the dtype.
    generator, dtype
        As for :func:`check_gradient`.

    Returns
    -------
    CheckResult

    Raises
    ------
    ValueError
        If `residual` is unknown.
    """
    if residual is not None and residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {RESIDUALS}, got {residual!r}")
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    manifold, x = subject.manifold, subject.x
    group = manifold.group

    def dress(point: Point) -> tuple[Point, Any]:
        return manifold.section(point, section) if isinstance(section, str) else section(point)

    h = subject.random_element(cond) if element is None else element
    if residual is None:
        free = getattr(manifold, "acts_freely", True)
        turns = deviation(h.mT @ h, group.compose(h, group.inverse(h))) < 1e-3
        residual = "trivial" if free and (turns or section in ("svd", "polar")) else "orthogonal"
    dressed, g = dress(x)
    again, _ = dress(dressed)
    other, g_other = dress(manifold.act(h, x))
    k = group.compose(g_other, group.compose(h, group.inverse(g)))
    identity = torch.eye(group.r, dtype=k.dtype, device=k.device).expand_as(k)
    leftover = k if residual == "trivial" else k.mT @ k
    projection = manifold.canonical_projection
    residuals = {
        "g·x = σ(x)": deviation(manifold.act(g, x), dressed),
        "canonical projection": deviation(projection(dressed), projection(x)),
        "idempotence": deviation(again, dressed),
        f"residual group ({residual})": deviation(leftover, identity),
        "k·σ(x) = σ(h·x)": deviation(manifold.act(k, dressed), other),
    }
    name = f"section {section}" if isinstance(section, str) else "section"
    bound = subject.tolerance if tolerance is not None else cond * subject.tolerance
    return judge(name, residuals=residuals, tolerance=bound)


def check_dimension(
    manifold: Any,
    x: Point | None = None,
    *,
    expected: int | None = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Whether random tangent vectors span a space of the dimension claimed.

    The rank of ``dim + 1`` random tangent vectors of unit length, by the singular values of the
    matrix of their coordinates: the last one vanishes, the others do not.

    Parameters
    ----------
    manifold : object
        With ``random_tangent`` and ``dim``. Where it has a ``batch_shape``, ``dim`` counts for each
        batch item.
    x : point, optional
        Random by default.
    expected : int, optional
        The dimension, of all batch items together; by default from ``manifold.dim``.
    tolerance : float, optional
        Ratio to the largest singular value below which one counts as zero; by default
        ``eps^{2/3}`` of the dtype.
    generator, dtype
        As for :func:`check_gradient`.

    Returns
    -------
    CheckResult
        With the measured dimension as ``slope``, the claimed one as ``expected``, and the singular
        values as ``errors``.

    Raises
    ------
    ValueError
        If the dimension is above 3000, more than fits the purpose of a check.
    TypeError
        If the manifold has no ``dim`` and `expected` is not given.
    """
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    if expected is None:
        dim = getattr(subject.manifold, "dim", None)
        if dim is None:
            raise TypeError(f"{subject.manifold!r} has no dim: pass expected=")
        expected = int(dim) * math.prod(getattr(subject.manifold, "batch_shape", ()))
    if expected > LARGEST:
        raise ValueError(
            f"dimension {expected} is above {LARGEST}, and as many tangent vectors are needed: "
            "check a smaller manifold of the same kind, with fewer rows, columns or heads"
        )
    tangents = torch.stack([flatten(subject.random_tangent()) for _ in range(expected + 1)])
    values = torch.linalg.svdvals(tangents / tangents.norm(dim=-1, keepdim=True))
    measured = int((values > subject.tolerance * values[0]).sum())
    passed = measured == expected
    message = f"dimension: {expected} as claimed"
    if not passed:
        more = "at least " if measured == expected + 1 else ""
        message = f"dimension: tangent vectors span {more}{measured}, claimed are {expected}"
    return CheckResult(
        name="dimension",
        passed=passed,
        message=message,
        slope=float(measured),
        expected=float(expected),
        errors=tuple(values.tolist()),
        tolerance=subject.tolerance,
    )
