"""Frames for Adam: what reduces a structure group to signed permutations.

A head frame u sends a covector ∂ of one side to dressed coordinates ``u ∂``. Under the group it
goes to ``u g^{-1}`` (left side) or ``u gᵀ`` (right side), so that ``u ∂`` is invariant and
``uᵀ · (function of u ∂)`` is a tangent vector. (François & Ravera, arXiv 2602.18948, dressing
fields; Vyas et al., arXiv 2409.11321, eigenframes.)"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StructureGroup,
)
from quotientopt.optim.update import break_ties
from quotientopt.sections.factor import svd_element, triangular_element
from quotientopt.sections.rotary import plane_element

HEAD_FRAMES = ("balanced", "orthonormal", "svd")


def holds_rotations_only(group: StructureGroup) -> bool:
    """Whether all elements are rotations, which no section reduces and every eigenframe follows."""
    return isinstance(group, O | RotaryPhases)


class HeadDressing(NamedTuple):
    """Dressing fields of the two sides and their inverse transposes, each ``(…, r, r)``.

    ``left ∂_A`` and ``right ∂_B`` are the dressed gradients; ``left_contragredient A`` and
    ``right_contragredient B`` are the dressed factors.
    """

    left: Tensor
    left_contragredient: Tensor
    right: Tensor
    right_contragredient: Tensor


def head_dressing(
    kind: str, group: StructureGroup, left_gram: Tensor, right_gram: Tensor
) -> HeadDressing:
    """Dressing fields that reduce ``group`` to a compact group, from the Grams AAᵀ and BBᵀ.

    ``"balanced"`` and ``"svd"`` use one group element g with equal diagonal Grams of
    ``(g^{-T} A, g B)``: ∂_A ↦ g ∂_A, ∂_B ↦ g^{-T} ∂_B. ``"orthonormal"`` sees each side through
    orthonormal coordinates of its partner: ∂_A ↦ L_B^{-1} ∂_A, ∂_B ↦ L_A^{-1} ∂_B with Cholesky
    factors L, so that step sizes are absolute in AᵀB.

    Parameters
    ----------
    kind : {"balanced", "orthonormal", "svd"}
    group : GL, RotaryCommutant, PlaneCommutant, O or RotaryPhases
        Rotations need no reduction: identity fields. The rotated planes of a RotaryCommutant are
        scaled, plane by plane. Those of a PlaneCommutant have the complex sections of each
        frequency; ``"orthonormal"`` the symmetric root in place of the Cholesky factor.
    left_gram, right_gram : Tensor
        Shape ``(…, r, r)``, positive definite.

    Raises
    ------
    TypeError
        If frames for this group are not known.
    """
    if holds_rotations_only(group):
        identity = torch.eye(group.r, dtype=left_gram.dtype, device=left_gram.device)
        identity = identity.expand_as(left_gram)
        return HeadDressing(identity, identity, identity, identity)
    if isinstance(group, GL) or (isinstance(group, Scale) and group.r == 1):
        # The sections of single rows have positive elements.
        return _linear_dressing(kind, left_gram, right_gram)
    if isinstance(group, PlaneCommutant):
        return _complex_dressing(kind, group, left_gram, right_gram)
    if not isinstance(group, RotaryCommutant):
        raise TypeError(f"no head frames for the group {group}")
    scales = _plane_dressing(kind, group, left_gram, right_gram)
    if not len(group.pass_rows):
        return HeadDressing(*(scale.diag_embed() for scale in scales))
    rows = torch.as_tensor(group.pass_rows, device=left_gram.device)
    passing = _linear_dressing(
        kind, left_gram[..., rows[:, None], rows], right_gram[..., rows[:, None], rows]
    )
    fields = []
    for scale, block in zip(scales, passing, strict=True):
        field = scale.diag_embed()
        field[..., rows[:, None], rows] = block
        fields.append(field)
    return HeadDressing(*fields)


def _linear_dressing(kind: str, left_gram: Tensor, right_gram: Tensor) -> HeadDressing:
    if kind in ("balanced", "svd"):
        g, contragredient = svd_element(left_gram, right_gram, check=False)
        return HeadDressing(g, contragredient, contragredient, g)
    left, left_contragredient = triangular_element(left_gram, right_gram, check=False)
    right, right_contragredient = triangular_element(right_gram, left_gram, check=False)
    return HeadDressing(left, left_contragredient, right, right_contragredient)


def _complex_dressing(
    kind: str, group: PlaneCommutant, left_gram: Tensor, right_gram: Tensor
) -> HeadDressing:
    if kind in ("balanced", "svd"):
        g, contragredient = plane_element(kind, group, left_gram, right_gram, check=False)
        return HeadDressing(g, contragredient, contragredient, g)
    left, left_contragredient = plane_element(kind, group, left_gram, right_gram, check=False)
    right, right_contragredient = plane_element(kind, group, right_gram, left_gram, check=False)
    return HeadDressing(left, left_contragredient, right, right_contragredient)


def _plane_dressing(
    kind: str, group: RotaryCommutant, left_gram: Tensor, right_gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonals of the fields on the rotated planes (ones on the rows that pass)."""
    partner = plane_partners(group, left_gram.device)
    left, right = (
        (diagonal + diagonal[..., partner]).sqrt()
        for diagonal in (
            left_gram.diagonal(dim1=-2, dim2=-1),
            right_gram.diagonal(dim1=-2, dim2=-1),
        )
    )
    if kind == "orthonormal":
        fields = (right.reciprocal(), right, left.reciprocal(), left)
    else:
        scale = (left / right).sqrt()
        fields = (scale, scale.reciprocal(), scale.reciprocal(), scale)
    rotated = partner != torch.arange(group.r, device=partner.device)
    first, second, third, fourth = (torch.where(rotated, field, 1.0) for field in fields)
    return first, second, third, fourth


