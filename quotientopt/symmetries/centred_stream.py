"""A residual stream whose norms subtract the mean: O(d) is reduced to the stabiliser of ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quotientopt.groups import StabilizerOfOnes
from quotientopt.symmetries.residual import ResidualStream


@dataclass(frozen=True, eq=False)
class CentredStream(ResidualStream):
    """A residual stream that nothing but the centring of LayerNorms singles a vector out of.

    O(d) is broken, but the rotations and reflections that fix the all-ones vector, a copy of
    O(d − 1), are symmetries. :func:`quotientopt.fold_norms_` makes all of O(d) exact.
    """

    @property
    def group(self) -> StabilizerOfOnes:
        """The stabiliser of the all-ones vector in O(d)."""
        return StabilizerOfOnes(self.dimension)

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not an orthogonal d×d matrix that fixes the all-ones vector.

        Raises
        ------
        ValueError
            Naming what is wrong.
        """
        if tuple(element.shape) != (self.dimension, self.dimension):
            raise ValueError(
                f"the residual stream needs an element of shape {(self.dimension,) * 2}, "
                f"got {tuple(element.shape)}"
            )
        try:
            self.group.check_element(element)
        except ValueError as error:
            raise ValueError(
                f"the residual stream is centred ({self.broken_by[0]}, …): {error}"
            ) from None
