"""What an SVD leaves open, fixed: signs, phases, and bases of equal singular values.

The rows of the right factor in the SVD section are right singular vectors of AᵀB up to scale. A
simple one is known up to its sign, those of k equal singular values up to O(k). Both are fixed by
one rule, a QR decomposition with column pivoting: among the columns of the k×m block the longest is
turned to the first axis, positively; among what remains of the others the longest to the second;
and so on. It reads the span alone, so that every representative of an orbit ends at the same rows.
For k = 1 it makes the entry of largest modulus positive.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, locate_first, row_signs, wide
from quotientopt._lyapunov import orthogonal_polar_factor


class Turn(NamedTuple):
    """What :func:`turn_of_rows` finds.

    Attributes
    ----------
    element : Tensor
        Orthogonal elements of the group, ``(*batch, r, r)``, which act on both factors alike.
    gap : Tensor
        Smallest difference of neighbouring singular values over the largest, ``(*batch,)``;
        infinite where there are fewer than two.
    """

    element: Tensor
    gap: Tensor


def turn_of_rows(rows: Tensor, values: Tensor, stored: torch.dtype, *, equal: bool = True) -> Turn:
    """Signs, and rotations among rows whose singular values coincide.

    Parameters
    ----------
    rows : Tensor
        Shape ``(*batch, r, m)``, orthogonal to each other.
    values : Tensor
        Their singular values in decreasing order, ``(*batch, r)``.
    stored : torch.dtype
        Dtype of the parameters, which decides what :func:`clusters` counts as equal.
    equal : bool
        Whether to look for equal singular values, which waits for the device; otherwise signs are
        fixed alone.
    """
    if values.shape[-1] == 0:
        return Turn(torch.diag_embed(values), smallest_gap(values))
    element = torch.diag_embed(row_signs(rows).squeeze(-1))
    gap = smallest_gap(values)
    if not equal:
        return Turn(element, gap)
    flat, size = element.reshape(-1, *element.shape[-2:]), values.shape[-1]
    rows = rows.reshape(-1, *rows.shape[-2:])
    for (start, stop), found in clusters(values.reshape(-1, size), stored).items():
        index = torch.tensor(found, device=rows.device)
        flat[index, start:stop, start:stop] = pivoted_rotation(rows[index, start:stop])
    return Turn(flat.reshape(element.shape), gap)


def smallest_gap(values: Tensor) -> Tensor:
    """Smallest difference of neighbours over the largest, ``(*batch, r) -> (*batch,)``.

    Infinite for fewer than two values; zero where all vanish.
    """
    differences = (values[..., :-1] - values[..., 1:]).abs()
    relative = differences / torch.where(values[..., :1] > 0, values[..., :1], 1)
    return torch.nn.functional.pad(relative, (0, 1), value=torch.inf).amin(dim=-1)


def gap_of_present(values: Tensor) -> Tensor:
    """:func:`smallest_gap` among those that do not vanish; rows of zeros have no axes to choose."""
    most = torch.where(values[..., :1] > 0, values[..., :1], 1)
    steps = (values[..., :-1] - values[..., 1:]) / most
    steps = torch.where(values[..., 1:] > 0, steps, torch.inf)
    return torch.nn.functional.pad(steps, (0, 1), value=torch.inf).amin(dim=-1)


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
        See :func:`turn_of_rows`.
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


def check_gap_options(kind: str, return_gap: bool, warn_below: float | None) -> None:
    """Refuse what only the section ``"svd"`` has: a gap between singular values."""
    if kind != "svd" and (return_gap or warn_below is not None):
        raise ValueError(
            f"the section {kind!r} has no spectral gap: return_gap and warn_below are for 'svd'"
        )


def warn_of_gap(gap: Tensor, warn_below: float | None) -> None:
    """Warn if a gap is not above `warn_below`; waits for the device if there is one."""
    if warn_below is None:
        return
    small = gap <= warn_below
    if bool(small.any()):
        warnings.warn(
            f"relative gap of singular values {gap.min().item():.1e}{locate_first(small)}, not "
            f"above {warn_below:.1e}: axes are determined to the precision of the input over it",
            stacklevel=4,
        )
