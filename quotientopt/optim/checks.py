"""What an optimizer refuses, with one line that names the thing and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.head_dressing import HEAD_FRAMES

RESIDUAL_FRAMES = ("per_matrix", "shared")


def refuse_bad_hyperparameters(options: Mapping[str, Any]) -> None:
    """Check the options of a param group.

    Raises
    ------
    ValueError
        Naming the option and what it may be.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {options[name]}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name, known in (("head_frame", HEAD_FRAMES), ("residual_frame", RESIDUAL_FRAMES)):
        if options[name] is not None and options[name] not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{name} must be {choices} or None, got {options[name]!r}")
    every = options["refresh_every"]
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"refresh_every must be a positive integer, got {every!r}")
    limit = options["max_grad_norm"]
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {limit}")
    if options["capturable"]:
        raise ValueError("capturable=True is not available yet; use capturable=False")


def refuse_sparse(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, as torch's AdamW does."""
    for parameter, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name_of(parameter)!r} is sparse; QuotientAdam needs dense "
                "gradients (for an embedding: sparse=False)"
            )


def refuse_nonfinite(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse NaN and infinite gradients before anything has changed."""
    tensors = [gradient for gradient in gradients.values() if gradient.numel()]
    # The largest entry, not the 2-norm: finite gradients of 1e20 would overflow that in float32.
    norms = torch._foreach_norm(tensors, ord=float("inf"))
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms))
    if bool(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]).isfinite().all()):
        return
    bad = [name_of(p) for p, gradient in gradients.items() if not gradient.isfinite().all()]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise ValueError(
        f"the gradient of {bad[0]!r}{others} has NaN or infinite entries; nothing was updated. "
        "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
    )
