"""What lies outside the factor pairs: embeddings, norms, biases of writing layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quotientopt._linalg import wide
from quotientopt.canonical.reading import effective_shift, multipliers, rotate_axis
from quotientopt.symmetries import ResidualStream, SymmetryMap


@dataclass(frozen=True, eq=False)
class Outside:
    """A parameter, or what the factor pairs leave of it.

    Attributes
    ----------
    parameter : Tensor
    covered : Tensor, optional
        Mask of the entries that belong to factor pairs; None if there are none.
    axis : int, optional
        Which axis is the residual stream; None if none is.
    shift : Tensor, optional
        What the biases of values add to an output bias: it is read as ``β = b_O + Σ_h W_O b_V``.
    multiplier : Tensor, optional
        What brings normalised queries and keys to one length.
    """

    parameter: Tensor
    covered: Tensor | None
    axis: int | None
    shift: Tensor | None = None
    multiplier: Tensor | None = None

    def values(self, rotation: Tensor | None = None) -> Tensor:
        """The values in the widest precision, zero where covered, as no translation changes them.

        Parameters
        ----------
        rotation : Tensor, optional
            Q: as they are after ``W ↦ W Qᵀ``.
        """
        values = wide(self.parameter.detach())
        if self.shift is not None:
            values = values + self.shift.to(values)
        if self.multiplier is not None:
            values = values * self.multiplier
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
    """Parameters that factor pairs do not cover, or not wholly, by name."""
    covered: dict[int, Tensor] = {}
    for symmetry in symmetries.pairs:
        for block in symmetry.blocks:
            parameter = block.parameter
            if id(parameter) not in covered:
                covered[id(parameter)] = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=torch.bool, device=parameter.device
                ).fill_(False)
            block.view(covered[id(parameter)]).fill_(True)
    axes = residual_axes(symmetries.residual)
    shifts, factors = effective_shifts(symmetries), multipliers(symmetries)
    found = {}
    for name, parameter in model.named_parameters():
        mask, key = covered.get(id(parameter)), id(parameter)
        if mask is None or not bool(mask.all()):
            found[name] = Outside(parameter, mask, axes.get(key), shifts.get(key), factors.get(key))
    return found


def effective_shifts(symmetries: SymmetryMap) -> dict[int, Tensor]:
    """What biases of values add to output biases: ``id`` of these to tensors shaped like them."""
    found: dict[int, Tensor] = {}
    for symmetry in symmetries.heads:
        shift = effective_shift(symmetry)
        if shift is None or symmetry.translation is None or symmetry.translation.sink is None:
            continue
        sink = symmetry.translation.sink
        parameter = sink.parameter
        if id(parameter) not in found:
            found[id(parameter)] = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=shift.dtype, device=parameter.device
            ).zero_()
        sink.view(found[id(parameter)]).add_(shift.to(parameter.device))
    return found


def residual_axes(stream: ResidualStream | None) -> dict[int, int]:
    """``id`` of every parameter on the residual stream to its axis."""
    if stream is None:
        return {}
    return {id(stream.parameters[name]): axis for name, axis in stream.axes.items()}
