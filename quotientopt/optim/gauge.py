"""The gauge in an optimizer: translations of biases in a step, elements that move its state.

**Translations.** ``b_V ↦ b_V + t``, ``b_O ↦ b_O − Σ_h W_O t`` changes nothing that a model
computes, which depends on ``W_O``, ``W_V`` and the effective bias ``β = b_O + Σ_h W_O b_V`` alone.
A step on the raw parameters sees t: the derivative along W_O at fixed b_O is not that at fixed β.
So

    ∂_{W_O} ← ∂_{W_O} − ∂_{b_O} b_Vᵀ                     before the step (at fixed β),
    b_O ← b_O + (1 − ηλ) Σ_h W_O b_V − Σ_h W_O' b_V'     after it: β moves as Adam moves b_O.

SGD adds λ b_O to the gradient of b_O instead. There the gradient takes λ Σ_h W_O b_V as well, which
makes it λβ, and the factor 1 − ηλ is left out.

Grams leave translated biases out (:func:`seen_blocks`); the bias of keys, which softmax drops,
needs nothing else: its gradient vanishes.

**Elements.** What moves the parameters may move the state along only where it has a law of
transformation: :func:`move_`; the refusals are at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from quotientopt._linalg import wide
from quotientopt.optim.bookkeeping.checks import takes_part
from quotientopt.optim.bookkeeping.slices import SIDES, Slices
from quotientopt.optim.eigenframes import rotate_
from quotientopt.optim.update import keeps_wide, round_stochastically, working_copy
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap
from quotientopt.symmetries.block import laid_out_as
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION

if TYPE_CHECKING:
    from quotientopt.optim.engine import Engine


class Held(NamedTuple):
    """One symmetry in a step: what has to be left of β's old part, and the gradients as given."""

    symmetry: HeadSymmetry
    put_out: Tensor
    gradients: dict[Tensor, Tensor]


def seen_blocks(symmetry: HeadSymmetry) -> tuple[Block, ...]:
    """The right blocks of a symmetry without biases that may be translated freely."""
    return tuple(block for block in symmetry.right_blocks if id(block) not in _moved(symmetry))


def seen_weights(symmetries: Iterable[HeadSymmetry]) -> Callable[[Block], Tensor]:
    """How to read the weights of blocks for their Grams: biases that may be translated are zero."""
    moved = {key for symmetry in symmetries for key in _moved(symmetry)}

    def read(block: Block) -> Tensor:
        view = block.view()
        return torch.zeros_like(view) if id(block) in moved else view

    return read


def _moved(symmetry: HeadSymmetry) -> set[int]:
    translation = symmetry.translation
    return set() if translation is None else {id(block) for block in translation.blocks}


def gradient_at_fixed_bias(symmetry: HeadSymmetry, block: Block) -> Tensor:
    """``∂_{W_O} − ∂_{b_O} b_Vᵀ`` of a left block whose parameter has a gradient.

    The gradient as it is where no output bias with a gradient takes a translation.
    """
    gradient = block.view(block.parameter.grad)
    translation = symmetry.translation
    if translation is None or translation.sink is None:
        return gradient
    bias, sink = translation.blocks[0], translation.sink
    own = sink.parameter.grad
    if own is None:
        return gradient
    return gradient - bias.view() * sink.view(own)


def absorbed_biases(
    symmetries: Iterable[HeadSymmetry], param_groups: Sequence[Mapping[str, Any]]
) -> list[tuple[HeadSymmetry, Mapping[str, Any]]]:
    """Symmetries whose translation the trained output bias takes, with that bias's param group."""
    owners = {id(p): group for group in param_groups for p in group["params"] if takes_part(p)}
    found = []
    for symmetry in symmetries:
        translation = symmetry.translation
        if translation is not None and translation.sink is not None:
            group = owners.get(id(translation.sink.parameter))
            if group is not None:
                found.append((symmetry, group))
    return found


def begin(
    absorbed: Sequence[tuple[HeadSymmetry, Mapping[str, Any]]], *, coupled: bool = False
) -> list[Held]:
    """Put the gradients at fixed β in place of those of the output matrices.

    Parameters
    ----------
    absorbed : sequence
        From :func:`absorbed_biases`.
    coupled : bool
        Whether the weight decay of b_O is a part of its gradient, as SGD's is.
    """
    held = []
    for symmetry, group in absorbed:
        _, sink = _blocks(symmetry)
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
            changed = gradient_at_fixed_bias(symmetry, block)
            if parameter not in replaced:
                replaced[parameter] = parameter.grad
                parameter.grad = laid_out_as(parameter.shape, parameter.stride(), parameter.grad)
            block.view(parameter.grad).copy_(changed)
        put_out = _put_out(symmetry)
        kept, decay = put_out, group["weight_decay"]
        if not coupled:
            kept = put_out * (1 - group["lr"] * decay)
        elif decay != 0:
            replaced[sink.parameter] = own
            own = laid_out_as(sink.parameter.shape, sink.parameter.stride(), own)
            sink.parameter.grad = own
            view = sink.view(sink.parameter.grad)
            view.add_((put_out * (-decay if group["maximize"] else decay)).to(view.dtype))
        held.append(Held(symmetry, kept, replaced))
    return held


