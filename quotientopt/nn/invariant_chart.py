"""The affine chart of the factor quotient: coordinates of a pair modulo its group.

In reading order: the chart modulo GL(r), r(n + m − r) numbers; the chart of rotary heads, of
r(n + m − 1); `ChartLinear`, an affine map whose matrix is held in a chart.

Where an r×r block B_p of the right factor is invertible, every orbit of GL(r) has exactly one
representative with ``B_p = c I``: the group element is ``g = c B_p^{-1}``, and ``(g^{-T} A, g B)``
is

    A' = B_pᵀ A / c,    B' = c [I, F] with F = B_p^{-1} B_rest,

up to the order of the columns. The n r numbers of A' and the (m − r) r of c F are coordinates. The
chart is not global: it does not reach the orbits on which B_p is singular.

Modulo the commutant (C*)^{r/2} of rotary positions each plane is a pair of complex rows a, b that
the group turns into a / ḡ, g b. Where the entry b_p does not vanish, ``g = c / b_p`` makes it c:

    a' = a b̄_p / c,    b' = c b / b_p.

The other entries of b' and all of a' are coordinates.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import compute_dtype, locate_first, wide
from quotientopt.groups import RotaryCommutant
from quotientopt.sections import section


class Chart(NamedTuple):
    """Coordinates of a factor pair, and the chart they belong to.

    Attributes
    ----------
    left : Tensor
        A', shape ``(*batch, r, n)``.
    free : Tensor
        c F, shape ``(*batch, r, m − r)``; for rotary planes ``(*batch, r, m − 1)``.
    columns : Tensor
        The columns of B, ``(*batch, m)``: the r columns that are c I, then those of c F. For rotary
        planes ``(*batch, r/2, m)``: of each plane the entry that is c, then the others.
    scale : Tensor
        c, shape ``(*batch,)``.
    """

    left: Tensor
    free: Tensor
    columns: Tensor
    scale: Tensor


def pivot_columns(B: Tensor) -> Tensor:
    """Columns of B that depend least on each other, by QR with column pivoting, ascending.

    Of columns whose remainders agree in length to the root of the precision the first is taken.
    Where the rows of B are orthonormal the choice depends on their span alone.

    Parameters
    ----------
    B : Tensor
        Shape ``(*batch, r, m)``, of full row rank.

    Returns
    -------
    Tensor
        Shape ``(*batch, r)``, int64.
    """
    rest = wide(B)
    slack = 1 - torch.finfo(rest.dtype).eps ** 0.5
    pivots = []
    for _ in range(B.shape[-2]):
        lengths = torch.linalg.vector_norm(rest, dim=-2)
        longest = lengths >= slack * lengths.amax(dim=-1, keepdim=True)
        place = longest.to(torch.uint8).argmax(dim=-1, keepdim=True)
        column = rest.gather(-1, place.unsqueeze(-1).expand(*rest.shape[:-1], 1))
        length = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        direction = column / torch.where(length > 0, length, 1)
        rest = rest - direction @ (direction.mT @ rest)
        # What rounding leaves of a column that was taken must not be taken again.
        rest = rest.scatter(-1, place.unsqueeze(-1).expand(*rest.shape[:-1], 1), 0)
        pivots.append(place)
    return torch.cat(pivots, dim=-1).sort(dim=-1).values


def complete_columns(pivots: Tensor, m: int) -> Tensor:
    """The pivots, then all other columns in ascending order, ``(*batch, r) -> (*batch, m)``."""
    taken = torch.zeros(*pivots.shape[:-1], m, dtype=torch.uint8, device=pivots.device)
    others = taken.scatter(-1, pivots, 1).argsort(dim=-1, stable=True)
    return torch.cat((pivots, others[..., : m - pivots.shape[-1]]), dim=-1)


def to_chart(
    A: Tensor,
    B: Tensor,
    pivots: Tensor | None = None,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    name: str = "pair",
) -> Chart:
    """Coordinates of the pair (A, B), in the widest precision.

    They depend on the orbit of the pair alone, the choice of pivots and scale included.

    Parameters
    ----------
    A, B : Tensor
        Shapes ``(*batch, r, n)`` and ``(*batch, r, m)``.
    pivots : Tensor, optional
        Columns of B, ``(*batch, r)``, integers. Default: :func:`pivot_columns` of an orthonormal
        basis of the rows of B.
    scale : float, optional
        c. Default: the power of two that brings the root mean square entries of A' and B' nearest
        to each other, one for each head.
    dtype : torch.dtype, optional
        What the coordinates will be stored in; decides which blocks count as singular. Default:
        that of B.
    name : str
        What the pair is called in messages.

    Raises
    ------
    ValueError
        If B is rank-deficient or not finite, if the pivots are no r different columns of B, or if
        the block they choose is singular to working precision.

    Warns
    -----
    UserWarning
        If the condition number of the chart (see :func:`condition`) exceeds ε^{-1/2}.
    """
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}")
    rank, m = B.shape[-2:]
    (_, orthonormal), _ = section("triangular", wide(A), wide(B))
    if pivots is None:
        pivots = pivot_columns(orthonormal)
    else:
        check_integers(pivots, (*B.shape[:-2], rank), m, name)
        pivots = pivots.to(device=B.device, dtype=torch.int64).sort(dim=-1).values
        if bool((pivots[..., 1:] == pivots[..., :-1]).any()):
            raise ValueError(f"columns of {name!r} must be {rank} different ones")
    columns = complete_columns(pivots, m)
    ordered = _take(orthonormal, columns)
    smallest = torch.linalg.svdvals(ordered[..., :rank])[..., -1]
    judge(smallest, B.dtype if dtype is None else dtype, name, floor=rank)
    F = torch.linalg.solve(ordered[..., :rank], ordered[..., rank:])
    left = _take(wide(B), pivots).mT @ wide(A)
    c = balancing_scale(left, F, rank, m)
    if scale is not None:
        c = torch.full_like(c, scale)
    return Chart(left / c[..., None, None], c[..., None, None] * F, columns, c)


def assemble(free: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """The right factor B' of a chart, ``(*batch, r, m)``; differentiable in `free`.

    Parameters
    ----------
    free, columns, scale : Tensor
        As of :class:`Chart`.
    """
    rank, c = free.shape[-2], scale[..., None, None].to(free.dtype)
    if _is_rotary(free, columns):
        ones = torch.ones(rank // 2, 1, dtype=free.dtype, device=free.device)
        fixed, places = torch.cat((ones, 0 * ones)), torch.cat((columns, columns), dim=-2)
    else:
        fixed = torch.eye(rank, dtype=free.dtype, device=free.device)
        places = columns.unsqueeze(-2).expand(*free.shape[:-1], -1)
    rows = torch.cat((c * fixed, free), dim=-1)
    return torch.zeros_like(rows).scatter(-1, places, rows)


def condition(free: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """``‖[I, F]‖₂ = 1 / σ_min`` of the chosen block of an orthonormal basis, ``(*batch,)``.

    One where F vanishes, infinite on the boundary of the chart. For rotary planes the largest
    ``‖b‖ / |b_p|`` of a complex row and its chosen entry.
    """
    F = wide(free) / wide(scale)[..., None, None]
    if _is_rotary(free, columns):
        squares = F.square().sum(dim=-1).unflatten(-1, (2, -1)).sum(dim=-2)
        return squares.amax(dim=-1).add(1).sqrt()
    if F.shape[-1] == 0:
        return F.new_ones(F.shape[:-2])
    return torch.linalg.matrix_norm(F, 2).square().add(1).sqrt()


def balancing_scale(left: Tensor, F: Tensor, ones: int, m: int) -> Tensor:
    """The power of two by which the root mean squares of A' / c and c B' are nearest.

    Parameters
    ----------
    left : Tensor
        A' for c = 1, ``(*batch, r, n)``.
    F : Tensor
        The free entries of B' for c = 1.
    ones, m : int
        Number of entries of B' that are one, and of its columns.
    """
    squares = left.square().mean(dim=(-2, -1))
    other = (ones + F.square().sum(dim=(-2, -1))) / (F.shape[-2] * m)
    # A power of two is exact in every dtype.
    return torch.where(squares > 0, squares / other, 1).log2().div(4).round().exp2()


def check_integers(columns: Tensor, shape: tuple[int, ...], m: int, name: str) -> None:
    """Refuse columns that are no integers of that shape from 0 to m − 1."""
    if not isinstance(columns, Tensor) or columns.is_floating_point() or columns.is_complex():
        raise TypeError(f"columns of {name!r} must be a tensor of integers")
    if tuple(columns.shape) != shape:
        raise ValueError(f"columns of {name!r} must have shape {shape}, got {tuple(columns.shape)}")
    if bool((columns < 0).any() or (columns >= m).any()):
        raise ValueError(f"columns of {name!r} must be from 0 to {m - 1}")


def judge(smallest: Tensor, dtype: torch.dtype, name: str, floor: int = 1) -> None:
    """Refuse or warn of chosen blocks of orthonormal rows by their smallest singular values.

    Parameters
    ----------
    smallest : Tensor
        Shape ``(*batch,)``.
    dtype : torch.dtype
        What coordinates are stored in.
    name : str
    floor : int
        Multiple of the precision that counts as zero.

    Raises
    ------
    ValueError
        If one is zero to working precision.

    Warns
    -----
    UserWarning
        If one is below its root.
    """
    precision = torch.finfo(compute_dtype(dtype)).eps
    failed = smallest <= floor * precision
    if bool(failed.any()):
        raise ValueError(
            f"the chosen columns of {name!r} are linearly dependent{locate_first(failed)}: they "
            "make no chart there; leave columns out, and the best conditioned ones are taken"
        )
    largest = 1 / smallest.min().item()
    if largest > precision**-0.5:
        warnings.warn(
            f"the chart of {name!r} is badly conditioned: {largest:.0e}, by which rounding errors "
            "grow; leave columns out, and the best conditioned ones are taken",
            UserWarning,
            stacklevel=6,
        )


def _is_rotary(free: Tensor, columns: Tensor) -> bool:
    return columns.ndim == free.ndim


def _take(B: Tensor, columns: Tensor) -> Tensor:
    return B.gather(-1, columns.unsqueeze(-2).expand(*B.shape[:-1], columns.shape[-1]))


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


class ChartLinear(nn.Module):
    """An affine map onto the rows of all heads whose matrix is held in the affine chart.

    The matrix of a head, its bias as the last column where there is one, is c [I, F] with the
    columns permuted; for rotary heads that holds plane by plane. It is put together in
    :meth:`factor` at every call, a copy of the size of the weights; activations are not gathered.

    Parameters
    ----------
    in_features, heads, rank : int
    bias, rotary : bool
    device, dtype
        As for ``nn.Linear``.

    Attributes
    ----------
    free : Parameter
        c F, shape ``(heads, rank, in_features + bias − rank)``, rotary − 1 in place of − rank.
    columns : Tensor
        Buffer of int64, ``(heads, in_features + bias)``, rotary ``(heads, rank / 2, …)``; see
        :class:`~quotientopt.nn.invariant_chart.Chart`.
    scale : Tensor
        Buffer, c, shape ``(heads,)``.
    """

    free: Tensor
    columns: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        heads: int,
        rank: int,
        bias: bool,
        *,
        rotary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = heads * rank
        width = in_features + bias
        fixed = 1 if rotary else rank
        free = torch.zeros(heads, rank, width - fixed, device=device, dtype=dtype)
        self.free = nn.Parameter(free)
        batch = (heads, rank // 2) if rotary else (heads,)
        columns = torch.arange(width, device=device).expand(*batch, width).clone()
        self.register_buffer("columns", columns)
        self.register_buffer("scale", torch.ones(heads, device=device, dtype=dtype))

    def factor(self) -> Tensor:
        """The matrices of all heads, ``(heads, rank, in_features + bias)``."""
        return assemble(self.free, self.columns, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b`` on the last axis."""
        matrix = self.factor().flatten(0, 1)
        if matrix.shape[-1] == self.in_features:
            return functional.linear(x, matrix)
        return functional.linear(x, matrix[:, :-1], matrix[:, -1])

    def extra_repr(self) -> str:
        heads, rank, _ = self.free.shape
        bias = self.columns.shape[-1] > self.in_features
        return f"in_features={self.in_features}, heads={heads}, rank={rank}, bias={bias}"
