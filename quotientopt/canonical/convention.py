"""What an SVD leaves open, fixed for every group: signs, phases, bases of equal singular values.

The rule is that of :mod:`quotientopt.sections.convention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt._linalg import Pair, first_largest
from quotientopt.canonical.compact import joint
from quotientopt.groups import O, RotaryCommutant, RotaryPhases, StructureGroup
from quotientopt.sections.convention import Turn, turn_of_rows


def canonical_turn(group: StructureGroup, pair: Pair, stored: torch.dtype) -> Turn:
    """The turn that takes a pair in the SVD section to the canonical representative.

    Parameters
    ----------
    group : StructureGroup
    pair : tuple of Tensor
        Dressed factors, ``(heads, r, n)`` and ``(heads, r, m)``. Under GL(r), and for the passing
        rows of a rotary commutant, B tells; for a plane the phase that makes the entry of largest
        modulus of the complex row b real and positive; under compact groups the rows of [A B].
    stored : torch.dtype
        Dtype of the parameters, which decides what :func:`clusters` counts as equal.
    """
    if isinstance(group, O):
        rows = group.moving_part(joint(pair).mT).mT
        turn, gap = turn_of_rows(rows, torch.linalg.vector_norm(rows, dim=-1), stored)
        return Turn(group.element_of_moving(turn), gap)
    if isinstance(group, RotaryPhases):
        rows = joint(pair)
        passing = rows[..., group.commutant.rotary_dim :, :]
        values = torch.linalg.vector_norm(passing, dim=-1)
        return _with_phases(group.commutant, rows, turn_of_rows(passing, values, stored))
    B = pair[1]
    if not isinstance(group, RotaryCommutant):
        return turn_of_rows(B, B.square().sum(dim=-1), stored)
    passing = B[..., group.rotary_dim :, :]
    values = passing.square().sum(dim=-1)
    return _with_phases(group, B, turn_of_rows(passing, values, stored))


def _with_phases(group: RotaryCommutant, rows: Tensor, passing: Turn) -> Turn:
    """Phases that put the largest entry of every complex row on the positive axis."""
    planes = group.complex_rows(rows)
    largest = first_largest(planes).squeeze(-1) if group.planes else planes[..., 0]
    modulus = largest.abs()
    phase = torch.where(modulus > 0, largest.conj() / torch.where(modulus > 0, modulus, 1), 1)
    return Turn(group.element(phase, passing.element), passing.gap)
