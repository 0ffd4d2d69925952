"""Dressing fields of factor pairs under GL(r), from r×r Gram matrices alone.

A dressing field sends a point x = (A, B) to a group element u(x) with ``u(g·x) = u(x) g^{-1}``, up
to a residual group that is named with each section; the dressed point ``u(x)·x`` is then invariant
(François & Ravera, arXiv 2602.18948). Here the element is a function of ``S_A = A Aᵀ`` and
``S_B = B Bᵀ`` only: nothing larger than r×r is ever decomposed.

Every function returns ``(g, g_inverse_transpose)``: `g` acts on B and `g_inverse_transpose` on A.
Both come from the same decomposition, so nothing is inverted. Gram matrices are factorised in
float64 (float32 where the device has none) and the elements come back in the dtype of the Gram
matrices, at least float32.

All are differentiable by autograd, twice and more. ``"balanced"``, ``"orthonormal"`` and
``"triangular"`` are smooth wherever the ranks are full. The axes of ``"svd"`` turn at a rate of one
over the gaps between singular values of ``Aᵀ B``: below a relative gap of 1.5e-8 (√ε) they are held
still in the derivative, so that it stays finite, and exact for functions that do not depend on the
choice of axes among equal singular values; see :mod:`quotientopt.sections.derivatives`.

Pairs of deficient rank have a canonical representative too, and a group element that leads to it:
:func:`section` with ``"svd"``, which reads the factors themselves (:mod:`.convention`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quotientopt._linalg import (
    Pair,
    check_batches,
    check_floating,
    check_square,
    cholesky,
    compute_dtype,
    gram,
    locate_first,
    polar_factor_by_inverses,
    wide,
)
from quotientopt.sections.convention import (
    check_gap_options,
    deficient_ranks,
    dress_deficient,
    turn_of_rows,
    warn_of_gap,
)
from quotientopt.sections.derivatives import svd, symmetric_polar, symmetric_root


class _ElementFunction(Protocol):
    def __call__(self, SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair: ...


def _prepare(SA: Tensor, SB: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    check_square("Gram matrix SA", SA)
    check_square("Gram matrix SB", SB, SA.shape[-1])
    check_batches(SA=SA, SB=SB)
    dtype = compute_dtype(torch.promote_types(SA.dtype, SB.dtype))
    return wide(SA), wide(SB), dtype


def _roots(SA: Tensor, SB: Tensor, check: bool) -> Pair:
    LA = cholesky(SA, "left factor A", check=check)
    return LA, cholesky(SB, "right factor B", check=check)


def _svd_pair(SA: Tensor, SB: Tensor, check: bool) -> Pair:
    LA, LB = _roots(SA, SB, check)
    W = LA.mT @ LB
    U, values, V = svd(W)
    # Σ as a function of W: where axes are held still it does not stay diagonal.
    middle = U.mT @ W @ V
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device).expand_as(W)
    root = symmetric_root((middle + middle.mT) / 2, values.sqrt(), identity)
    rows_A, rows_B = root @ U.mT, root @ V.mT
    g = torch.linalg.solve_triangular(LB, rows_B, upper=False, left=False)
    return g, torch.linalg.solve_triangular(LA, rows_A, upper=False, left=False)


def _balancing_factor(SA: Tensor, SB: Tensor, check: bool) -> Tensor:
    """A square F, smooth in the Gram matrices, with ``FᵀF = S_B^{-1} # S_A``."""
    LA, LB = _roots(SA, SB, check)
    W = LA.mT @ LB
    _, values, Vt = torch.linalg.svd(W.detach())
    H = symmetric_root(W.mT @ W, values, Vt.mT)
    half = symmetric_root(H, values.sqrt(), Vt.mT)
    return torch.linalg.solve_triangular(LB, half, upper=False, left=False)


