"""torch's SGD on what no symmetry covers: whole parameters, and the rests of fused ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from quotientopt._linalg import compute_dtype
from quotientopt.symmetries import Block

BUFFER = "momentum_buffer"


def sgd_step(
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """One step of torch's SGD on ``parameters``, all of which have a gradient.

    Parameters
    ----------
    group : dict
        Hyperparameters.
    parameters : sequence of Tensor
    state : mapping
        The optimizer's state; momenta are made as torch makes them where missing.
    """
    if not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    buffers: list[Tensor | None] = []
    if group["momentum"] != 0:
        buffers = [state[p].get(BUFFER) for p in parameters]
    sgd(
        list(parameters),
        gradients,
        buffers,
        has_sparse_grad=any(gradient.is_sparse for gradient in gradients),
        foreach=group["foreach"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    if group["momentum"] != 0:
        for parameter, buffer in zip(parameters, buffers, strict=True):
            state[parameter][BUFFER] = buffer


def sgd_step_of_block(
    group: Mapping[str, Any], uncovered: Block, buffers: Callable[[Tensor], Tensor]
) -> None:
    """The same on what the symmetries of a fused parameter leave uncovered.

    Parameters
    ----------
    group : dict
        Hyperparameters.
    rest : Block
        Of a parameter that has a gradient.
    buffers : callable
        Parameter to its momentum buffer.
    """
    weights, gradient = uncovered.view(), uncovered.view(uncovered.parameter.grad)
    exact = weights.to(compute_dtype(weights.dtype))
    step = gradient.to(exact.dtype) * (-1 if group["maximize"] else 1)
    step = step + group["weight_decay"] * exact
    if group["momentum"] != 0:
        buffer = uncovered.view(buffers(uncovered.parameter))
        buffer.mul_(group["momentum"]).add_(step)
        step = step + group["momentum"] * buffer if group["nesterov"] else buffer
    weights.copy_(exact - group["lr"] * step)
