"""Invariant metrics on stacked factor pairs, from r×r Grams alone: gradients, horizontal parts.

Pairs are stacked by :mod:`quotientopt.symmetries.pairs`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, skew_part, solve_lyapunov, wide, wide_dtype
from quotientopt.groups import GL, O, PlaneCommutant, RotaryCommutant, StructureGroup
from quotientopt.optim.checks import HEAD_FRAMES
from quotientopt.optim.dressing import head_dressing


class PairGrams(NamedTuple):
    """What a metric needs to know of stacked pairs; matrices ``(…, r, r)`` in wide precision.

    Attributes
    ----------
    group : StructureGroup
    left_gram, right_gram : Tensor
        ``A Aᵀ`` and ``B Bᵀ``.
    left_root, right_root : Tensor
        Cholesky factors of ``S_A`` and ``S_B``.
    deficient : Tensor
        Whether the left and the right factor are rank-deficient or not finite, ``(2, …)``; the
        matrices of such a factor are the identity and mean nothing.
    finite : Tensor
        Whether they are finite, likewise.
    """

    group: StructureGroup
    left_gram: Tensor
    right_gram: Tensor
    left_root: Tensor
    right_root: Tensor
    deficient: Tensor
    finite: Tensor


def refuse_unknown_geometry(group: StructureGroup, metric: str, name: str) -> None:
    """Refuse a group and a metric for which there is no closed-form projection.

    Raises
    ------
    ValueError
        Naming the symmetry and what may be used instead.
    """
    if not isinstance(group, GL | O | RotaryCommutant | PlaneCommutant):
        raise ValueError(
            f"symmetry {name!r}: no invariant metric is known for the group {group}; leave the "
            "symmetry out"
        )
    if isinstance(group, O) and metric == "right-invariant":
        raise ValueError(
            f"symmetry {name!r}: under O(r) the right-invariant metric has no closed-form "
            "horizontal projection; use metric='preconditioned'"
        )


def measure(group: StructureGroup, A: Tensor, B: Tensor, precision: float) -> PairGrams:
    """Grams of stacked pairs and where they are deficient; waits for nothing.

    Parameters
    ----------
    group : StructureGroup
        Of stacked factors (:func:`in_order`).
    A, B : Tensor
        Factors, ``(…, r, n)`` and ``(…, r, m)``.
    precision : float
        Machine epsilon of the parameters.
    """
    left_gram, left_root, *left = _factorize(group, A, precision)
    right_gram, right_root, *right = _factorize(group, B, precision)
    deficient, finite = (torch.stack(flags) for flags in zip(left, right, strict=True))
    return PairGrams(group, left_gram, right_gram, left_root, right_root, deficient, finite)


# Of the singular values of AᵀB: in float32 the smallest would be rounding of the largest.
LARGEST_CONDITION = 1e8


def heads_without_metric(geometry: PairGrams) -> Tensor:
    """Heads that are no points of the quotient, ``(…)``: a factor is deficient, or AᵀB nearly.

    Rows that are tiny in both factors have full rank, but their metric would be of any size. With
    ``K = L_Aᵀ L_B``, whose singular values are those of AᵀB, the bound is on ‖K‖ ‖K⁻¹‖, which no
    group element changes.
    """
    left, right = geometry.left_root, geometry.right_root
    forward = torch.linalg.matrix_norm(left.mT @ right)
    backward = torch.linalg.matrix_norm(_inverse(right) @ _inverse(left).mT)
    vanishing = ~(forward * backward <= LARGEST_CONDITION)
    return geometry.deficient.any(0) | vanishing


def without_metric(geometry: PairGrams, heads: Tensor) -> PairGrams:
    """The same with the Euclidean metric for some heads, ``(…)``: all their matrices are one."""
    identity = torch.eye(
        geometry.left_root.size(-1),
        dtype=geometry.left_root.dtype,
        device=geometry.left_root.device,
    )
    left_gram, right_gram, left_root, right_root = (
        torch.where(heads[..., None, None], identity, matrix) for matrix in geometry[1:5]
    )
    return geometry._replace(
        left_gram=left_gram, right_gram=right_gram, left_root=left_root, right_root=right_root
    )


def _factorize(
    group: StructureGroup, X: Tensor, precision: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X Xᵀ, the Cholesky factor of ρ(X Xᵀ), whether X is deficient or not finite, and finite."""
    rows = wide(X)
    gram = rows @ rows.mT
    S = group.row_products(gram)
    root, info = torch.linalg.cholesky_ex(S)
    pivots = root.diagonal(dim1=-2, dim2=-1).square()
    # A pivot over its diagonal entry is the squared sine of a row's angle to those above it;
    # rounding of the stored parameters alone makes it about the square of their precision.
    least = max(4 * precision**2, S.size(-1) * torch.finfo(S.dtype).eps)
    flat = (pivots <= least * S.diagonal(dim1=-2, dim2=-1)).any(-1)
    finite = S.isfinite().flatten(-2).all(-1)
    deficient = (info != 0) | flat | ~finite
    if X.dtype == wide_dtype(X.device):
        # A Gram squares the condition. Where no wider precision makes up for it, the Gram of the
        # nearly orthonormal rows L⁻¹X corrects the factor (Fukaya et al. 2014, CholeskyQR2).
        nearly = torch.linalg.solve_triangular(root, rows, upper=False)
        correction, info = torch.linalg.cholesky_ex(group.row_products(nearly @ nearly.mT))
        root, deficient = root @ correction, deficient | (info != 0)
    # Decompositions further on would fail on NaN, before anyone has looked at the flags.
    identity = torch.eye(S.size(-1), dtype=S.dtype, device=S.device)
    replaced = deficient[..., None, None]
    gram, root = (torch.where(replaced, identity, matrix) for matrix in (gram, root))
    return gram, root, deficient, finite


