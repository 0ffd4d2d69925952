"""Rounding to a narrow dtype that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to one of the two nearest numbers of ``dtype``, at odds that keep the mean.

    x between neighbours a < b becomes b with probability (x − a)/(b − a). Small updates of bfloat16
    weights, which rounding to nearest would lose, then count on average.

    Parameters
    ----------
    values : Tensor
        In a wider dtype.
    dtype : torch.dtype

    Returns
    -------
    Tensor
        Of ``dtype``. What overflows or is not finite stays as rounding to nearest makes it. The
        random numbers are those of torch's global generator.
    """
    nearest = values.to(dtype)
    back = nearest.to(values.dtype)
    towards = torch.where(values > back, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.to(values.dtype) - back).abs()
    odds = (values - back).abs() / gap
    take = (torch.rand_like(values) < odds) & other.isfinite()
    return torch.where(take, other, nearest)
