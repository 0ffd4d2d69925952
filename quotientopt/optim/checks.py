"""What an optimizer refuses, with one line that names the thing and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import wide_dtype
from quotientopt.optim.errors import GradientError
from quotientopt.optim.head_dressing import HEAD_FRAMES
from quotientopt.optim.leaves import SIDES, TRANSPORTED, Leaves
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.map import RESIDUAL

RESIDUAL_FRAMES = ("per_matrix", "shared")
LORA_FRAMES = (TRANSPORTED, *HEAD_FRAMES)


def refuse_bad_hyperparameters(options: Mapping[str, Any]) -> None:
    """Check the options of a param group.

    Raises
    ------
    ValueError
        Naming the option and what it may be.
    """
    lr, betas, foreach = options["lr"], options["betas"], options["foreach"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and foreach:
        raise ValueError("a tensor lr needs foreach=False or foreach=None")
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if not isinstance(value, int | float | Tensor) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    if (
        not isinstance(betas, tuple | list)
        or len(betas) != 2
        or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    ):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for name, known in (
        ("head_frame", HEAD_FRAMES),
        ("residual_frame", RESIDUAL_FRAMES),
        ("lora_frame", LORA_FRAMES),
    ):
        if options[name] is not None and options[name] not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{name} must be {choices} or None, got {options[name]!r}")
    every = options["refresh_every"]
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"refresh_every must be a positive integer, got {every!r}")
    limit = options["max_grad_norm"]
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ValueError(f"max_grad_norm must be a positive number or None, got {limit!r}")
    for name in (
        "nesterov",
        "polar",
        "lora_polar",
        "master_weights",
        "stochastic_rounding",
        "maximize",
        "capturable",
    ):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if options["master_weights"] and options["stochastic_rounding"]:
        raise ValueError("choose master_weights or stochastic_rounding, not both")
    if options["lora_polar"] and options["lora_frame"] != TRANSPORTED:
        raise ValueError(
            f"lora_polar needs lora_frame={TRANSPORTED!r}, got {options['lora_frame']!r}; in other "
            "frames LoRA pairs heed polar"
        )
    if foreach is not None and not isinstance(foreach, bool):
        raise ValueError(f"foreach must be True, False or None, got {foreach!r}")
    refuse_options_of_torch(options, "QuotientAdam")
    if not options.get("decoupled_weight_decay", True):
        raise ValueError("weight decay is always decoupled in QuotientAdam")


def refuse_options_of_torch(options: Mapping[str, Any], optimizer: str) -> None:
    """Refuse options of torch's optimizers that a param group asks for in vain."""
    for name in ("amsgrad", "fused", "differentiable"):
        if options.get(name):
            raise ValueError(f"{optimizer} has no {name}; leave it out")


def refuse_sparse(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse sparse gradients, as torch's AdamW does."""
    for parameter, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name_of(parameter)!r} is sparse; QuotientAdam needs dense "
                "gradients (for an embedding: sparse=False)"
            )


def refuse_nonfinite(
    norms: Sequence[Tensor],
    gradients: Mapping[Tensor, Tensor],
    name_of: Callable[[Tensor], str],
) -> None:
    """Refuse gradients that Adam cannot square, before anything has changed.

    Parameters
    ----------
    norms : sequence of Tensor
        2-norms of the gradients, dressed or not; a finite one says that all entries are finite.
    gradients : mapping
        Parameter to gradient, to find the one at fault.
    name_of : callable
        Name of a parameter.

    Raises
    ------
    GradientError
        Naming the first parameter whose gradient is NaN, infinite, or so large that the sum of its
        squares overflows.
    """
    if not norms or bool(torch.stack(list(norms)).isfinite().all()):
        return
    own = zip(gradients, norms_of(gradients.values()), strict=True)
    bad = [name_of(p) for p, norm in own if not norm.isfinite()]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    subject = f"the gradient of {bad[0]!r}{others}" if bad else "a dressed gradient"
    raise GradientError(
        f"{subject} has NaN or infinite entries, or overflows when squared; nothing was updated. "
        "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
    )


def norms_of(tensors: Iterable[Tensor], *, clipped: bool = False) -> list[Tensor]:
    """2-norms in one dtype and on one device.

    Parameters
    ----------
    tensors : iterable of Tensor
    clipped : bool
        Whether they serve to clip: then in the widest precision, whose squares do not overflow for
        any entry of float32. Else in at least float32, and infinite where Adam's square would be.
    """
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    if not tensors:
        return []
    least = wide_dtype(tensors[0].device) if clipped else torch.float32
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), least)
    norms = torch._foreach_norm(tensors, 2, dtype)
    return [norm.to(tensors[0].device) for norm in norms]


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
    unturned |= {id(leaf.parameter) for leaf in leaves.transported}
    plain = {id(parameter) for parameters in leaves.plain for parameter in parameters}
    framed = {id(leaf.parameter) for leaf in leaves.framed}
    for name in element:
        stuck: list[str] = []
        if name == RESIDUAL and symmetries.residual is not None:
            symmetries.residual.check_element(element[name])
            stream = symmetries.residual.parameters
            stuck = [n for n, p in stream.items() if id(p) in plain | unturned]
        elif name in known:
            known[name].check_element(element[name])
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


def refuse_foreign_symmetries(
    param_groups: Sequence[Mapping[str, Any]], symmetries: SymmetryMap
) -> None:
    """Refuse symmetries of another model, which would silently leave plain steps."""
    own = {id(p) for group in param_groups for p in group["params"]}
    known = {id(b.parameter) for s in symmetries.heads for b in s.blocks}
    if symmetries.residual is not None:
        known |= {id(p) for p in symmetries.residual.parameters.values()}
    if known and not known & own:
        raise ValueError(
            "the symmetries belong to another model: none of its parameters is in the "
            "optimizer; pass find_symmetries(model) of the model that is trained"
        )


def refuse_mixed_groups(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that differ between groups but belong to the whole optimizer."""
    for name in ("max_grad_norm", "refresh_every", "capturable"):
        values = {group[name] for group in param_groups}
        if len(values) > 1:
            raise ValueError(f"{name} is one for all param groups, got {sorted(values, key=str)}")