def covector_frames(metric: str, geometry: PairGrams) -> tuple[Tensor, Tensor]:
    """Frames (F_A, F_B) in which the metric's dual norm is Euclidean.

    ``‖∂‖² = ‖F_A ∂_A‖² + ‖F_B ∂_B‖²`` is the squared norm of the Riemannian gradient
    ``(F_Aᵀ F_A ∂_A, F_Bᵀ F_B ∂_B)``. Under g, F_A goes to ``R F_A g^{-1}`` and F_B to ``R' F_B gᵀ``
    with rotations R, R', so that the norm stays and the gradient turns into a tangent vector.

    Parameters
    ----------
    metric : str
        ``"preconditioned"``: ``F_A = L_B^{-1}``, ``F_B = L_A^{-1}`` with ``S = L Lᵀ``.
        ``"right-invariant"``: ``F_A = L_Aᵀ``, ``F_B = L_Bᵀ``.
        ``"balanced"``, ``"orthonormal"``, ``"svd"``: the section of
        :class:`quotientopt.QuotientAdam`'s head frame of that name.
    geometry : PairGeometry
    """
    left, right = geometry.left_root, geometry.right_root
    if metric == "right-invariant":
        return left.mT, right.mT
    if metric in HEAD_FRAMES:
        dressing = head_dressing(metric, geometry.group, geometry.left_gram, geometry.right_gram)
        return dressing.left, dressing.right
    return _inverse(right), _inverse(left)


def dressed_gradient(metric: str, geometry: PairGrams, partials: Pair) -> Pair:
    """``(F_A ∂_A, F_B ∂_B)`` in the frames of :func:`covector_frames`, in the partials' dtype."""
    F_A, F_B = covector_frames(metric, geometry)
    return F_A.to(partials[0].dtype) @ partials[0], F_B.to(partials[1].dtype) @ partials[1]


def riemannian_gradient(metric: str, geometry: PairGrams, partials: Pair) -> Pair:
    """The vector that represents a differential, ``(F_Aᵀ F_A ∂_A, F_Bᵀ F_B ∂_B)``.

    Preconditioned: ``(S_B^{-1} ∂_A, S_A^{-1} ∂_B)``; right-invariant: ``(S_A ∂_A, S_B ∂_B)``.
    Horizontal if the function is invariant. The frames are applied one after the other: their
    product has the square of their condition number.

    Parameters
    ----------
    metric : str
    geometry : PairGeometry
    partials : tuple of Tensor
        ``(∂_A, ∂_B)``, stacked like the factors.
    """
    frames = covector_frames(metric, geometry)
    moved = [(F.to(d.dtype), d) for F, d in zip(frames, partials, strict=True)]
    grad_A, grad_B = (F.mT @ (F @ d) for F, d in moved)
    return grad_A, grad_B