def svd_element(SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair:
    """Element that makes both Gram matrices the singular values of ``Aᵀ B``.

    With ``S_A = L_A L_Aᵀ``, ``S_B = L_B L_Bᵀ`` and ``L_Aᵀ L_B = U Σ Vᵀ`` it is
    ``g = Σ^{1/2} Vᵀ L_B^{-1}``, and ``g^{-T} = Σ^{1/2} Uᵀ L_A^{-1}``. Afterwards
    ``A Aᵀ = B Bᵀ = Σ``, in decreasing order.

    Residual group: signs of the rows, which Gram matrices cannot fix (:func:`section` does), and
    O(k) on every block of k equal singular values.

    Parameters
    ----------
    SA, SB : Tensor, shape (*batch, r, r)
        Gram matrices of the rows of A and of B, both positive definite.
    check : bool
        Whether to look for rank deficiency, which waits for the device. Without the check the
        element of a deficient head is not finite or meaningless.

    Returns
    -------
    g, g_inverse_transpose : Tensor, shape (*batch, r, r)

    Raises
    ------
    ValueError
        If a Gram matrix is singular to working precision or not finite, or shapes do not fit.
    TypeError
        If a dtype is not floating-point.
    """
    SA, SB, dtype = _prepare(SA, SB)
    g, g_inverse_transpose = _svd_pair(SA, SB, check)
    return g.to(dtype), g_inverse_transpose.to(dtype)


def balanced_element(SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair:
    """The symmetric positive definite element that makes both Gram matrices equal.

    Its square is the matrix geometric mean ``S_B^{-1} # S_A``, the only solution of
    ``P S_B P = S_A``. It is the symmetric polar factor of :func:`svd_element`, ``g_svd = Q g``: a
    smooth function of the pair wherever both factors have full rank, coinciding singular values
    included.

    Residual group: O(r). Parameters, returns and errors as for :func:`svd_element`.
    """
    SA, SB, dtype = _prepare(SA, SB)
    g, inverse = symmetric_polar(_balancing_factor(SA, SB, check))
    return g.to(dtype), inverse.to(dtype)


def balancing_pair(left_gram: Tensor, right_gram: Tensor) -> Pair:
    """An element g that makes both Grams equal, and its inverse transpose: one of many, batched.

    With S_A = L_A L_Aᵀ, S_B = L_B L_Bᵀ, the polar decomposition L_AᵀL_B = Q H and H = K Kᵀ it is
    ``g = Kᵀ L_B⁻¹`` and ``g⁻ᵀ = Kᵀ Qᵀ L_A⁻¹``. What distinguishes elements, a rotation, is left to
    eigenframes: so there is no need of singular vectors, of which devices make one matrix at a
    time. A factor that is deficient gives NaN or a meaningless element.
    """
    A, B = (torch.linalg.cholesky_ex(gram).L for gram in (left_gram, right_gram))
    product = A.mT @ B
    Q = polar_factor_by_inverses(product)
    H = Q.mT @ product
    K = torch.linalg.cholesky_ex((H + H.mT) / 2).L
    return (
        torch.linalg.solve_triangular(B, K.mT, upper=False, left=False),
        torch.linalg.solve_triangular(A, (Q @ K).mT, upper=False, left=False),
    )


def orthonormal_element(SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair:
    """The symmetric root ``g = S_B^{-1/2}``: the rows of B become orthonormal.

    `SA` is not used and may be singular: the section stays defined where A vanishes, as in a fresh
    low-rank adapter. Unlike the Cholesky factor it commutes with rotations: (O A, O B) is dressed
    to O times the dressed (A, B).

    Residual group: O(r). Parameters, returns and errors as for :func:`svd_element`.
    """
    SA, SB, dtype = _prepare(SA, SB)
    inverse_transpose, g = symmetric_polar(cholesky(SB, "right factor B", check=check).mT)
    return g.to(dtype), inverse_transpose.to(dtype)


def triangular_element(SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair:
    """The inverse Cholesky factor ``g = L_B^{-1}``: B becomes the Q of its LQ decomposition.

    The diagonal of L is positive. The cheapest section, one Cholesky factorisation and no spectral
    decomposition; `SA` is not used and may be singular.

    Residual group: none under lower triangular elements with positive diagonal, signs under all
    lower triangular ones, O(r) under GL(r). Parameters, returns and errors as for
    :func:`svd_element`.
    """
    SA, SB, dtype = _prepare(SA, SB)
    L = cholesky(SB, "right factor B", check=check)
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    g = torch.linalg.solve_triangular(L, identity, upper=False)
    return g.to(dtype), L.mT.to(dtype)


_ELEMENTS: dict[str, _ElementFunction] = {
    "svd": svd_element,
    "balanced": balanced_element,
    "orthonormal": orthonormal_element,
    "triangular": triangular_element,
}


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` unless `kind` is a section of factor pairs under GL(r)."""
    if kind not in _ELEMENTS:
        raise ValueError(f"section must be one of {tuple(_ELEMENTS)}, got {kind!r}")


def check_factors(A: Tensor, B: Tensor) -> None:
    """Raise unless A and B are floating-point with equal batch shape and number of rows."""
    check_floating("A", A)
    check_floating("B", B)
    if A.ndim < 2 or B.ndim < 2 or A.shape[:-1] != B.shape[:-1]:
        raise ValueError(
            f"A and B must have shapes (*batch, r, n) and (*batch, r, m), "
            f"got {tuple(A.shape)} and {tuple(B.shape)}"
        )


def _element_function(kind: str) -> Callable[..., Pair]:
    check_kind(kind)
    return _ELEMENTS[kind]


def element(kind: str, SA: Tensor, SB: Tensor, *, check: bool = True) -> Pair:
    """Element of the section `kind` from the Gram matrices.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
        See the functions of these names.
    SA, SB, check
        As for :func:`svd_element`.

    Returns
    -------
    g, g_inverse_transpose : Tensor, shape (*batch, r, r)

    Raises
    ------
    ValueError
        If `kind` is unknown, or for the reasons of :func:`svd_element`.
    """
    return _element_function(kind)(SA, SB, check=check)


def dress(
    element_of: Callable[..., Pair], A: Tensor, B: Tensor, *, check: bool = True
) -> tuple[Pair, Tensor, Tensor]:
    """Dressed factors and the element ``(g, g^{-T})`` that dresses them, in the widest precision.

    Gram matrices square the condition numbers of the factors. Where A and B are stored in the
    widest precision already, a second element is computed from the dressed factors, which are well
    conditioned, and takes back what was lost.

    Parameters
    ----------
    element_of : callable
        Element from two Gram matrices, as :func:`svd_element`.
    A, B, check
        As for :func:`section`.
    """
    g, contragredient = element_of(gram(A), gram(B), check=check)
    dressed = contragredient @ wide(A), g @ wide(B)
    if A.dtype == B.dtype == wide(A).dtype:
        again, again_contragredient = element_of(gram(dressed[0]), gram(dressed[1]), check=False)
        dressed = again_contragredient @ dressed[0], again @ dressed[1]
        g, contragredient = again @ g, again_contragredient @ contragredient
    return dressed, g, contragredient


class DressedPair(NamedTuple):
    """A pair in the SVD section, in the widest precision.

    Attributes
    ----------
    A, B : Tensor
        Dressed factors.
    g, contragredient : Tensor, shape (*batch, r, r)
        The elements for B and for A.
    gap : Tensor, shape (*batch)
        Smallest difference of neighbouring singular values of ``Aᵀ B``, of those that do not
        vanish, over the largest.
    """

    A: Tensor
    B: Tensor
    g: Tensor
    contragredient: Tensor
    gap: Tensor


def svd_dressing(A: Tensor, B: Tensor, stored: torch.dtype, *, check: bool = True) -> DressedPair:
    """The SVD section of pairs of any rank, signs and equal singular values included.

    Parameters
    ----------
    A, B : Tensor, shapes (*batch, r, n) and (*batch, r, m)
        In the widest precision where that of the result matters.
    stored : torch.dtype
        Precision of the entries, which decides what counts as dependent and as equal.
    check : bool
        As for :func:`section`.
    """
    if not check:
        return _full_rank_dressing(A, B, stored, check=False)
    for name, X in (("left factor A", A), ("right factor B", B)):
        finite = torch.isfinite(X).all(dim=-1).all(dim=-1)
        if not bool(finite.all()):
            raise ValueError(f"{name} has non-finite entries{locate_first(~finite)}")
    batch, shapes = A.shape[:-2], (A.shape[-2:], B.shape[-2:])
    flat_A, flat_B = A.reshape((-1, *shapes[0])), B.reshape((-1, *shapes[1]))
    ranks = deficient_ranks(flat_A, flat_B, stored)
    if not ranks:
        return _full_rank_dressing(A, B, stored, check=True)
    full = torch.ones(len(flat_A), dtype=torch.bool, device=A.device)
    parts, places = [], []
    for rank, index in ranks.items():
        place = torch.tensor(index, device=A.device)
        full[place] = False
        parts.append(DressedPair(*dress_deficient(flat_A[place], flat_B[place], rank, stored)))
        places.append(place)
    if bool(full.any()):
        place = full.nonzero().squeeze(-1)
        parts.append(_full_rank_dressing(flat_A[place], flat_B[place], stored, check=True))
        places.append(place)
    order = torch.argsort(torch.cat(places))
    joined = [torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)]
    return DressedPair(*(tensor.reshape((*batch, *tensor.shape[1:])) for tensor in joined))


def _full_rank_dressing(A: Tensor, B: Tensor, stored: torch.dtype, *, check: bool) -> DressedPair:
    (dressed_A, dressed_B), g, contragredient = dress(svd_element, A, B, check=check)
    rows = dressed_B.detach()
    turn, gap = turn_of_rows(rows, rows.square().sum(dim=-1), stored, equal=check)
    return DressedPair(turn @ dressed_A, turn @ dressed_B, turn @ g, turn @ contragredient, gap)


def section(
    kind: str,
    A: Tensor,
    B: Tensor,
    *,
    check: bool = True,
    return_gap: bool = False,
    warn_below: float | None = None,
) -> Any:
    """Canonical representative of the orbit of (A, B), and the element that leads to it.

    For ``"svd"`` the signs are fixed as well: in each row of the dressed B the entry of largest
    modulus is positive (of several equal ones the first). Rows of the dressed B are right singular
    vectors of ``Aᵀ B`` up to scale, so the rule reads invariant data only. Rows of equal singular
    values are turned among themselves by the same rule, a QR decomposition of B with column
    pivoting: nothing is left open.

    ``"svd"`` takes pairs of any rank. With ranks a and b of the factors and ρ of ``Aᵀ B`` the rows
    of the representative are

    ================  ================================  ================================
    rows              A                                 B
    ================  ================================  ================================
    ρ                 ``Σ^{1/2} Uᵀ``                    ``Σ^{1/2} Vᵀ``
    b − ρ             0                                 orthonormal, orthogonal to those above
    a − ρ             orthonormal, orthogonal to those  0
                      above
    r − a − b + ρ     0                                 0
    ================  ================================  ================================

    the orthonormal rows by column pivoting as well. ``Aᵀ B`` sees the first ρ alone; the others are
    what the orbit has besides. A group element that clears them too does not exist where they are
    there, since it keeps the ranks: ``qo.invariants`` returns that form. Residual group at
    deficient rank: the elements that leave this representative as it is.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
        Which section.
    A : Tensor, shape (*batch, r, n)
        Left factor.
    B : Tensor, shape (*batch, r, m)
        Right factor.
    check : bool
        Whether to look for rank deficiency and for equal singular values, which waits for the
        device. Without it the element of a deficient head is not finite or meaningless, and rows of
        equal singular values stay as the decomposition happens to give them.
    return_gap : bool
        For ``"svd"``: return the smallest difference of neighbouring singular values over the
        largest as well, of shape (*batch), infinite where there are not two that do not vanish.
    warn_below : float, optional
        For ``"svd"``: warn where that gap is not above it.

    Returns
    -------
    representative : tuple of Tensor
        ``(g^{-T} A, g B)`` in the dtypes of A and B.
    g : Tensor, shape (*batch, r, r)
        The group element, in at least float32.
    gap : Tensor, shape (*batch)
        With `return_gap`.

    Raises
    ------
    ValueError, TypeError
        For the reasons of :func:`svd_element`; ``"svd"`` only if an entry is not finite.
    """
    check_factors(A, B)
    check_gap_options(kind, return_gap, warn_below)
    dtype = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    if kind == "svd":
        found = svd_dressing(A, B, torch.promote_types(A.dtype, B.dtype), check=check)
        warn_of_gap(found.gap, warn_below)
        result = (found.A.to(A.dtype), found.B.to(B.dtype)), found.g.to(dtype)
        return (*result, found.gap.to(dtype)) if return_gap else result
    (dressed_A, dressed_B), g, _ = dress(_element_function(kind), A, B, check=check)
    return (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), g.to(dtype)
