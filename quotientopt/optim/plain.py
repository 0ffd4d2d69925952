"""torch's AdamW for parameters without a frame."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def plain_step(
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    scale: Tensor | None,
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
    """
    if not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale is not None:
        gradients = [gradient * scale.to(gradient) for gradient in gradients]
    for parameter in parameters:
        own = state[parameter]
        if not own:
            double = torch.get_default_dtype() == torch.float64
            own["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                own[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    states = [state[parameter] for parameter in parameters]
    adamw(
        list(parameters),
        gradients,
        [own["exp_avg"] for own in states],
        [own["exp_avg_sq"] for own in states],
        [],
        [own["step"] for own in states],
        foreach=group["foreach"],
        capturable=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        has_complex=any(torch.is_complex(p) for p in parameters),
    )
