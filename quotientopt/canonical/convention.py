"""The canonical element of a pair under every group: the SVD section with nothing left open.

Signs and bases of equal singular values are fixed by the rule of
:mod:`quotientopt.sections.convention`, pairs of deficient rank brought to the form of
:func:`quotientopt.sections.section`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt._linalg import Pair, first_largest, locate_first
from quotientopt.canonical.compact import is_compact, joint
from quotientopt.groups import (
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    StructureGroup,
)
from quotientopt.sections.factor import svd_dressing
from quotientopt.sections.gram import dress_matrix
from quotientopt.sections.rotary import rotary_svd_dressing
from quotientopt.symmetries import HeadSymmetry

_BALANCED = 1e-6


def canonical_element(symmetry: HeadSymmetry, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The element that leads to the canonical representative, its contragredient, and the gap.

    Parameters
    ----------
    symmetry : HeadSymmetry
    pair : tuple of Tensor
        Its factors, ``(heads, r, n)`` and ``(heads, r, m)``, in the widest precision. Under GL(r),
        and for the passing rows of a rotary commutant, B tells signs; for a plane the phase that
        makes the entry of largest modulus of the complex row b real and positive (of a, where b
        vanishes); under compact groups the rows of [A B]. Planes that share a frequency have the
        complex singular vectors of their rows.

    Raises
    ------
    ValueError
        If an entry is not finite; the symmetry is named.
    """
    group, stored = symmetry.group, symmetry.blocks[0].parameter.dtype
    try:
        if isinstance(group, RotaryPhases):
            return _phases(group, joint(pair), stored)
        if isinstance(group, O):
            rows = _finite(joint(pair))
            found = dress_matrix("svd", group.moving_part(rows.mT), stored)
            g = group.element_of_moving(found.element)
            return g, g, found.gap
        if isinstance(group, RotaryCommutant | PlaneCommutant):
            _, _, g, contragredient, gap = rotary_svd_dressing(group, *pair, stored)
        else:
            _, _, g, contragredient, gap = svd_dressing(*pair, stored)
    except ValueError as error:
        raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None
    return g, contragredient, gap


def _phases(
    group: RotaryPhases, rows: Tensor, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Phases that put the largest entry of every complex row of [A B] on the positive axis."""
    commutant = group.commutant
    rows = _finite(rows)
    if isinstance(commutant, PlaneCommutant):
        return _unitary(commutant, rows, stored)
    planes = commutant.complex_rows(rows)
    largest = first_largest(planes).squeeze(-1) if commutant.planes else planes[..., 0]
    modulus = largest.abs()
    phase = torch.where(modulus > 0, largest.conj() / torch.where(modulus > 0, modulus, 1), 1)
    block, gap = None, modulus.new_full(rows.shape[:-2], torch.inf)
    if commutant.pass_rows:
        found = dress_matrix("svd", rows[..., commutant.rotary_dim :, :].mT, stored)
        block, gap = found.element, found.gap
    g = commutant.element(phase, block)
    return g, g, gap


def _unitary(
    commutant: PlaneCommutant, rows: Tensor, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where planes share a frequency: left singular vectors of their complex rows."""
    planes, passing = commutant.complex_rows(rows)
    gap = rows.new_full(rows.shape[:-2], torch.inf)
    parts = []
    for own in planes:
        U, values, Vh = torch.linalg.svd(own, full_matrices=False)
        largest = first_largest(Vh)
        parts.append(largest.conj() / largest.abs() * U.mH)
        if values.shape[-1] > 1:
            gaps = -values.diff(dim=-1).amax(dim=-1) / values[..., 0]
            gap = torch.minimum(gap, gaps.amin(dim=-1))
    block = passing[..., :0]
    if commutant.pass_rows:
        found = dress_matrix("svd", passing.mT, stored)
        block, gap = found.element, torch.minimum(gap, found.gap)
    g = commutant.element(parts, block)
    return g, g, gap


def _finite(rows: Tensor) -> Tensor:
    finite = torch.isfinite(rows).all(dim=-1).all(dim=-1)
    if not bool(finite.all()):
        raise ValueError(f"[A B] has non-finite entries{locate_first(~finite)}")
    return rows


def without_unseen_rows(group: StructureGroup, left: Tensor, right: Tensor) -> Pair:
    """Factors in the SVD section without the rows that ``Aᵀ B`` does not see.

    Rows that it sees are equally long on both sides; the others have a partner of zeros.

    Parameters
    ----------
    group : StructureGroup
    left, right : Tensor
        ``(heads, query heads of one, r, n)`` and ``(heads, r, m)``.
    """
    if is_compact(group):
        return left, right
    one = torch.linalg.vector_norm(left, dim=(-3, -1))
    two = torch.linalg.vector_norm(right, dim=-1)
    if isinstance(group, RotaryCommutant | PlaneCommutant):
        for plane in group.planes:
            for lengths in (one, two):
                rows = list(plane)
                lengths[:, rows] = torch.linalg.vector_norm(lengths[:, rows], dim=-1, keepdim=True)
    unequal = torch.minimum(one, two) <= _BALANCED * torch.maximum(one, two)
    unseen = unequal.unsqueeze(-1)
    return torch.where(unseen.unsqueeze(-3), 0, left), torch.where(unseen, 0, right)
