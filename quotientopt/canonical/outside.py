"""What lies outside the head pairs: embeddings, MLPs, norms, biases of writing layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quotientopt._linalg import wide
from quotientopt.canonical.reading import rotate_axis
from quotientopt.symmetries import ResidualStream, SymmetryMap


@dataclass(frozen=True, eq=False)
class Outside:
    """A parameter, or what the head pairs leave of it.

    Attributes
    ----------
    parameter : Tensor
    covered : Tensor, optional
        Mask of the entries that belong to head pairs; None if there are none.
    axis : int, optional
        Which axis is the residual stream; None if none is.
    """

    parameter: Tensor
    covered: Tensor | None
    axis: int | None

    def values(self, rotation: Tensor | None = None) -> Tensor:
        """The values in the widest precision, zero where covered.

        Parameters
        ----------
        rotation : Tensor, optional
            Q: as they are after ``W ↦ W Qᵀ``.
        """
        values = wide(self.parameter.detach())
        if self.covered is not None:
            values = values.masked_fill(self.covered, 0)
        if rotation is not None and self.axis is not None:
            values = rotate_axis(values, self.axis, rotation)
        return values

    def rows(self) -> Tensor:
        """The values as ``(rows, d)``, the residual stream last."""
        assert self.axis is not None
        return self.values().movedim(self.axis, -1).reshape(-1, self.parameter.shape[self.axis])


def outside_of(model: nn.Module, symmetries: SymmetryMap) -> dict[str, Outside]:
    """Parameters that head pairs do not cover, or not wholly, by name."""
    covered: dict[int, Tensor] = {}
    for symmetry in symmetries.heads:
        for block in symmetry.blocks:
            parameter = block.parameter
            if id(parameter) not in covered:
                covered[id(parameter)] = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=torch.bool, device=parameter.device
                ).fill_(False)
            block.view(covered[id(parameter)]).fill_(True)
    axes = residual_axes(symmetries.residual)
    found = {}
    for name, parameter in model.named_parameters():
        mask = covered.get(id(parameter))
        if mask is None or not bool(mask.all()):
            found[name] = Outside(parameter, mask, axes.get(id(parameter)))
    return found


def residual_axes(stream: ResidualStream | None) -> dict[int, int]:
    """``id`` of every parameter on the residual stream to its axis."""
    if stream is None:
        return {}
    return {id(stream.parameters[name]): axis for name, axis in stream.axes.items()}
