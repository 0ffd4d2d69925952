"""What an optimizer refuses, with one line that names the thing and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.head_dressing import HEAD_FRAMES
from quotientopt.optim.leaves import SIDES, Leaves
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.map import RESIDUAL

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
    # A finite 2-norm says that all is finite, in one fast pass. An infinite one may be overflow of
    # finite gradients of 1e20, so that only then every entry is looked at.
    norms = torch._foreach_norm(tensors)
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms))
    if bool(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]).isfinite().all()):
        return
    bad = [name_of(p) for p, gradient in gradients.items() if not gradient.isfinite().all()]
    if not bad:
        return
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise ValueError(
        f"the gradient of {bad[0]!r}{others} has NaN or infinite entries; nothing was updated. "
        "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
    )


def refuse_unmovable(
    element: Mapping[str, Tensor], symmetries: SymmetryMap, leaves: Leaves
) -> None:
    """Refuse to move state that has no law of transformation: that of plain Adam.

    Raises
    ------
    ValueError
        If the element names an unknown symmetry, or acts on parameters without the frame that
        would make their state dressed.
    """
    known = {symmetry.name: symmetry for symmetry in symmetries.heads}
    covered = {(leaf.symmetry.name, leaf.side) for leaf in leaves.framed if leaf.symmetry}
    unturned = {id(leaf.parameter) for leaf in leaves.framed if not leaf.residual}
    plain = {id(parameter) for parameters in leaves.plain for parameter in parameters}
    framed = {id(leaf.parameter) for leaf in leaves.framed}
    for name in element:
        stuck: list[str] = []
        if name == RESIDUAL and symmetries.residual is not None:
            stream = symmetries.residual.parameters
            stuck = [n for n, p in stream.items() if id(p) in plain | unturned]
        elif name in known:
            sides = (known[name].left_blocks, known[name].right_blocks)
            stuck = [
                block.name
                for side, blocks in zip(SIDES, sides, strict=True)
                for block in blocks
                if (name, side) not in covered and id(block.parameter) in plain | framed
            ]
        else:
            raise ValueError(f"no symmetry called {name!r}; known: {sorted(known)}")
        if stuck:
            raise ValueError(
                f"cannot move the optimizer's state by {name!r}: that of {stuck[0]!r} is plain "
                "Adam's and depends on the gauge; use a head_frame and a residual_frame"
            )
