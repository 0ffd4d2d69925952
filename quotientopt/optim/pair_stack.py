"""Factor pairs of equal shape, stacked over symmetries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quotientopt.symmetries import Block, HeadSymmetry

ShapeKey = tuple[object, ...]


def shape_key(symmetry: HeadSymmetry) -> ShapeKey:
    """What two symmetries must share to be computed as one batch."""
    return (
        symmetry.group,
        tuple(block.size for block in symmetry.left_blocks),
        tuple(block.size for block in symmetry.right_blocks),
        tuple((block.parameter.dtype, block.parameter.device) for block in symmetry.blocks),
    )


def stack_factors(
    symmetries: Sequence[HeadSymmetry], read: Callable[[Block], Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both factors of S symmetries of one shape, ``(S, heads, r, n)`` and ``(S, heads, r, m)``.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
        With one :func:`shape_key`.
    read : callable
        Block to tensor ``(heads, r, columns)``: of the weights, the gradients, the momenta. The
        blocks of a factor are laid side by side along the columns.
    dtype : torch.dtype
    """
    left = _stack([symmetry.left_blocks for symmetry in symmetries], read, dtype)
    return left, _stack([symmetry.right_blocks for symmetry in symmetries], read, dtype)


def _stack(
    rows: Sequence[Sequence[Block]], read: Callable[[Block], Tensor], dtype: torch.dtype
) -> Tensor:
    places = zip(*rows, strict=True)
    columns = [torch.stack([read(b) for b in blocks]).to(dtype) for blocks in places]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)


def columns_of(blocks: Sequence[Block]) -> Iterator[slice]:
    """Where each block of a factor lies in the stacked columns."""
    start = 0
    for block in blocks:
        yield slice(start, start + block.size[2])
        start += block.size[2]


def refuse_scattered(symmetry: HeadSymmetry) -> None:
    """Refuse a pair whose blocks lie on several devices.

    Raises
    ------
    ValueError
        Naming the symmetry and both devices.
    """
    devices = {str(block.parameter.device) for block in symmetry.blocks}
    if len(devices) > 1:
        raise ValueError(
            f"symmetry {symmetry.name!r} lies on several devices ({', '.join(sorted(devices))}); "
            "keep the parameters of a pair on one"
        )
