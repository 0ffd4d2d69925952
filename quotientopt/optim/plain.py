"""torch's AdamW for parameters without a frame."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quotientopt._linalg import compute_dtype
from quotientopt.optim.rounding import round_stochastically


def plain_step(
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
        _working_copy(parameter, state[parameter]) if keeps_wide(group, parameter) else parameter
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


def _working_copy(parameter: Tensor, own: Mapping[str, Any]) -> Tensor:
    """The parameter's master; where it was written to in the meantime, or has none, itself."""
    wide = parameter.detach().to(compute_dtype(parameter.dtype))
    if "master" not in own:
        return wide
    master = own["master"]
    return torch.where(master.to(parameter.dtype) == parameter, master, wide)
