"""The numerical null space: along how many directions of its weights a model computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.symmetries.double import KeepFloat64

# Singular values, over the largest: nothing may lie between these.
ZERO, CLEAR = 1e-12, 1e-8


def null_dimension(model: nn.Module, runs: Sequence[Callable[[nn.Module], Tensor]]) -> int:
    """Dimension of the null space of the derivative of all outputs with respect to all weights.

    In float64, by singular values, which must leave a clear gap.

    Parameters
    ----------
    model : Module
        In float64 and evaluation mode.
    runs : sequence of callable
        Each runs the model it is given on a batch of its own. All outputs together have to be as
        many as the weights at least.
    """
    names = [name for name, _ in model.named_parameters()]
    values = tuple(parameter.detach() for parameter in model.parameters())
    shell = _Shell(model)
    rows = []
    for run in runs:

        def outputs(*weights: Tensor, run: Callable[[nn.Module], Tensor] = run) -> Tensor:
            given = {f"model.{name}": w for name, w in zip(names, weights, strict=True)}
            return functional_call(shell, given, (run,)).flatten()

        with KeepFloat64():
            derivative = jacrev(outputs, argnums=tuple(range(len(values))))(*values)
        rows.append(torch.cat([part.flatten(1) for part in derivative], dim=1))
    jacobian = torch.cat(rows)
    assert jacobian.shape[0] >= jacobian.shape[1], "too few outputs for so many weights"
    singular = torch.linalg.svdvals(jacobian)
    relative = singular / singular[0]
    between = (relative > ZERO) & (relative < CLEAR)
    assert not between.any(), f"no clear gap: {relative[between].tolist()}"
    return int((relative <= ZERO).sum())


class _Shell(nn.Module):
    """So that a function of the module is called with other parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Tensor]) -> Tensor:
        return run(self.model)
