"""The residual stream: which axis of which parameter lives in it, and what breaks O(d)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quotientopt.groups import O


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a model and the orthogonal group acting on it.

    Q in O(d) acts by ``W ↦ W Qᵀ`` on every parameter, written with its residual axis last. That
    leaves the model's function unchanged only where nothing singles out a basis of the stream;
    ``broken_by`` lists what does. The axes serve as residual frames of the optimizer in both
    cases.

    Attributes
    ----------
    dimension : int
        Width d of the stream.
    axes : mapping of str to int
        Parameter name to the axis that is the residual stream.
    parameters : mapping of str to Tensor
        The same names to the parameters.
    broken_by : tuple of str
        What breaks O(d); empty when the symmetry is exact.
    """

    dimension: int
    axes: Mapping[str, int]
    parameters: Mapping[str, Tensor]
    broken_by: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all of O(d) is a symmetry of the model."""
        return not self.broken_by

    @property
    def group(self) -> O | None:
        """The group that is a symmetry: O(d), or None where it is broken."""
        return O(self.dimension) if self.exact else None

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not a d×d orthogonal matrix, and any if O(d) is broken.

        Raises
        ------
        ValueError
            Naming what breaks the symmetry, the shape, or that the matrix is not orthogonal.
        """
        if self.broken_by:
            raise ValueError(
                "the residual stream has no O(d) symmetry, it is broken by "
                f"{', '.join(self.broken_by)}"
            )
        if tuple(element.shape) != (self.dimension, self.dimension):
            raise ValueError(
                f"the residual stream needs an element of shape {(self.dimension,) * 2}, "
                f"got {tuple(element.shape)}"
            )
        O(self.dimension).check_element(element)

    @torch.no_grad()
    def act_(self, element: Tensor) -> None:
        """Rotate every parameter in place, ``W ↦ W Qᵀ`` along its residual axis.

        Parameters
        ----------
        element : Tensor
            Q, shape ``(d, d)``, orthogonal.

        Raises
        ------
        ValueError
            If O(d) is broken, or the shape is wrong.
        """
        self.check_element(element)
        for name, axis in self.axes.items():
            rows = self.parameters[name].detach().movedim(axis, -1)
            q = element.to(device=rows.device, dtype=torch.float64)
            rows.copy_(rows.to(torch.float64) @ q.mT)