def finish(
    held: Sequence[Held],
    absorbed: Sequence[tuple[HeadSymmetry, Mapping[str, Any]]],
    gate: Tensor | None,
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Let the output biases, and their masters, take what the values' biases put out now."""
    groups = {id(symmetry): group for symmetry, group in absorbed}
    for symmetry, kept, _ in held:
        group = groups[id(symmetry)]
        _, sink = _blocks(symmetry)
        change = kept - _put_out(symmetry)
        if gate is not None:
            change = change * gate.to(change.device)
        parameter = sink.parameter
        if "master_weights" not in group or not keeps_wide(group, parameter):
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
    """Give the parameters the gradients that they had."""
    for _, _, gradients in reversed(held):
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


def move_(engine: Engine, element: Mapping[str, Tensor]) -> None:
    """Move QuotientAdam's state along with parameters on which ``element`` acts.

    Dressed quantities stay; head frames go to ``u g^{-1}`` (left) and ``u gᵀ`` (right), residual
    frames to ``O Q`` and their covariances to ``O R Oᵀ``.
    """
    for heads in engine.heads:
        heads.move_(element)
    for pairs in engine.pairs:
        pairs.move_(element)
    rotation = element.get(RESIDUAL)
    if rotation is not None:
        for bucket in engine.buckets:
            bucket.rotate_(rotation)
        for shared in engine.shared.values():
            rotate_(shared.frame, shared.covariance, rotation)


def refuse_unmovable(
    element: Mapping[str, Tensor], symmetries: SymmetryMap, slices: Slices
) -> None:
    """Refuse to move state that has no law of transformation: that of plain Adam.

    Raises
    ------
    ValueError
        If the element names an unknown symmetry, or acts on parameters without the frame that
        would make their state dressed.
    """
    known = {symmetry.name: symmetry for symmetry in symmetries.heads}
    covered = {(slice_.symmetry.name, slice_.side) for slice_ in slices.framed if slice_.symmetry}
    unturned = {id(slice_.parameter) for slice_ in slices.framed if not slice_.residual}
    unturned |= {id(slice_.parameter) for slice_ in slices.transported}
    plain = {id(parameter) for parameters in slices.plain for parameter in parameters}
    framed = {id(slice_.parameter) for slice_ in slices.framed}
    for name in element:
        blocked: list[str] = []
        if name == RESIDUAL and symmetries.residual is not None:
            symmetries.residual.check_element(element[name])
            stream = symmetries.residual.parameters
            blocked = [n for n, p in stream.items() if id(p) in plain | unturned]
        elif name in known:
            known[name].check_element(element[name])
            sides = (known[name].left_blocks, known[name].right_blocks)
            blocked = [
                block.name
                for side, blocks in zip(SIDES, sides, strict=True)
                for block in blocks
                if (name, side) not in covered and id(block.parameter) in plain | framed
            ]
        elif (translated := _translated(name, symmetries)) is not None:
            translated.check_translation(element[name])
        else:
            _refuse_lawless(name, symmetries)
        if blocked:
            raise ValueError(
                f"cannot move the optimizer's state by {name!r}: that of {blocked[0]!r} is plain "
                "Adam's and depends on the gauge; use a head_frame and a residual_frame"
            )


def refuse_untaken_translations(
    element: Mapping[str, Tensor],
    symmetries: SymmetryMap,
    absorbed: Iterable[tuple[HeadSymmetry, Any]],
) -> None:
    """Refuse translations of values' biases whose output bias is not trained.

    Derivatives at a fixed effective bias, which the state holds otherwise, do not see them; those
    at a fixed output bias do, and by how much the state cannot know.

    Parameters
    ----------
    element : mapping of str to Tensor
    symmetries : SymmetryMap
    absorbed : iterable
        Of :func:`absorbed_biases`.

    Raises
    ------
    ValueError
        Naming the translation and the output bias.
    """
    taken = {symmetry.name + TRANSLATION for symmetry, _ in absorbed}
    for name in element:
        symmetry = _translated(name, symmetries)
        if name in taken or symmetry is None or symmetry.translation is None:
            continue
        sink = symmetry.translation.sink
        if sink is not None:
            raise ValueError(
                f"cannot move the optimizer's state by {name!r}: {sink.name!r}, which takes the "
                "translation, is not trained here, so that the state depends on the gauge; leave "
                "the name out of the element"
            )


def _translated(name: str, symmetries: SymmetryMap) -> HeadSymmetry | None:
    """The symmetry whose biases the part of an element of that name translates."""
    return next(
        (
            symmetry
            for symmetry in symmetries.heads
            if symmetry.translation is not None and symmetry.name + TRANSLATION == name
        ),
        None,
    )


def _refuse_lawless(name: str, symmetries: SymmetryMap) -> NoReturn:
    """Refuse a name that is unknown, or acts on parameters with plain state alone."""
    if name in symmetries.names:
        first = next(symmetry for symmetry in symmetries.linear if symmetry.name == name)
        raise ValueError(
            f"cannot move the optimizer's state by {name!r}: that of {first.blocks[0].name!r} is "
            "plain and depends on the gauge; leave the name out of the element, or dress hidden "
            "units with QuotientAdam(hidden_units=True)"
        )
    known = sorted(symmetry.name for symmetry in symmetries.heads)
    raise ValueError(f"no symmetry called {name!r}; known: {known}")


def refuse_foreign_element(element: Mapping[str, Tensor], symmetries: SymmetryMap) -> None:
    """Refuse a group element that does not act on these symmetries.

    Raises
    ------
    ValueError
        For an unknown name, or an element of the wrong shape or outside its group.
    """
    known: dict[str, HeadSymmetry] = {symmetry.name: symmetry for symmetry in symmetries.heads}
    for name, g in element.items():
        if name == RESIDUAL and symmetries.residual is not None:
            symmetries.residual.check_element(g)
        elif name in known:
            known[name].check_element(g)
        elif (translated := _translated(name, symmetries)) is not None:
            translated.check_translation(g)
        else:
            _refuse_lawless(name, symmetries)
