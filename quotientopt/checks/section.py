"""The section check."""

from collections.abc import Callable
from typing import Any

import torch

from quotientopt.checks.points import Point, deviation
from quotientopt.checks.result import CheckResult
from quotientopt.checks.subject import Subject
from quotientopt.checks.verdict import judge

RESIDUALS = ("trivial", "orthogonal")


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
        What k may be. By default trivial for the kinds ``"svd"`` and ``"polar"``, orthogonal
        for everything else, and where points have a stabiliser (tokens fewer than dimensions).
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
    if residual is None:
        free = getattr(manifold, "acts_freely", True)
        residual = "trivial" if free and section in ("svd", "polar") else "orthogonal"
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {RESIDUALS}, got {residual!r}")
    subject = Subject(manifold, x, tolerance=tolerance, generator=generator, dtype=dtype)
    manifold, x = subject.manifold, subject.x
    group = manifold.group

    def dress(point: Point) -> tuple[Point, Any]:
        return manifold.section(point, section) if isinstance(section, str) else section(point)

    h = subject.random_element(cond) if element is None else element
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
