"""Running averages of covariances."""

from __future__ import annotations

import torch
from torch import Tensor

TIE_BREAK = 1e-3


def ema_(average: Tensor, new: Tensor, beta: float, gate: Tensor | None = None) -> None:
    """Exponential moving average in place that starts at its first non-zero sample.

    ``average`` holds symmetric positive matrices; one that is zero has seen no gradient yet. With
    a ``gate`` of zero nothing changes.
    """
    trace = average.diagonal(dim1=-2, dim2=-1).sum(-1)
    weight = torch.where(trace == 0, 1.0, 1 - beta).to(average.dtype)
    if gate is not None:
        weight = weight * gate.to(weight)
    average.lerp_(new, weight[..., None, None])


def trace_normalised(matrix: Tensor) -> Tensor:
    """``matrix`` over its trace, so that eigen-decompositions see numbers of order one."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return matrix / trace.clamp_min(torch.finfo(matrix.dtype).tiny)


def break_ties(covariance: Tensor, *weights_grams: Tensor) -> Tensor:
    """Trace-normalised covariance of dressed gradients, plus a little of the dressed weights'.

    The covariance is singular early on and where fewer gradients than directions were seen; there
    its eigenvectors would be rounding noise. Grams of weights break the ties by something that
    transforms the same way; together they must have full rank.
    """
    broken = trace_normalised(covariance)
    for gram in weights_grams:
        broken = broken.add_(trace_normalised(gram), alpha=TIE_BREAK)
    return broken
