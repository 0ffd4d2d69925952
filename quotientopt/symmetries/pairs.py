"""Factor pairs of head symmetries: low-rank ones told apart, those of one shape stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quotientopt.groups import GL, PlaneCommutant, StructureGroup
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.head import HeadSymmetry


def is_lora_pair(symmetry: HeadSymmetry) -> bool:
    """Whether a symmetry is a pair of low-rank factors, as the adapters of peft name and build it.

    One whole matrix on each side with GL(r) between them, called ``….lora.<adapter>``.
    """
    parts = symmetry.name.split(".")
    return (
        len(parts) > 1
        and parts[-2] == "lora"
        and isinstance(symmetry.group, GL)
        and len(symmetry.blocks) == 2
        and all(b.size[0] * b.size[1] * b.size[2] == b.parameter.numel() for b in symmetry.blocks)
    )


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

    Rows of planes that share a frequency are in order (:func:`in_order`).

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
    right = _stack([symmetry.right_blocks for symmetry in symmetries], read, dtype)
    group = symmetries[0].group
    if isinstance(group, PlaneCommutant):
        rows = torch.tensor(group.row_order, device=left.device)
        left, right = left[..., rows, :], right[..., rows, :]
    return left, right


def in_order(group: StructureGroup) -> StructureGroup:
    """The group of stacked factors, of whose Gram matrices Cholesky factors are in the group."""
    return group.in_order() if isinstance(group, PlaneCommutant) else group


def as_stored(group: StructureGroup, X: Tensor) -> Tensor:
    """Stacked rows back in the order of the blocks."""
    if not isinstance(group, PlaneCommutant):
        return X
    return X[..., torch.tensor(group.row_order, device=X.device).argsort(), :]


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


PAIR_METRICS = ("preconditioned", "right-invariant")
