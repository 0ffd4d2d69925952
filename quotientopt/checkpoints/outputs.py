"""What a checkpoint's model computes from random inputs, and whether its symmetries hold there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.checkpoints.errors import CheckpointError, first_line
from quotientopt.checkpoints.example_inputs import example_inputs
from quotientopt.symmetries import SymmetryMap, find_symmetries, gaps
from quotientopt.symmetries.verification import floating_tensors


class LogitsOnly(nn.Module):
    """A model without the hidden states it returns, which turn with the residual stream.

    Returns the logits, or everything where there are none.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        output = self.model(**inputs)
        if not isinstance(output, Mapping):
            return output
        return {k: v for k, v in output.items() if k.startswith("logits")} or output


@torch.no_grad()
def outputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point outputs from random inputs, in the model's own dtype.

    Raises
    ------
    CheckpointError
        If the model does not run on inputs made from its configuration, or is not finite there.
    """
    try:
        inputs = example_inputs(model)
        output = LogitsOnly(model)(**inputs)
    except CheckpointError:
        raise
    except Exception as error:  # a model may fail in any way on inputs that do not suit it
        raise CheckpointError(
            f"{type(model).__name__} does not run on random inputs: {first_line(error)}"
        ) from error
    found = dict(floating_tensors(output, "output"))
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{name!r} of {type(model).__name__} is not finite")
    return found


def symmetries_of_checkpoint(model: nn.Module) -> SymmetryMap:
    """The symmetries by class; where something is not understood, from random inputs as well.

    Parameters
    ----------
    model : Module
        Of transformers. Where no inputs can be made for it, what the classes tell is all.
    """
    symmetries = find_symmetries(model)
    if not gaps(model, symmetries):
        return symmetries
    try:
        outputs_of(model)
        return find_symmetries(model, **example_inputs(model))
    except (CheckpointError, ValueError):
        return symmetries


def verify_checkpoint(model: nn.Module, symmetries: SymmetryMap) -> dict[str, float]:
    """Largest relative deviations on random inputs, see :meth:`SymmetryMap.verify`.

    Raises
    ------
    CheckpointError
        If the model does not run on inputs made from its configuration.
    """
    outputs_of(model)
    return symmetries.verify(LogitsOnly(model), **example_inputs(model))
