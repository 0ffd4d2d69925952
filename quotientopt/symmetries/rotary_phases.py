"""The unitary rotations of rotary planes: what normalised queries and keys leave of (C*)^{r/2}."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import skew_part
from quotientopt.groups import O, RotaryCommutant, StructureGroup
from quotientopt.groups.base import check_cond


class RotaryPhases(StructureGroup):
    """O(r − rotary_dim) × U(1)^{rotary_dim/2}: the orthogonal elements of a rotary commutant.

    An RMS norm over a head's queries or keys fixes the lengths that (C*)^{rotary_dim/2} would
    change. What is left turns every plane by an angle and rotates the rows that pass.

    Parameters
    ----------
    r : int
        Number of rows of both factors.
    rotary_dim : int, optional
        Number of rotated rows (the default: all of them).
    layout : {"half", "interleaved"}
        As for :class:`~quotientopt.groups.RotaryCommutant`.
    """

    def __init__(self, r: int, rotary_dim: int | None = None, layout: str = "half") -> None:
        super().__init__(r)
        self.commutant = RotaryCommutant(r, rotary_dim, layout)

    @property
    def dim(self) -> int:
        """One angle per plane, and the dimension of the rotations of the rows that pass."""
        passing = len(self.commutant.pass_rows)
        return len(self.commutant.planes) + passing * (passing - 1) // 2

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniformly distributed elements; `cond` is checked and has no effect, as for O(r)."""
        check_cond(cond)
        return self.commutant.random(
            batch_shape, cond=1.0, generator=generator, dtype=dtype, device=device
        )

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """The skew part of the projection to the commutant's algebra."""
        return skew_part(self.commutant.algebra_projection(matrix))

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` is orthogonal and commutes with all rotations."""
        O(self.r).check_element(g)
        self.commutant.check_element(g)

    def _wide_inverse(self, g: Tensor) -> Tensor:
        return g.mT

    def _parameters(self) -> tuple[object, ...]:
        return (self.commutant,)

    def __repr__(self) -> str:
        return (
            f"RotaryPhases({self.r}, rotary_dim={self.commutant.rotary_dim}, "
            f"layout={self.commutant.layout!r})"
        )
