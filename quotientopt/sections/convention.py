"""What an SVD leaves open, fixed: signs, phases, bases of equal singular values, ranks that lack.

The rows of the right factor in the SVD section are right singular vectors of AᵀB up to scale. A
simple one is known up to its sign, those of k equal singular values up to O(k). Both are fixed by
one rule, a QR decomposition with column pivoting: among the columns of the k×m block the longest is
turned to the first axis, positively; among what remains of the others the longest to the second;
and so on. It reads the span alone, so that every representative of an orbit ends at the same rows.
For k = 1 it makes the entry of largest modulus positive.

Then pairs in which a factor, or the product ``Aᵀ B``, lacks full rank. Think of the columns of B as
vectors of V = R^r and of those of A as linear forms on it: B has the image im B, A the common
kernel V₀ of its forms. Where ``Aᵀ B`` has rank ρ, V splits into

- ρ directions of im B that A sees, in which both become ``Σ^{1/2}`` times singular vectors;
- ``b − ρ`` directions of im B ∩ V₀, which A does not see;
- ``a − ρ`` directions that A sees and B does not reach;
- the rest, which neither knows.

Any basis of V adapted to this is a group element. The first is made by the SVD as at full rank; in
the second and third the row space that is left, orthogonal to the rows above, is invariant, and an
orthonormal basis of it is fixed by pivoting. So every orbit has one representative of this form,
and it is reached by a group element, whatever the ranks: padded heads, pruned channels, outputs
that start at zero. Nothing larger than r×r is decomposed besides two QR decompositions.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import (
    compute_dtype,
    gram,
    locate_first,
    orthogonal_polar_factor,
    row_signs,
    rows_depend,
    wide,
)


class Turn(NamedTuple):
    """What :func:`turn_of_rows` finds.

    Attributes
    ----------
    element : Tensor
        Orthogonal elements of the group, ``(*batch, r, r)``, which act on both factors alike.
    gap : Tensor
        Smallest difference of neighbouring singular values over the largest, ``(*batch,)``;
        infinite where there are fewer than two.
    """

    element: Tensor
    gap: Tensor


def turn_of_rows(rows: Tensor, values: Tensor, stored: torch.dtype, *, equal: bool = True) -> Turn:
    """Signs, and rotations among rows whose singular values coincide.

    Parameters
    ----------
    rows : Tensor
        Shape ``(*batch, r, m)``, orthogonal to each other.
    values : Tensor
        Their singular values in decreasing order, ``(*batch, r)``.
    stored : torch.dtype
        Dtype of the parameters, which decides what :func:`clusters` counts as equal.
    equal : bool
        Whether to look for equal singular values, which waits for the device; otherwise signs are
        fixed alone.
    """
    if values.shape[-1] == 0:
        return Turn(torch.diag_embed(values), smallest_gap(values))
    element = torch.diag_embed(row_signs(rows).squeeze(-1))
    gap = smallest_gap(values)
    if not equal:
        return Turn(element, gap)
    flat, size = element.reshape(-1, *element.shape[-2:]), values.shape[-1]
    rows = rows.reshape(-1, *rows.shape[-2:])
    for (start, stop), found in clusters(values.reshape(-1, size), stored).items():
        index = torch.tensor(found, device=rows.device)
        flat[index, start:stop, start:stop] = pivoted_rotation(rows[index, start:stop])
    return Turn(flat.reshape(element.shape), gap)


def smallest_gap(values: Tensor) -> Tensor:
    """Smallest difference of neighbours over the largest, ``(*batch, r) -> (*batch,)``.

    Infinite for fewer than two values; zero where all vanish.
    """
    differences = (values[..., :-1] - values[..., 1:]).abs()
    relative = differences / torch.where(values[..., :1] > 0, values[..., :1], 1)
    return torch.nn.functional.pad(relative, (0, 1), value=torch.inf).amin(dim=-1)


def gap_of_present(values: Tensor) -> Tensor:
    """:func:`smallest_gap` among those that do not vanish; rows of zeros have no axes to choose."""
    most = torch.where(values[..., :1] > 0, values[..., :1], 1)
    steps = (values[..., :-1] - values[..., 1:]) / most
    steps = torch.where(values[..., 1:] > 0, steps, torch.inf)
    return torch.nn.functional.pad(steps, (0, 1), value=torch.inf).amin(dim=-1)


def clusters(values: Tensor, stored: torch.dtype) -> dict[tuple[int, int], list[int]]:
    """Runs of equal singular values, (first row, end) to the heads that have them.

    Neighbours count as equal if they differ by at most ε^{2/3} of the largest, 3.7e-11 for float64
    and 2.4e-5 for float32 and narrower parameters: rounding in a gauge of condition number κ moves
    singular values by κε, so that equal ones are recognised up to κ = ε^{-1/3}.

    Parameters
    ----------
    values : Tensor
        In decreasing order, ``(heads, r)``.
    stored : torch.dtype
        See :func:`turn_of_rows`.
    """
    tolerance = torch.finfo(compute_dtype(stored)).eps ** (2 / 3)
    equal = values[:, :-1] - values[:, 1:] <= tolerance * values[:, :1]
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for head in equal.any(dim=1).nonzero().flatten().tolist():
        flags = equal[head].tolist()
        start = 0
        while start < len(flags):
            stop = start
            while stop < len(flags) and flags[stop]:
                stop += 1
            if stop > start:
                found[start, stop + 1].append(head)
            start = stop + 1
    return found


def pivoted_rotation(rows: Tensor) -> Tensor:
    """The rotation Q that makes the QR decomposition with column pivoting of `rows` triangular.

    Batched: ``(*batch, k, m) -> (*batch, k, k)``, Q applied from the left. Diagonal entries are
    positive; of columns whose lengths agree to the root of the precision the first is taken.
    """
    slack = 1 - torch.finfo(rows.dtype).eps ** 0.5
    rest, directions = wide(rows), []
    for _ in range(rows.shape[-2]):
        lengths = torch.linalg.vector_norm(rest, dim=-2)
        longest = lengths >= slack * lengths.amax(dim=-1, keepdim=True)
        place = longest.to(torch.uint8).argmax(dim=-1)[..., None, None]
        column = rest.gather(-1, place.expand(*rest.shape[:-1], 1))
        length = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        direction = column / torch.where(length > 0, length, 1)
        rest = rest - direction @ (direction.mT @ rest)
        directions.append(direction)
    # Gram–Schmidt loses orthogonality where columns nearly depend; dependent ones are completed.
    return orthogonal_polar_factor(torch.cat(directions, dim=-1).mT)


def check_gap_options(kind: str, return_gap: bool, warn_below: float | None) -> None:
    """Refuse what only the section ``"svd"`` has: a gap between singular values."""
    if kind != "svd" and (return_gap or warn_below is not None):
        raise ValueError(
            f"the section {kind!r} has no spectral gap: return_gap and warn_below are for 'svd'"
        )


def warn_of_gap(gap: Tensor, warn_below: float | None) -> None:
    """Warn if a gap is not above `warn_below`; waits for the device if there is one."""
    if warn_below is None:
        return
    small = gap <= warn_below
    if bool(small.any()):
        warnings.warn(
            f"relative gap of singular values {gap.min().item():.1e}{locate_first(small)}, not "
            f"above {warn_below:.1e}: axes are determined to the precision of the input over it",
            stacklevel=4,
        )


# ---- deficient rank ------------------------------------------------------------------------------


_SUSPECT = 1e-5
"""Relative size of a singular value, or distance of a row from the others, worth a closer look."""


class Ranks(NamedTuple):
    """Ranks of A, of B and of ``Aᵀ B``."""

    left: int
    right: int
    product: int


def rank_tolerance(stored: torch.dtype) -> float:
    """What counts as zero, relative to the largest: rounding of the entries and of the QR."""
    return max(64 * torch.finfo(torch.float64).eps, 4 * torch.finfo(compute_dtype(stored)).eps)


@torch.no_grad()
def deficient_ranks(A: Tensor, B: Tensor, stored: torch.dtype) -> dict[Ranks, list[int]]:
    """Ranks of the pairs that lack full rank somewhere, with their places in the batch.

    Gram matrices tell which pairs cannot: only the others are looked at closely. Those of full rank
    whose Gram matrices, of the squared condition number, do not show it are among them.

    Parameters
    ----------
    A, B : Tensor, shapes (heads, r, n) and (heads, r, m)
    stored : torch.dtype
        Precision of their entries.
    """
    roots, suspect = [], torch.zeros(len(A), dtype=torch.bool, device=A.device)
    beyond = torch.zeros_like(suspect)
    for X in (A, B):
        S = gram(X)
        L, info = torch.linalg.cholesky_ex(S, check_errors=False)
        lengths = S.diagonal(dim1=-2, dim2=-1)
        short = L.diagonal(dim1=-2, dim2=-1).square() <= _SUSPECT**2 * lengths
        suspect |= (info > 0) | short.any(dim=-1)
        beyond |= (info > 0) | rows_depend(L, S, 0.0)
        roots.append(torch.where((info > 0)[:, None, None], 0, L))
    values = torch.linalg.svdvals(roots[0].mT @ roots[1])
    suspect |= values[:, -1] <= _SUSPECT * values[:, 0]
    found: dict[Ranks, list[int]] = defaultdict(list)
    places = suspect.nonzero().squeeze(-1)
    if not len(places):
        return found
    left, right = _roots(A[places]), _roots(B[places])
    one, two = (torch.linalg.svdvals(L) for L in (left, right))
    product = torch.linalg.svdvals(left.mT @ right)
    size = A.shape[-2]
    tolerance = rank_tolerance(stored)
    counts = [
        (values > tolerance * most).sum(dim=-1).tolist()
        for values, most in (
            (one, one[:, :1]),
            (two, two[:, :1]),
            (product, one[:, :1] * two[:, :1]),
        )
    ]
    for place, a, b, rho in zip(places.tolist(), *counts, strict=True):
        ranks = Ranks(a, b, min(a, b, max(rho, a + b - size)))
        if ranks.product < size or bool(beyond[place]):
            found[ranks].append(place)
    return found


@torch.no_grad()
def _element(A: Tensor, B: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """``(g, g^{-T})`` of pairs of these ranks, up to rotations within the blocks of rows."""
    a, b, rho = ranks
    left, right = _roots(A), _roots(B)
    P, values, Rt = torch.linalg.svd(left.mT @ right)
    P, R = P[..., :rho], Rt.mT[..., :rho]
    scale = values[..., None, :rho].rsqrt()
    seen, forms = right @ R * scale, left @ P * scale
    unseen = _image(right - (right @ R) @ R.mT, b - rho)
    unreached = _image(left - (left @ P) @ P.mT, a - rho)
    known = torch.cat((forms, unreached), dim=-1)
    # Vectors on which the forms of A take the values of the unit matrix, and their common kernel.
    Q, upper = torch.linalg.qr(known, mode="complete")
    identity = torch.eye(a, dtype=A.dtype, device=A.device).expand(len(A), a, a)
    dual = torch.linalg.solve_triangular(upper[..., :a, :].mT, identity, upper=False)
    reached = Q[..., :a] @ dual[..., rho:]
    kernel = Q[..., a:]
    inside, _ = torch.linalg.qr(kernel.mT @ unseen, mode="complete")
    rest = kernel @ inside[..., b - rho :]
    basis = torch.cat((seen, unseen, reached, rest), dim=-1)
    return torch.linalg.inv(basis), basis.mT


def dress_deficient(
    A: Tensor, B: Tensor, ranks: Ranks, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pairs of these ranks in the SVD section: A, B, ``g``, ``g^{-T}`` and the gap.

    The element is a constant for autograd.

    Parameters
    ----------
    A, B : Tensor, shapes (heads, r, n) and (heads, r, m)
    ranks : Ranks
    stored : torch.dtype
        Precision of their entries.
    """
    A, B = wide(A), wide(B)
    a, b, rho = ranks
    g, contragredient = _element(A.detach(), B.detach(), ranks)
    # Once more from a pair that is well conditioned.
    again = _element(contragredient @ A.detach(), g @ B.detach(), ranks)
    g, contragredient = again[0] @ g, again[1] @ contragredient
    dressed_A, dressed_B = (contragredient @ A).detach(), (g @ B).detach()
    turn = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device).repeat(len(A), 1, 1)
    values = dressed_B[:, :rho].square().sum(dim=-1)
    if rho:
        turn[:, :rho, :rho] = turn_of_rows(dressed_B[:, :rho], values, stored).element
    if b > rho:
        turn[:, rho:b, rho:b] = pivoted_rotation(dressed_B[:, rho:b])
    if a > rho:
        block = slice(b, b + a - rho)
        turn[:, block, block] = pivoted_rotation(dressed_A[:, block])
    g, contragredient = turn @ g, turn @ contragredient
    rows = torch.arange(A.shape[-2], device=A.device).unsqueeze(-1)
    in_A = (rows < rho) | ((rows >= b) & (rows < b + a - rho))
    dressed = torch.where(in_A, contragredient @ A, 0), torch.where(rows < b, g @ B, 0)
    padded = torch.nn.functional.pad(values, (0, A.shape[-2] - rho))
    return *dressed, g, contragredient, gap_of_present(padded)


def _roots(X: Tensor) -> Tensor:
    """L with ``X = L Q``, ``(*batch, r, min(r, n))``."""
    return torch.linalg.qr(wide(X).mT, mode="r").R.mT


def _image(matrix: Tensor, rank: int) -> Tensor:
    """Columns ``U s`` for the largest singular values: the matrix without its row basis."""
    U, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * values[..., None, :rank]
