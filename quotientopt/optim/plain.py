"""torch's AdamW and SGD for parameters without a symmetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from quotientopt._linalg import compute_dtype
from quotientopt.optim.update import round_stochastically
from quotientopt.symmetries import Block


def adamw_step(
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    scale: Tensor | None,
    gate: Tensor | None = None,
) -> None:
    """One step of torch's AdamW on ``parameters``, all of which have a gradient.

    Parameters
    ----------
    group : dict
        Hyperparameters.
    parameters : sequence of Tensor
    state : mapping
        The optimizer's state; made as torch makes it where missing.
    scale : Tensor, optional
        Factor of the gradients, from clipping.
    gate : Tensor, optional
        One, or zero for a step that may change nothing.
    """
    if not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale is not None:
        gradients = [gradient * scale.to(gradient) for gradient in gradients]
    working = [
        working_copy(parameter, state[parameter]) if keeps_wide(group, parameter) else parameter
        for parameter in parameters
    ]
    gradients = [grad.to(copy.dtype) for grad, copy in zip(gradients, working, strict=True)]
    for parameter, copy in zip(parameters, working, strict=True):
        own = state[parameter]
        if "exp_avg" not in own:
            double = torch.get_default_dtype() == torch.float64
            own["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
            if group["capturable"] or gate is not None:
                own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                own[key] = torch.zeros_like(copy, memory_format=torch.preserve_format)
        for key in ("exp_avg", "exp_avg_sq"):
            # The parameter may have another dtype than it had.
            own[key] = own[key].to(copy.dtype)
    states = [state[parameter] for parameter in parameters]
    on_host = parameters[0].device.type == "cpu"
    adamw(
        working,
        gradients,
        [own["exp_avg"] for own in states],
        [own["exp_avg_sq"] for own in states],
        [],
        [own["step"] for own in states],
        foreach=group["foreach"] if gate is None else None,
        # Only the fused form can be told on the device to leave everything as it is.
        fused=None if gate is None else True,
        found_inf=None if gate is None else (1 - gate).float(),
        capturable=group["capturable"] and not on_host,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        has_complex=any(torch.is_complex(p) for p in parameters),
    )
    for parameter, copy in zip(parameters, working, strict=True):
        if copy is parameter:
            continue
        if group["master_weights"]:
            state[parameter]["master"] = copy
        stochastic = group["stochastic_rounding"]
        parameter.copy_(round_stochastically(copy, parameter.dtype) if stochastic else copy)


def keeps_wide(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether to compute with, and keep state for, a wider copy of a parameter.

    Where options ask for it, and in float16, whose smallest number is above ε and g².
    """
    wanted = group["master_weights"] or group["stochastic_rounding"]
    wanted = wanted or parameter.dtype == torch.float16
    return bool(wanted) and compute_dtype(parameter.dtype) != parameter.dtype


def working_copy(parameter: Tensor, own: Mapping[str, Any]) -> Tensor:
    """The parameter's master; where it was written to in the meantime, or has none, itself."""
    wide = parameter.detach().to(compute_dtype(parameter.dtype))
    if "master" not in own:
        return wide
    master = own["master"]
    return torch.where(master.to(parameter.dtype) == parameter, master, wide)


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
