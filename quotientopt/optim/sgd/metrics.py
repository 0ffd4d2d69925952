"""Invariant metrics on factor pairs, from r×r Grams alone.

:func:`measure` has what a metric needs to know of stacked pairs, :func:`covector_frames` the frames
in which its dual norm is Euclidean. QuotientSGD's gradients and projections in these metrics are in
:mod:`quotientopt.optim.sgd.pairs`, the norm of a whole model's gradient in them is in
:mod:`quotientopt.optim.invariant_norm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, rows_depend, wide, wide_dtype
from quotientopt.groups import GL, O, PlaneCommutant, RotaryCommutant, StructureGroup
from quotientopt.optim.dressing import head_dressing
from quotientopt.optim.options import HEAD_FRAMES


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
    backward = torch.linalg.matrix_norm(inverse_of_root(right) @ inverse_of_root(left).mT)
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
    finite = S.isfinite().flatten(-2).all(-1)
    deficient = (info != 0) | rows_depend(root, S, 2 * precision) | ~finite
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
    geometry : PairGrams
    """
    left, right = geometry.left_root, geometry.right_root
    if metric == "right-invariant":
        return left.mT, right.mT
    if metric in HEAD_FRAMES:
        dressing = head_dressing(metric, geometry.group, geometry.left_gram, geometry.right_gram)
        return dressing.left, dressing.right
    return inverse_of_root(right), inverse_of_root(left)


def dressed_gradient(metric: str, geometry: PairGrams, partials: Pair) -> Pair:
    """``(F_A ∂_A, F_B ∂_B)`` in the frames of :func:`covector_frames`, in the partials' dtype."""
    F_A, F_B = covector_frames(metric, geometry)
    return F_A.to(partials[0].dtype) @ partials[0], F_B.to(partials[1].dtype) @ partials[1]


def inverse_of_root(L: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix."""
    identity = torch.eye(L.size(-1), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
