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
from quotientopt._linalg import Pair
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups import O, PlaneCommutant, RotaryCommutant, RotaryPhases, StructureGroup
from quotientopt.manifolds.orbits import squared_distance

SECTIONS = ("svd", "polar")
FREQUENCY_SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def is_compact(group: StructureGroup) -> bool:
    """Whether all elements of the group are orthogonal."""
    return isinstance(group, O | RotaryPhases)


def section_kinds(group: StructureGroup) -> tuple[str, ...]:
    """Sections of [A B] under a compact group, of pairs under a plane commutant."""
    if isinstance(group, PlaneCommutant):
        return FREQUENCY_SECTIONS
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
    if isinstance(group, RotaryCommutant | PlaneCommutant):
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


def frequency_distance(group: PlaneCommutant, x: Pair, y: Pair) -> Tensor:
    """Distance between the products ``aᴴ b`` of all frequencies and of the passing rows."""
    squared = torch.zeros((), dtype=x[0].dtype, device=x[0].device)
    (a1, p1), (b1, q1), (a2, p2), (b2, q2) = (group.complex_rows(X) for X in (*x, *y))
    for a, b, c, d in zip(a1, b1, a2, b2, strict=True):
        squared = squared + squared_distance((a, b), (c, d)).sum(dim=-1)
    if group.pass_rows:
        squared = squared + squared_distance((p1, q1), (p2, q2))
    return squared.sqrt()


def section_element(kind: str, group: StructureGroup, S: Tensor) -> Tensor:
    """The element that takes [A B] to the section ``"polar"``.

    Parameters
    ----------
    kind : {"polar"}
    group : StructureGroup
        Compact, O or a stabiliser: phases have ``"svd"`` alone, which reads the factors
        (:mod:`quotientopt.canonical.convention`).
    S : Tensor
        The leading r×r block of [A B], ``(heads, r, r)``.

    Raises
    ------
    ValueError
        If the leading block is singular (in the rows that are mixed), or not finite.
    """
    assert isinstance(group, O)
    return sections.gram_section(kind, S.mT, stabilizer=group)[1]
