"""Compact structure groups, whose elements are orthogonal and turn both factors alike.

Normalised queries and keys have one: O(r), its stabiliser of the all-ones vector, or the phases of
rotary planes. A pair under such a group is one matrix [A B], and orbits are compared by turning
one representative to where it is nearest to the other. Every other structure group here has a
maximal compact subgroup of this kind, which is what balancing a pair leaves of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair, cholesky, locate_first
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups import O, RotaryCommutant, RotaryPhases, StructureGroup

SECTIONS = ("svd", "polar")


def is_compact(group: StructureGroup) -> bool:
    """Whether all elements of the group are orthogonal."""
    return isinstance(group, O | RotaryPhases)


def section_kinds(group: StructureGroup) -> tuple[str, ...]:
    """Sections of [A B] under a compact group."""
    return SECTIONS[:1] if isinstance(group, RotaryPhases) else SECTIONS


def joint(pair: Pair) -> Tensor:
    """``[A B]``."""
    return torch.cat(pair, dim=-1)


def compact_factor(group: StructureGroup, matrix: Tensor) -> Tensor:
    """The element of the group's maximal compact subgroup that is closest to r×r matrices.

    The solution k of the Procrustes problem ``min ‖k X − Y‖`` for ``matrix = Y Xᵀ``.
    """
    if isinstance(group, RotaryPhases):
        return group.commutant.unitary_factor(matrix)
    if isinstance(group, RotaryCommutant):
        return group.unitary_factor(matrix)
    if isinstance(group, O):
        return group.element_of_moving(orthogonal_polar_factor(moving_block(group, matrix)))
    return orthogonal_polar_factor(matrix)


def moving_block(group: O, matrix: Tensor) -> Tensor:
    """A square matrix in the coordinates that the group moves, on both sides."""
    return group.moving_part(group.moving_part(matrix).mT).mT


def compact_distance(group: StructureGroup, x: Pair, y: Pair) -> Tensor:
    """``min_k ‖k [A₁ B₁] − [A₂ B₂]‖_F`` over a compact group, per head."""
    X, Y = joint(x), joint(y)
    return torch.linalg.matrix_norm(compact_factor(group, Y @ X.mT) @ X - Y)


def section_element(kind: str, group: StructureGroup, S: Tensor) -> Tensor:
    """The element that takes [A B] to a section, up to signs and phases.

    Parameters
    ----------
    kind : {"svd", "polar"}
    group : StructureGroup
        Compact.
    S : Tensor
        For ``"svd"`` the Gram matrix ``A Aᵀ + B Bᵀ``, for ``"polar"`` the leading r×r block of
        [A B]; ``(heads, r, r)``.

    Raises
    ------
    ValueError
        If [A B] lacks full row rank (in the rows that are mixed), or is not finite.
    """
    if isinstance(group, RotaryPhases):
        commutant = group.commutant
        start, planes = commutant.rotary_dim, len(commutant.planes)
        if not bool(torch.isfinite(S).all()):
            failed = ~torch.isfinite(S).flatten(-2).all(dim=-1)
            raise ValueError(f"[A B] has non-finite entries{locate_first(failed)}")
        block = None
        if commutant.pass_rows:
            block = section_element(kind, O(group.r - start), S[..., start:, start:])
        ones = torch.ones(*S.shape[:-2], planes, dtype=S.dtype, device=S.device)
        return commutant.element(torch.complex(ones, torch.zeros_like(ones)), block)
    assert isinstance(group, O)
    # [A B]ᵀ as a token matrix: r rows with the same Gram matrix, or the leading ones, are enough.
    X = S.mT if kind == "polar" else cholesky(S, "[A B]").mT
    return sections.gram_section(kind, X, stabilizer=group)[1]
