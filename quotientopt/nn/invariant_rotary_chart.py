"""The affine chart of rotary heads: r(n + m − 1) numbers for a pair modulo (C*)^{r/2}.

Each plane is a pair of complex rows a, b that the group turns into a / ḡ, g b. Where the entry b_p
does not vanish, ``g = c / b_p`` makes it c:

    a' = a b̄_p / c,    b' = c b / b_p.

The other entries of b' and all of a' are coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt._linalg import locate_first, wide
from quotientopt.groups import RotaryCommutant
from quotientopt.nn.invariant_chart import (
    Chart,
    balancing_scale,
    check_integers,
    complete_columns,
    judge,
)


def to_rotary_chart(
    A: Tensor,
    B: Tensor,
    pivots: Tensor | None = None,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    name: str = "pair",
) -> Chart:
    """Coordinates of the pair (A, B) of rotary heads, rows j and j + r/2 making a plane.

    Parameters
    ----------
    A, B : Tensor
        Shapes ``(*batch, r, n)`` and ``(*batch, r, m)``.
    pivots : Tensor, optional
        An entry of each complex row of B, ``(*batch, r/2)``, integers. Default: that of largest
        modulus; of several that agree to the root of the precision the first.
    scale, dtype, name
        As for :func:`~quotientopt.nn.invariant_chart.to_chart`, errors and warnings too.
    """
    rank, m = B.shape[-2:]
    group = RotaryCommutant(rank)
    a, b = (group.complex_rows(wide(X)) for X in (A, B))
    modulus, length = b.abs(), torch.linalg.vector_norm(b, dim=-1)
    failed = ~(length.isfinite() & (length > 0)).all(dim=-1)
    if bool(failed.any()):
        raise ValueError(
            f"right factor B has a vanishing or non-finite rotary plane{locate_first(failed)}"
        )
    if pivots is None:
        slack = 1 - torch.finfo(modulus.dtype).eps ** 0.5
        largest = modulus >= slack * modulus.amax(dim=-1, keepdim=True)
        pivots = largest.to(torch.uint8).argmax(dim=-1)
    else:
        check_integers(pivots, (*B.shape[:-2], rank // 2), m, name)
        pivots = pivots.to(device=B.device, dtype=torch.int64)
    columns = complete_columns(pivots.unsqueeze(-1), m)
    ordered = b.gather(-1, columns)
    entry = ordered[..., :1]
    smallest = (entry.abs().squeeze(-1) / length).amin(dim=-1)
    judge(smallest, B.dtype if dtype is None else dtype, name)
    left, F = _real(a * entry.conj()), _real(ordered[..., 1:] / entry)
    c = balancing_scale(left, F, rank // 2, m)
    if scale is not None:
        c = torch.full_like(c, scale)
    return Chart(left / c[..., None, None], c[..., None, None] * F, columns, c)


def _real(planes: Tensor) -> Tensor:
    return torch.cat((planes.real, planes.imag), dim=-2)
