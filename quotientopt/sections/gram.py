"""Dressing fields of token matrices X ∈ R^{N×d} under O(d) or a stabiliser, by ``X ↦ X gᵀ``.

All return the representative and an orthogonal matrix g that leads to it. With fewer tokens than
dimensions, or of deficient rank, X has a stabiliser of its own, the orthogonal group of what its
rows do not span: the representative is as canonical as ever, and g one of those that lead to it.
Under the stabiliser of the all-ones vector only the part of the rows orthogonal to 1 moves; it is
dressed in the coordinates of :meth:`quotientopt.groups.StabilizerOfOnes.moving_part`. Factor pairs
under O(r), ``(A, B) ↦ (g A, g B)``, are token matrices ``[A B]ᵀ`` (:func:`orthogonal_section`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quotientopt._linalg import (
    check_finite,
    check_floating,
    compute_dtype,
    locate_first,
    orthogonal_polar_factor,
    wide,
)
from quotientopt.groups import O
from quotientopt.sections.causal import causal_lq, differentiable_lq
from quotientopt.sections.convention import (
    check_gap_options,
    gap_of_present,
    turn_of_rows,
    warn_of_gap,
)
from quotientopt.sections.derivatives import default_tolerance, principal_axes, symmetric_root
from quotientopt.sections.factor import check_factors


class DressedMatrix(NamedTuple):
    """A matrix in axes of its own, ``X gᵀ``.

    Attributes
    ----------
    matrix : Tensor, shape (*batch, N, m)
    element : Tensor, shape (*batch, m, m)
        g, orthogonal.
    gap : Tensor, shape (*batch)
        How well the axes are determined, see :class:`quotientopt.nn.tokens.DressedTokens`.
    """

    matrix: Tensor
    element: Tensor
    gap: Tensor


def gram_svd(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Principal axes: ``X V = U Σ`` with the right singular vectors V of X, ``g = Vᵀ``.

    Columns come in decreasing length; in each the entry of largest modulus is positive (of several
    equal ones the first). Columns of equal length are turned among themselves by the same rule, a
    QR decomposition with pivoting (:mod:`quotientopt.sections.convention`), so that the
    representative is the same for every point of an orbit. Any N, d and rank: columns past the rank
    are zero.

    Residual group: none.

    Differentiable by autograd, twice and more. The axes turn at a rate of one over the gaps between
    singular values: below a relative gap of √ε (1.5e-8 for float64, 3.5e-4 otherwise) they are held
    still in the derivative, so that it stays finite, and exact for functions that do not depend on
    the choice of axes among equal singular values. With N < d, g is a constant.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
        Token matrix.
    stabilizer : O or StabilizerOfOnes, optional
        The group; O(d) by default.
    check : bool
        Whether to look for non-finite entries and for equal singular values, which waits for the
        device. Without it columns of equal length stay as the decomposition happens to give them.

    Returns
    -------
    representative : Tensor, shape (*batch, N, d)
    g : Tensor, shape (*batch, d, d)
        In at least float32.

    Raises
    ------
    ValueError
        If X is not finite.
    TypeError
        If the dtype is not floating-point.
    """
    return gram_section("svd", X, stabilizer=stabilizer, check=check)


