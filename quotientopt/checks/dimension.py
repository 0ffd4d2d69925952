"""The dimension check."""

import math
from typing import Any

import torch

from quotientopt.checks.points import Point, flatten
from quotientopt.checks.result import CheckResult
from quotientopt.checks.subject import Subject

LARGEST = 3000


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
