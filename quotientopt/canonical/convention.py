"""What an SVD leaves open, fixed: signs, phases, and bases of equal singular values.

The rows of the right factor in the SVD section are right singular vectors of AᵀB up to scale. A
simple one is known up to its sign, those of k equal singular values up to O(k). Both are fixed by
one rule, a QR decomposition with column pivoting: among the columns of the k×m block the longest is
turned to the first axis, positively; among what remains of the others the longest to the second;
and so on. It reads the span alone, so that every representative of an orbit ends at the same rows.
For k = 1 it makes the entry of largest modulus positive.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, compute_dtype, first_largest, row_signs, wide
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.canonical.compact import joint
from quotientopt.groups import O, RotaryCommutant, RotaryPhases, StructureGroup


class Turn(NamedTuple):
    """What :func:`canonical_turn` finds.

    Attributes
    ----------
    element : Tensor
        Orthogonal elements of the group, ``(heads, r, r)``, which act on both factors alike.
    gap : Tensor
        Smallest difference of neighbouring singular values over the largest, per head; infinite
        where there are fewer than two.
    """

    element: Tensor
    gap: Tensor


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


def turn_of_rows(rows: Tensor, values: Tensor, stored: torch.dtype) -> Turn:
    """Signs, and rotations among rows whose singular values coincide.

    Parameters
    ----------
    rows : Tensor
        Shape ``(heads, r, m)``, orthogonal to each other.
    values : Tensor
        Their singular values in decreasing order, ``(heads, r)``.
    stored : torch.dtype
        See :func:`canonical_turn`.
    """
    if values.shape[-1] == 0:
        return Turn(torch.diag_embed(values), smallest_gap(values))
    element = torch.diag_embed(row_signs(rows).squeeze(-1))
    for (start, stop), found in clusters(values, stored).items():
        index = torch.tensor(found, device=rows.device)
        element[index, start:stop, start:stop] = pivoted_rotation(rows[index, start:stop])
    return Turn(element, smallest_gap(values))


def smallest_gap(values: Tensor) -> Tensor:
    """Smallest difference of neighbours over the largest, ``(heads, r) -> (heads,)``.

    Infinite for fewer than two values; zero where all vanish.
    """
    differences = (values[:, :-1] - values[:, 1:]).abs()
    relative = differences / torch.where(values[:, :1] > 0, values[:, :1], 1)
    return torch.cat((relative, relative.new_full((len(values), 1), float("inf"))), dim=1).amin(1)


def clusters(values: Tensor, stored: torch.dtype) -> dict[tuple[int, int], list[int]]:
    """Runs of equal singular values, (first row, end) to the heads that have them.

    Neighbours count as equal if they differ by at most ε^{2/3} of the largest, 3.7e-11 for float64
    and 2.4e-5 for float32 and narrower parameters: rounding in a gauge of condition number κ moves
    singular values by κε, so that equal ones are recognised up to κ = ε^{-1/3}.

    Parameters
    ----------
    values : Tensor
        In decreasing order, ``(heads, r)``.
    stored : torch.dtype
        See :func:`canonical_turn`.
    """
    tolerance = torch.finfo(compute_dtype(stored)).eps ** (2 / 3)
    equal = values[:, :-1] - values[:, 1:] <= tolerance * values[:, :1]
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for head in equal.any(dim=1).nonzero().flatten().tolist():
        flags = equal[head].tolist()
        start = 0
        while start < len(flags):
            stop = start
            while stop < len(flags) and flags[stop]:
                stop += 1
            if stop > start:
                found[start, stop + 1].append(head)
            start = stop + 1
    return found


def pivoted_rotation(rows: Tensor) -> Tensor:
    """The rotation Q that makes the QR decomposition with column pivoting of `rows` triangular.

    Batched: ``(*batch, k, m) -> (*batch, k, k)``, Q applied from the left. Diagonal entries are
    positive; of columns whose lengths agree to the root of the precision the first is taken.
    """
    slack = 1 - torch.finfo(rows.dtype).eps ** 0.5
    rest, directions = wide(rows), []
    for _ in range(rows.shape[-2]):
        lengths = torch.linalg.vector_norm(rest, dim=-2)
        longest = lengths >= slack * lengths.amax(dim=-1, keepdim=True)
        place = longest.to(torch.uint8).argmax(dim=-1)[..., None, None]
        column = rest.gather(-1, place.expand(*rest.shape[:-1], 1))
        length = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        direction = column / torch.where(length > 0, length, 1)
        rest = rest - direction @ (direction.mT @ rest)
        directions.append(direction)
    # Gram–Schmidt loses orthogonality where columns nearly depend; dependent ones are completed.
    return orthogonal_polar_factor(torch.cat(directions, dim=-1).mT)
