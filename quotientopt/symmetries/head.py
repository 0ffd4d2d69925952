"""The symmetry of a family of attention heads: a structure group and the blocks it acts on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quotientopt.groups import StructureGroup
from quotientopt.symmetries.block import Block


class HeadSymmetry:
    """A structure group acting on a factor pair that lives in a model's parameters.

    The left factor A and the right factor B are tuples of blocks that share the head axis:
    ``A = [A_1, …, A_k]`` with ``A_i`` of shape ``(heads, r, n_i)``. An element g of the group,
    one per head, acts by ``(A, B) ↦ (g^{-T} A, g B)`` on every block and leaves what the model
    computes unchanged, which depends on ``AᵀB`` alone.

    Parameters
    ----------
    left, right : iterable of Block or Tensor
        Blocks of the two factors. A tensor must be a view of a parameter with shape
        ``(heads, r, n)`` or ``(heads, r)``.
    group : StructureGroup
        Acts on the r rows.
    name : str
        Unique in the model, for example ``"blocks.0.attention.qk"``.

    Raises
    ------
    ValueError
        If the blocks do not share heads and rows, the group has another size, or a factor has
        fewer columns than rows, so that it cannot have full row rank.
    """

    def __init__(
        self,
        left: Iterable[Block | Tensor],
        right: Iterable[Block | Tensor],
        group: StructureGroup,
        name: str = "",
    ) -> None:
        self.name = name
        self.group = group
        self.left_blocks = tuple(b if isinstance(b, Block) else Block.of(b) for b in left)
        self.right_blocks = tuple(b if isinstance(b, Block) else Block.of(b) for b in right)
        shapes = {block.size[:2] for block in self.blocks}
        if not self.left_blocks or not self.right_blocks or len(shapes) != 1:
            raise ValueError(
                f"symmetry {name!r} needs left and right blocks with the same heads and rows, got "
                f"{[b.size for b in self.left_blocks]} and {[b.size for b in self.right_blocks]}"
            )
        self.heads, self.rank = next(iter(shapes))
        if group.r != self.rank:
            raise ValueError(
                f"symmetry {name!r}: the group {group} does not act on blocks of {self.rank} rows"
            )
        for side, columns in zip(("left", "right"), self.columns, strict=True):
            if columns < self.rank:
                raise ValueError(
                    f"symmetry {name!r}: the {side} factor has {columns} columns, fewer than its "
                    f"{self.rank} rows, and cannot have full row rank"
                )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, those of the left factor first."""
        return self.left_blocks + self.right_blocks

    @property
    def left(self) -> tuple[Tensor, ...]:
        """Views ``(heads, r, n_i)`` of the parameters that make up the left factor A."""
        return tuple(block.view() for block in self.left_blocks)

    @property
    def right(self) -> tuple[Tensor, ...]:
        """Views ``(heads, r, m_i)`` of the parameters that make up the right factor B."""
        return tuple(block.view() for block in self.right_blocks)

    @property
    def columns(self) -> tuple[int, int]:
        """Numbers of columns (n, m) of the two factors, summed over their blocks."""
        left, right = (
            sum(block.size[2] for block in side) for side in (self.left_blocks, self.right_blocks)
        )
        return left, right

    def random_element(
        self, cond: float = 10.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A random group element per head, float64 on the CPU, shape ``(heads, r, r)``."""
        return self.group.random((self.heads,), cond=cond, generator=generator, dtype=torch.float64)

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not an element of the group for every head.

        Raises
        ------
        ValueError
            Naming the symmetry and the shape, or what is wrong with the element.
        """
        expected = (self.heads, self.rank, self.rank)
        if tuple(element.shape) != expected:
            raise ValueError(
                f"symmetry {self.name!r} needs an element of shape {expected}, "
                f"got {tuple(element.shape)}"
            )
        try:
            self.group.check_element(element)
        except ValueError as error:
            raise ValueError(f"symmetry {self.name!r}: {error}") from None

    @torch.no_grad()
    def act_(self, element: Tensor) -> None:
        """Act on the parameters in place, ``(A, B) ↦ (g^{-T} A, g B)``.

        Parameters
        ----------
        element : Tensor
            Shape ``(heads, r, r)``, in the group. Products are formed in float64 and rounded once
            to the parameters' dtype.
        """
        self.check_element(element)
        element = element.to(torch.float64)
        contragredient = self.group.inverse(element).mT
        for blocks, g in ((self.left_blocks, contragredient), (self.right_blocks, element)):
            for block in blocks:
                view = block.view()
                view.copy_(g.to(view.device) @ view.to(torch.float64))

    def __repr__(self) -> str:
        return (
            f"HeadSymmetry({self.name!r}, {self.group}, heads={self.heads}, columns={self.columns})"
        )