def plane_partners(group: StructureGroup, device: torch.device) -> Tensor:
    """Row index of each row's partner in its rotated plane; rows that pass are their own."""
    partner = torch.arange(group.r, device=device)
    if isinstance(group, RotaryCommutant | PlaneCommutant) and group.planes:
        planes = torch.as_tensor(group.planes, device=device)
        partner[planes[:, 0]] = planes[:, 1]
        partner[planes[:, 1]] = planes[:, 0]
    return partner


def head_eigenframe(group: StructureGroup, covariance: Tensor, weights_gram: Tensor) -> Tensor:
    """Rows are eigenvectors of the dressed gradient covariance, its ties broken by the weights.

    They fix the rotation O that a section slices over.

    Parameters
    ----------
    group : StructureGroup
        For a RotaryCommutant the rotated planes stay as they are (the second moment is taken per
        complex entry there), and only the rows that pass get eigenvectors. Planes that share a
        frequency are turned to the complex eigenvectors of the hermitian part.
    covariance, weights_gram : Tensor
        Σ u∂ (u∂)ᵀ and the Gram of the dressed factor, symmetric, shape ``(…, r, r)``.
    """
    pooled = break_ties(covariance, weights_gram)
    if isinstance(group, PlaneCommutant):
        parts, block = group.parts(pooled)
        parts = [torch.linalg.eigh(part).eigenvectors.mH for part in parts]
        return group.element(parts, torch.linalg.eigh(block).eigenvectors.mT)
    if not isinstance(group, RotaryCommutant):
        return torch.linalg.eigh(pooled).eigenvectors.mT
    frame = torch.eye(group.r, dtype=pooled.dtype, device=pooled.device)
    frame = frame.repeat(*pooled.shape[:-2], 1, 1)
    if len(group.pass_rows):
        rows = torch.as_tensor(group.pass_rows, device=pooled.device)
        passing = pooled[..., rows[:, None], rows]
        frame[..., rows[:, None], rows] = torch.linalg.eigh(passing).eigenvectors.mT
    return frame