def horizontal_component(
    metric: str,
    geometry: PairGrams,
    factors: Pair,
    vector: Pair,
    left_out: Tensor | None = None,
) -> Pair:
    """The part of a tangent vector that is orthogonal to the orbit, ``(u_A + M A, u_B − Mᵀ B)``.

    Preconditioned metric ``tr(S_B u_A v_Aᵀ) + tr(S_A u_B v_Bᵀ)``:
    ``M = ½ [S_B^{-1} ρ(B u_Bᵀ) − ρ(u_A Aᵀ) S_A^{-1}]``. A rotated plane is one complex row, and
    there M multiplies by the conjugate of ``½ [h(b, u_b)/h(b, b) − conj(h(a, u_a)/h(a, a))]``,
    ``h(u, v) = Σ ū v``. Under O(r) M = −Λ is skew with
    ``S_B Λ S_A + S_A Λ S_B = skew(S_B u_A Aᵀ + S_A u_B Bᵀ)``.

    Right-invariant metric ``tr(S_A^{-1} u_A v_Aᵀ) + tr(S_B^{-1} u_B v_Bᵀ)``:
    ``M S + S M = S_A ρ(B u_Bᵀ) − ρ(u_A Aᵀ) S_B`` with ``S = S_A S_B``.

    M itself is not formed: in coordinates where the rows of both factors are orthonormal, rounding
    grows with the factors' condition number and not with its square.

    Parameters
    ----------
    metric : {"preconditioned", "right-invariant"}
    geometry : PairGeometry
        Of `factors`.
    factors, vector : tuple of Tensor
        ``(A, B)`` and ``(u_A, u_B)``.
    left_out : Tensor, optional
        Heads whose vectors stay as they are, ``(…)``.
    """
    roots = geometry.left_root, geometry.right_root
    rows = [_inverse(L).to(X.dtype) @ X for L, X in zip(roots, factors, strict=True)]
    crosses = [wide(u @ X.mT) for u, X in zip(vector, rows, strict=True)]
    if isinstance(geometry.group, O):
        N_A, N_B = _orthogonal_multipliers(geometry, *crosses)
    elif metric == "preconditioned":
        N_A, N_B = _preconditioned_multipliers(geometry, *crosses)
    else:
        N_A, N_B = _right_invariant_multipliers(geometry, *crosses)
    if left_out is not None:
        N_A, N_B = (N.masked_fill(left_out[..., None, None], 0) for N in (N_A, N_B))
    u_A, u_B = vector
    return u_A + N_A.to(u_A.dtype) @ rows[0], u_B - N_B.to(u_B.dtype) @ rows[1]


# With A = L_A Â and B = L_B B̂, of ``u_A Âᵀ`` and ``u_B B̂ᵀ``: the matrices (M L_A, Mᵀ L_B).


def _preconditioned_multipliers(geometry: PairGrams, Y: Tensor, Z: Tensor) -> Pair:
    """``L_Bᵀ M L_A = ½ ρ(B̂ (L_Aᵀ u_B)ᵀ − L_Bᵀ u_A Âᵀ)``: the dressed metric is Euclidean."""
    left, right = geometry.left_root, geometry.right_root
    dressed = geometry.group.row_products(Z.mT @ left - right.mT @ Y) / 2
    N_A = torch.linalg.solve_triangular(right.mT, dressed, upper=True)
    return N_A, torch.linalg.solve_triangular(left.mT, dressed.mT, upper=True)


def _right_invariant_multipliers(geometry: PairGrams, Y: Tensor, Z: Tensor) -> Pair:
    """``M̂ = L_A^{-1} M L_A`` solves ``M̂ W + W M̂ = K B̂ u_Bᵀ L_A − L_A^{-1} u_A Âᵀ W``.

    Here ``K = L_Aᵀ L_B`` and ``W = K Kᵀ``, whose eigenvalues are the squared singular values of
    ``Aᵀ B``.
    """
    left = geometry.left_root
    K = left.mT @ geometry.right_root
    W = K @ K.mT
    right_hand = K @ Z.mT @ left - torch.linalg.solve_triangular(left, Y, upper=False) @ W
    M = solve_lyapunov(W, geometry.group.row_products(right_hand))
    return left @ M, torch.linalg.solve_triangular(left.mT, M.mT @ K, upper=True)


def _orthogonal_multipliers(geometry: PairGrams, Y: Tensor, Z: Tensor) -> Pair:
    """O(r): ``P = L_A U`` makes both Grams diagonal, S_A = P Pᵀ and S_B = P diag(w) Pᵀ."""
    left, right = geometry.left_root, geometry.right_root
    right_hand = skew_part(right @ right.mT @ Y @ left.mT + left @ left.mT @ Z @ right.mT)
    inverse = _inverse(left)
    quotient = inverse @ right
    solved = solve_lyapunov(quotient @ quotient.mT, inverse @ right_hand @ inverse.mT)
    Lambda = skew_part(inverse.mT @ solved @ inverse)
    return -Lambda @ left, Lambda @ right


def _inverse(L: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix."""
    identity = torch.eye(L.size(-1), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