def gram_polar(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """The representative whose leading square block is symmetric positive definite.

    The first d rows have the polar decomposition ``X₁ = (X₁ X₁ᵀ)^{1/2} g``, and the representative
    is ``X gᵀ``: smooth wherever these rows are linearly independent, whatever the singular values.
    With N < d it is ``[(X Xᵀ)^{1/2}, 0]``, and g a constant for autograd. Under the stabiliser of 1
    it is the first d − 1 rows of the moving part.

    Residual group: none. Not global: the first min(N, d) rows must be independent. Differentiable
    by autograd to any order wherever it is defined.

    Parameters, returns and errors as for :func:`gram_svd`; ``ValueError`` also if the leading block
    is singular to working precision.
    """
    return gram_section("polar", X, stabilizer=stabilizer, check=check)


def gram_triangular(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """L of ``X = L Q``, lower triangular with positive diagonal, ``g = Q``: the causal section.

    Row i depends on the tokens up to i alone, to the last bit; see
    :mod:`quotientopt.sections.causal`. Any N, d and rank.

    Residual group: none. Differentiable to any order where the leading rows are independent.
    Parameters, returns and errors as for :func:`gram_svd`.
    """
    return gram_section("triangular", X, stabilizer=stabilizer, check=check)


def gram_section(
    kind: str,
    X: Tensor,
    *,
    stabilizer: O | None = None,
    check: bool = True,
    return_gap: bool = False,
    warn_below: float | None = None,
) -> Any:
    """Representative and element of the section `kind`, ``"svd"``, ``"polar"`` or ``"triangular"``.

    Parameters
    ----------
    kind, X, stabilizer, check
        See :func:`gram_svd`.
    return_gap : bool
        For ``"svd"``: return the smallest difference of neighbouring singular values over the
        largest as well, of shape (*batch).
    warn_below : float, optional
        For ``"svd"``: warn where that gap is not above it.

    Raises
    ------
    ValueError
        If `kind` is unknown, or for the reasons of :func:`gram_svd` and :func:`gram_polar`.
    """
    if kind not in _SECTIONS:
        raise ValueError(f"section must be one of {tuple(_SECTIONS)}, got {kind!r}")
    check_gap_options(kind, return_gap, warn_below)
    check_floating("X", X)
    if X.ndim < 2 or 0 in X.shape[-2:]:
        raise ValueError(
            f"X must have shape (*batch, N, d) with N and d at least 1, got {tuple(X.shape)}"
        )
    group = O(X.shape[-1]) if stabilizer is None else stabilizer
    if group.r != X.shape[-1]:
        raise ValueError(f"{group!r} does not act on X of shape {tuple(X.shape)}")
    if check:
        check_finite("token matrix X", X)
    found = dress_matrix(kind, group.moving_part(wide(X)), X.dtype, check=check)
    warn_of_gap(found.gap, warn_below)
    matrix = found.matrix
    if matrix.shape[-1] < X.shape[-1]:
        fixed = wide(X) - group.from_moving_part(group.moving_part(wide(X)))
        matrix = fixed + group.from_moving_part(matrix)
    dtype = compute_dtype(X.dtype)
    result = matrix.to(X.dtype), group.element_of_moving(found.element).to(dtype)
    return (*result, found.gap.to(dtype)) if return_gap else result


def dress_matrix(
    kind: str, X: Tensor, stored: torch.dtype, *, tolerance: float | None = None, check: bool = True
) -> DressedMatrix:
    """A section of X under all of O(m), with its gap.

    Parameters
    ----------
    kind : {"svd", "polar", "triangular"}
    X : Tensor, shape (*batch, N, m)
        In the widest precision.
    stored : torch.dtype
        Precision of its entries, which decides what counts as zero and as equal.
    tolerance : float, optional
        Relative gap below which derivatives of ``"svd"`` are regularised.
    check : bool
        As for :func:`gram_svd`.
    """
    return _SECTIONS[kind](X, stored, tolerance, check)


def _svd(X: Tensor, stored: torch.dtype, tolerance: float | None, check: bool) -> DressedMatrix:
    """``U Σ``, from decompositions of the size of the smaller side."""
    tolerance = default_tolerance(stored) if tolerance is None else tolerance
    floor = max(X.shape[-2:]) * torch.finfo(compute_dtype(stored)).eps
    tall = X.shape[-2] >= X.shape[-1]
    Y = X if tall else X.mT
    with torch.no_grad():
        # A QR decomposition does not square the condition number, as the Gram matrix would.
        Q, R = torch.linalg.qr(Y.detach(), mode="r" if tall else "complete")
        small = R[..., : Y.shape[-1], :]
        left, values, Wt = torch.linalg.svd(small)
        present = values > floor * values[..., :1]
    S = Y.mT @ Y
    _, W = principal_axes(S, torch.where(present, values, 0), Wt.mT, tolerance)
    if tall:
        dressed, element = X @ W, W.mT
    else:
        # Σ as a function of X: where axes are held still it does not stay diagonal.
        middle = W.mT @ S @ W
        tiny = torch.where(values[..., :1] > 0, floor * values[..., :1], 1)
        roots = torch.where(present, values, tiny)
        identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
        dressed = W @ symmetric_root((middle + middle.mT) / 2, roots, identity)
        size = values.shape[-1]
        element = torch.cat((Q[..., :size] @ left, Q[..., size:]), dim=-1).mT
    shown = torch.where(present, values, 0)
    turn, _ = turn_of_rows(dressed.detach().mT, shown, stored, equal=check)
    dressed = torch.where(present.unsqueeze(-2), dressed @ turn.mT, 0)
    rows = values.shape[-1]
    element = torch.cat((turn @ element[..., :rows, :], element[..., rows:, :]), dim=-2)
    return DressedMatrix(_padded(dressed, X.shape[-1]), element, gap_of_present(shown))


def _polar(X: Tensor, stored: torch.dtype, tolerance: float | None, check: bool) -> DressedMatrix:
    """``X gᵀ`` with the polar factor g of the leading block, and its smallest singular value."""
    floor = max(X.shape[-2:]) * torch.finfo(compute_dtype(stored)).eps
    size = min(X.shape[-2:])
    leading = X[..., :size, :]
    broad = X.shape[-2] < X.shape[-1]
    with torch.no_grad():
        if broad:
            Q, R = torch.linalg.qr(X.detach().mT, mode="complete")
            left, values, Wt = torch.linalg.svd(R[..., :size, :])
        else:
            values = torch.linalg.svdvals(leading.detach())
    least, most = values[..., -1], values[..., 0]
    if check and bool((least <= floor * most).any()):
        raise ValueError(
            f"the leading {size} tokens of X are linearly dependent"
            f"{locate_first(least <= floor * most)}: the polar section is undefined, use 'svd'"
        )
    gap = least / torch.where(most > 0, most, 1)
    if broad:
        root = symmetric_root(X @ X.mT, values, Wt.mT)
        rows = (Q[..., :size] @ left @ Wt).mT
        element = torch.cat((rows, Q[..., size:].mT), dim=-2)
        return DressedMatrix(_padded(root, X.shape[-1]), element, gap)
    element = orthogonal_polar_factor(leading)
    return DressedMatrix(X @ element.mT, element, gap)


def _triangular(
    X: Tensor, stored: torch.dtype, tolerance: float | None, check: bool
) -> DressedMatrix:
    """L of ``X = L Q`` and the smallest relative distance from the span of earlier tokens."""
    with torch.no_grad():
        found = causal_lq(X.detach(), floor=dependence(X.shape[-1], stored), stop_early=check)
    matrix, element = differentiable_lq(X, found)
    return DressedMatrix(matrix, element, found.distance.amin(dim=-1))


_SECTIONS = {"svd": _svd, "polar": _polar, "triangular": _triangular}


def dependence(width: int, stored: torch.dtype) -> float:
    """Relative distance from a span at which a token counts as lying in it."""
    return 4 * width * torch.finfo(compute_dtype(stored)).eps


def _padded(matrix: Tensor, width: int) -> Tensor:
    """With columns of zeros up to `width`."""
    return functional.pad(matrix, (0, width - matrix.shape[-1]))


def orthogonal_section(
    kind: str,
    A: Tensor,
    B: Tensor,
    *,
    check: bool = True,
    return_gap: bool = False,
    warn_below: float | None = None,
) -> Any:
    """Canonical representative of (A, B) under O(r), and the element that leads to it.

    Both factors turn alike, so the pair is the token matrix ``X = [A B]ᵀ``. ``"svd"`` makes the
    rows of [A B] orthogonal, in decreasing length, the entry of largest modulus of each positive
    (:func:`~quotientopt.sections.gram_svd`); ``"polar"`` makes its leading r×r block symmetric
    positive definite (:func:`~quotientopt.sections.gram_polar`).

    Parameters
    ----------
    kind : {"svd", "polar", "triangular"}
    A, B, check, return_gap, warn_below
        As for :func:`quotientopt.sections.section`; for ``"polar"`` the leading block has full
        rank.

    Returns
    -------
    representative : tuple of Tensor
        ``(g A, g B)`` in the dtypes of A and B.
    g : Tensor, shape (*batch, r, r)
        The group element, in at least float32.

    Raises
    ------
    ValueError, TypeError
        If `kind` is unknown, or for the reasons of the sections of token matrices.
    """
    check_factors(A, B)
    joint = torch.cat((wide(A), wide(B)), dim=-1)
    check_gap_options(kind, return_gap, warn_below)
    if kind not in ("svd", "polar", "triangular"):
        raise ValueError(f"section must be 'svd', 'polar' or 'triangular', got {kind!r}")
    if check:
        check_finite("[A B]", joint)
    stored = torch.promote_types(A.dtype, B.dtype)
    found = dress_matrix(kind, joint.mT, stored, check=check)
    warn_of_gap(found.gap, warn_below)
    dressed_A, dressed_B = found.matrix.mT.split((A.shape[-1], B.shape[-1]), dim=-1)
    dtype = compute_dtype(stored)
    result = (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), found.element.to(dtype)
    return (*result, found.gap.to(dtype)) if return_gap else result
