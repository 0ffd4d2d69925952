"""The affine part of the gauge in a step: biases of values that the output bias can take.

``b_V ↦ b_V + t``, ``b_O ↦ b_O − Σ_h W_O t`` changes nothing that a model computes, which depends
on ``W_O``, ``W_V`` and the effective bias ``β = b_O + Σ_h W_O b_V`` alone. Adam on the raw
parameters sees t: the derivative along W_O at fixed b_O is not that at fixed β. So

    ∂_{W_O} ← ∂_{W_O} − ∂_{b_O} b_Vᵀ                     before the step (at fixed β),
    b_O ← b_O + (1 − ηλ) Σ_h W_O b_V − Σ_h W_O' b_V'     after it: β moves as Adam moves b_O.

Grams of a dressing leave translated biases out (:mod:`quotientopt.optim.frames`); the bias of keys,
which softmax drops, needs nothing else: its gradient vanishes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import wide
from quotientopt.optim.plain import keeps_wide, working_copy
from quotientopt.optim.update import round_stochastically
from quotientopt.symmetries import Block, HeadSymmetry


class Held(NamedTuple):
    """One symmetry in a step: what its value biases put out before, and its gradients."""

    symmetry: HeadSymmetry
    put_out: Tensor
    gradients: dict[Tensor, Tensor]


def absorbed_biases(
    symmetries: Iterable[HeadSymmetry], param_groups: Sequence[Mapping[str, Any]]
) -> list[tuple[HeadSymmetry, Mapping[str, Any]]]:
    """Symmetries whose translation the trained output bias takes, with that bias's param group."""
    owners = {id(p): group for group in param_groups for p in group["params"] if p.requires_grad}
    found = []
    for symmetry in symmetries:
        translation = symmetry.translation
        if translation is not None and translation.sink is not None:
            group = owners.get(id(translation.sink.parameter))
            if group is not None:
                found.append((symmetry, group))
    return found


def begin(absorbed: Sequence[tuple[HeadSymmetry, Mapping[str, Any]]]) -> list[Held]:
    """Put the gradients at fixed β in place of those of the output matrices."""
    held = []
    for symmetry, _ in absorbed:
        bias, sink = _blocks(symmetry)
        own = sink.parameter.grad
        gradients = [own, *(block.parameter.grad for block in symmetry.left_blocks)]
        # Sparse ones are left as they are, for the step to refuse by name.
        if own is None or any(g is not None and g.layout != torch.strided for g in gradients):
            continue
        replaced: dict[Tensor, Tensor] = {}
        for block in symmetry.left_blocks:
            parameter = block.parameter
            if parameter.grad is None:
                continue
            if parameter not in replaced:
                replaced[parameter] = parameter.grad
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            block.view(parameter.grad).sub_(bias.view() * sink.view(own))
        held.append(Held(symmetry, _put_out(symmetry), replaced))
    return held


def finish(
    held: Sequence[Held],
    absorbed: Sequence[tuple[HeadSymmetry, Mapping[str, Any]]],
    gate: Tensor | None,
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Let the output biases, and their masters, take what the values' biases put out now."""
    groups = {id(symmetry): group for symmetry, group in absorbed}
    for symmetry, before, _ in held:
        group = groups[id(symmetry)]
        _, sink = _blocks(symmetry)
        kept = 1 - group["lr"] * group["weight_decay"]
        change = before * kept - _put_out(symmetry)
        if gate is not None:
            change = change * gate
        parameter = sink.parameter
        if not keeps_wide(group, parameter):
            view = sink.view()
            view.add_(change.to(view.dtype))
            continue
        own = state.get(parameter, {})
        master = own.get("master")
        if master is not None and master.shape != parameter.shape:
            own = {}  # A dressed bias: its bucket sees that the parameter was written to.
        copy = working_copy(parameter, own)
        sink.view(copy).add_(change)
        if "master" in own:
            own["master"].copy_(copy)
        stochastic = group["stochastic_rounding"]
        parameter.copy_(round_stochastically(copy, parameter.dtype) if stochastic else copy)


def put_back(held: Sequence[Held]) -> None:
    """Give the output matrices the gradients that they had."""
    for _, _, gradients in held:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _blocks(symmetry: HeadSymmetry) -> tuple[Block, Block]:
    """The bias of the values and the output bias."""
    translation = symmetry.translation
    assert translation is not None
    assert translation.sink is not None
    return translation.blocks[0], translation.sink


def _put_out(symmetry: HeadSymmetry) -> Tensor:
    """``Σ_h W_O b_V``, shape (d,)."""
    bias, _ = _blocks(symmetry)
    b = wide(bias.view()).squeeze(-1)
    outputs = [torch.einsum("hrd,hr->d", wide(left), b) for left in symmetry.left]
    return torch.stack(outputs).sum(0)
