"""The SVD section where a factor, or the product ``Aᵀ B``, lacks full rank.

Think of the columns of B as vectors of V = R^r and of those of A as linear forms on it: B has the
image im B, A the common kernel V₀ of its forms. Where ``Aᵀ B`` has rank ρ, V splits into

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

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, gram, wide
from quotientopt.sections.convention import gap_of_present, pivoted_rotation, turn_of_rows

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

    Gram matrices tell which pairs cannot: only the others are looked at closely.

    Parameters
    ----------
    A, B : Tensor, shapes (heads, r, n) and (heads, r, m)
    stored : torch.dtype
        Precision of their entries.
    """
    roots, suspect = [], torch.zeros(len(A), dtype=torch.bool, device=A.device)
    for X in (A, B):
        S = gram(X)
        L, info = torch.linalg.cholesky_ex(S, check_errors=False)
        lengths = S.diagonal(dim1=-2, dim2=-1)
        short = L.diagonal(dim1=-2, dim2=-1).square() <= _SUSPECT**2 * lengths
        suspect |= (info > 0) | short.any(dim=-1)
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
        if ranks.product < size:
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
