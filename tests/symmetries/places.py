"""Where symmetries act, head by head, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quotientopt.symmetries import Block, HeadSymmetry


def place(block: Block, head: int) -> tuple[Any, ...]:
    """Where one head of a block lies."""
    _, r, n = block.size
    step, row, column = block.stride
    strides = (row if r > 1 else 0, column if n > 1 else 0)
    return block.name, (r, n), strides, block.offset + head * step


def places(symmetries: Iterable[HeadSymmetry]) -> set[Any]:
    """Group and blocks of every head; which factor is called the left one is a matter of names."""
    return {
        (
            str(s.group),
            frozenset(
                frozenset(place(block, head) for block in side)
                for side in (s.left_blocks, s.right_blocks)
            ),
        )
        for s in symmetries
        for head in range(s.heads)
    }
