"""Acting on a model in training: parameters, gradients and the optimizer's state together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import outside_autocast, wide
from quotientopt.canonical.reading import rotate_axis
from quotientopt.symmetries import Block, HeadSymmetry, ScaleSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION


def refuse_uneven(symmetries: SymmetryMap) -> None:
    """Refuse pairs that cannot be moved as one.

    Raises
    ------
    ValueError
        If one parameter of a pair is trained and another frozen, or dtypes or devices differ. The
        output bias that takes up a translation belongs to the pair.
    """
    for symmetry in symmetries.linear:
        parameters = [(_name(block), block.parameter) for block in _touched(symmetry)]
        trained = [name for name, p in parameters if p.requires_grad]
        frozen = [name for name, p in parameters if not p.requires_grad]
        if trained and frozen:
            raise ValueError(
                f"symmetry {symmetry.name!r}: {trained[0]!r} is trained and {frozen[0]!r} is "
                "frozen, and a change of gauge changes both; make requires_grad equal, or leave "
                "the symmetry out with symmetries="
            )
        for kind in ("dtype", "device"):
            found = {getattr(p, kind): name for name, p in parameters}
            if len(found) > 1:
                (one, name), (other, second) = list(found.items())[:2]
                raise ValueError(
                    f"symmetry {symmetry.name!r}: {name!r} has {kind} {one} and {second!r} has "
                    f"{other}; give all parameters of a pair one {kind}"
                )


def refuse_sparse_gradients(symmetries: SymmetryMap) -> None:
    """Refuse sparse gradients, which cannot be moved along; ``ValueError`` names the parameter."""
    moved = symmetries.linear
    touched = [(_name(b), b.parameter) for symmetry in moved for b in _touched(symmetry)]
    if symmetries.residual is not None:
        touched += symmetries.residual.parameters.items()
    for name, parameter in touched:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name!r} is sparse and cannot be moved along; set it to None "
                "with zero_grad() first"
            )


def _touched(symmetry: HeadSymmetry | ScaleSymmetry) -> tuple[Block, ...]:
    """All blocks that an element changes."""
    translation = getattr(symmetry, "translation", None)
    sink = None if translation is None else translation.sink
    return symmetry.blocks if sink is None else (*symmetry.blocks, sink)


def _name(block: Block) -> str:
    """The parameter's name, or its shape where a hand-made block has none."""
    return block.name or f"parameter of shape {tuple(block.parameter.shape)}"


def refuse_foreign_optimizer(optimizer: Any, symmetries: SymmetryMap) -> None:
    """Refuse an optimizer whose state cannot be moved by elements of these symmetries.

    Raises
    ------
    TypeError
        If it has no ``move_state_``: the state of Adam has no law of transformation.
    ValueError
        If its symmetries do not have the same names on the same parameters.
    """
    if not hasattr(optimizer, "move_state_") or not hasattr(optimizer, "symmetries"):
        raise TypeError(
            f"the state of {type(optimizer).__name__} depends on the gauge and cannot be moved "
            "along; train with QuotientAdam, or make the optimizer anew after optimizer=None"
        )
    own = {symmetry.name: symmetry for symmetry in optimizer.symmetries.pairs}
    for symmetry in symmetries.pairs:
        other = own.get(symmetry.name)
        if other is None or _places(other) != _places(symmetry):
            raise ValueError(
                f"symmetry {symmetry.name!r} is not among those of the optimizer; pass "
                "symmetries=optimizer.symmetries, of the model that it trains"
            )


def _places(symmetry: HeadSymmetry) -> list[tuple[object, ...]]:
    sides = (symmetry.left_blocks, symmetry.right_blocks)
    return [
        (side, id(block.parameter), block.size, block.stride, block.offset)
        for side, blocks in enumerate(sides)
        for block in blocks
    ]


@torch.no_grad()
@outside_autocast()
def move_(symmetries: SymmetryMap, element: Mapping[str, Tensor], optimizer: Any = None) -> None:
    """Act on parameters, on gradients that are there, and on the optimizer's state.

    Gradients move contragrediently: ``(∂_A, ∂_B) ↦ (g ∂_A, g^{-T} ∂_B)``, along the residual stream
    like the parameters, and under a translation that the output bias takes up ``∂_{W_O} ↦ ∂_{W_O} +
    t ∂_{b_O}ᵀ``. So a step taken afterwards is the one that was due.

    Parameters
    ----------
    symmetries : SymmetryMap
    element : mapping of str to Tensor
        As for :meth:`SymmetryMap.act_`, in the groups.
    optimizer : optional
        With ``move_state_``, which gets the linear part of the element.

    Raises
    ------
    ValueError
        If an element is not in its group, or the optimizer refuses it; nothing is changed then.
    """
    linear: dict[str, HeadSymmetry | ScaleSymmetry] = {
        symmetry.name: symmetry for symmetry in symmetries.linear
    }
    affine = {symmetry.name + TRANSLATION: symmetry for symmetry in symmetries.heads}
    for name, g in element.items():
        if name in affine:
            affine[name].check_translation(g)
        elif name != RESIDUAL:
            linear[name].check_element(g)
        elif symmetries.residual is not None:
            symmetries.residual.check_element(g)
    if optimizer is not None:
        optimizer.move_state_({name: g for name, g in element.items() if name not in affine})
    symmetries.act_(element)
    for name, g in element.items():
        if name in linear:
            _move_gradients_(linear[name], g)
    # Translations act last.
    for name, t in element.items():
        if name in affine:
            _translate_gradients_(affine[name], t)
    stream = symmetries.residual
    if RESIDUAL in element and stream is not None:
        for name, axis in stream.axes.items():
            gradient = stream.parameters[name].grad
            if gradient is not None:
                gradient.copy_(rotate_axis(wide(gradient), axis, element[RESIDUAL]))


def _move_gradients_(symmetry: HeadSymmetry | ScaleSymmetry, element: Tensor) -> None:
    contragredient = symmetry.group.inverse(wide(element)).mT
    sides: tuple[tuple[tuple[Block, ...], Tensor], ...] = ((symmetry.blocks, contragredient),)
    if isinstance(symmetry, HeadSymmetry):
        sides = (
            (symmetry.left_blocks, wide(element)),
            (symmetry.right_blocks, contragredient),
        )
    for blocks, g in sides:
        for block in blocks:
            if block.parameter.grad is not None:
                view = gradient_view(block)
                moved = g.to(view.device)
                scalar = moved.shape[-1] == 1
                view.copy_(moved * wide(view) if scalar else moved @ wide(view))


def _translate_gradients_(symmetry: HeadSymmetry, t: Tensor) -> None:
    assert symmetry.translation is not None
    sink = symmetry.translation.sink
    if sink is None or sink.parameter.grad is None:
        return
    outputs = wide(gradient_view(sink))
    for block in symmetry.left_blocks:
        if block.parameter.grad is not None:
            view = gradient_view(block)
            view.copy_(wide(view) + wide(t).to(view.device).unsqueeze(-1) * outputs)


def gradient_view(block: Block) -> Tensor:
    """The block of its parameter's gradient, to be written to.

    Blocks are views by strides: a gradient laid out otherwise than the parameter is laid out anew,
    or the block would be one of a copy.
    """
    parameter = block.parameter
    assert parameter.grad is not None
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return block.view(parameter.grad)
