"""Fold gains and centring of norms into the matrices around them, which makes O(d) exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast, wide
from quotientopt.symmetries.exactness import Ownership
from quotientopt.symmetries.find import collect, find_stream, find_symmetries
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.norm import Norm
from quotientopt.symmetries.residual import SHOWN, Stream, norm_breakers
from quotientopt.symmetries.uncentred import (
    StreamWriters,
    UncentredLayerNorm,
    warn_of_centring_weights,
)
from quotientopt.symmetries.verification import unchanged_outputs


@torch.no_grad()
@outside_autocast()
def fold_norms_(
    model: nn.Module, *, untie: bool = False, example_inputs: Any = None
) -> SymmetryMap:
    """Fold the norms of the residual stream into the matrices around them, in place.

    The function stays the same and O(d) becomes exact:

    - Gains γ and biases β go into what reads the norm's output: ``W (γ ∘ n + β) + c`` becomes
      ``(W diag γ) n + (c + W β)``. Where a reader has no bias c, β becomes β / γ instead.
      Gains then multiply by one and stop training (``requires_grad`` False).
    - Centring goes into what writes to the stream: embeddings, output matrices and their biases
      lose their mean over the residual axis. Every LayerNorm becomes an
      :class:`~quotientopt.symmetries.uncentred.UncentredLayerNorm`, with the same parameters.

    An optimizer created before has to be created anew. Trained or rotated, a stream leaves mean
    zero and no model of LayerNorms computes the same: see
    :class:`~quotientopt.symmetries.uncentred.UncentredLayerNorm` for how it is saved then.

    Parameters
    ----------
    model : Module
        A model whose adapter knows everything that reads its norms.
    untie : bool
        Give a matrix that reads the stream its own copy where it is tied to an embedding, and set
        ``model.config.tie_word_embeddings`` to False. Otherwise such a model is refused: one
        matrix cannot take up a gain as a head and stay as it is as an embedding.
    example_inputs : Tensor, tuple or mapping, optional
        Arguments of the model: its outputs on them, in float64, are compared before and after.

    Returns
    -------
    SymmetryMap
        The symmetries afterwards, with an exact residual stream.

    Raises
    ------
    ValueError
        If the model is not known, a norm's output is read by a skip connection (post-norm) or by
        something unknown, something else than norms breaks O(d), a bias would have to be divided
        by a gain of zero, a matrix is tied, or the outputs on `example_inputs` change. Nothing is
        changed.
    """
    copies: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        if untie:
            copies = _untie_(model, _Plan.of(*_known_stream(model)).shared)
        stream, ownership = _known_stream(model)
        plan = _Plan.of(stream, ownership)
        if plan.tied:
            way_out = "; fold_norms_(model, untie=True) unties embeddings" if plan.shared else ""
            raise _refusal(model, plan.tied[0] + way_out)
    except Exception:
        for module, attribute, parameter in copies:
            setattr(module, attribute, parameter)
        raise
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    trained = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        if copies and tied is not None:
            config.tie_word_embeddings = False
        with unchanged_outputs(model, example_inputs, "folding"):
            for norm in plan.norms:
                _fold_gain_(norm, ownership)
            if plan.centred:
                _centre_(stream, ownership)
                _uncentre_(model, plan.centred, stream, ownership)
    except BaseException:
        _recentre_(model, plan.centred)
        for parameter, flag, gradient in trained:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        if copies and tied is not None:
            config.tie_word_embeddings = tied
        for module, attribute, parameter in copies:
            setattr(module, attribute, parameter)
        raise
    return find_symmetries(model)


def folding_obstacle(model: nn.Module) -> str | None:
    """Why :func:`fold_norms_` refuses a model even with ``untie=True``; None if it does not."""
    copies: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        copies = _untie_(model, _Plan.of(*_known_stream(model)).shared)
        tied = _Plan.of(*_known_stream(model)).tied
        return tied[0] if tied else None
    except ValueError as error:
        return str(error).partition(": ")[2]
    finally:
        for module, attribute, parameter in copies:
            setattr(module, attribute, parameter)


def _centre_(stream: Stream, ownership: Ownership) -> None:
    """Take the mean from all that writes to the stream."""
    for name in sorted(stream.writers):
        vectors = ownership.parameter(name).movedim(stream.axes[name], -1)
        vectors.sub_(wide(vectors).mean(-1, keepdim=True))


def _uncentre_(
    model: nn.Module, norms: Sequence[Norm], stream: Stream, ownership: Ownership
) -> None:
    """Replace the norms' class; they are saved as what they are from now on."""
    places = (name.rpartition(".") for name in sorted(stream.writers))
    writers = StreamWriters(
        model,
        (
            (model.get_submodule(path), attribute, stream.axes[f"{path}{dot}{attribute}"])
            for path, dot, attribute in places
        ),
    )
    for norm in norms:
        module = model.get_submodule(norm.name)
        module.__class__ = UncentredLayerNorm
        module.writers = writers  # type: ignore[assignment]
    if warn_of_centring_weights not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(warn_of_centring_weights)


def _recentre_(model: nn.Module, norms: Sequence[Norm]) -> None:
    """Undo :func:`_uncentre_`."""
    for norm in norms:
        module: nn.Module = model.get_submodule(norm.name)
        if isinstance(module, UncentredLayerNorm):
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
            vars(module).pop("writers", None)


def _known_stream(model: nn.Module) -> tuple[Stream, Ownership]:
    """The stream, if nothing but norms breaks its O(d)."""
    findings = collect(model)
    ownership = Ownership(model)
    stream, reason = find_stream(model, findings, ownership)
    if stream is None:
        raise _refusal(model, reason)
    unread = [norm for norm in stream.norms if norm.readers is None]
    for norm in unread:
        breakers = norm_breakers(norm, ownership)
        if breakers:
            stream.breakers.append(
                f"{breakers[0]}, whose output is read by a skip connection or something unknown"
            )
    centred = [norm.name for norm in stream.norms if norm.centres]
    stream.breakers += [
        f"centring of {name}, which is no plain LayerNorm"
        for name in centred
        if not isinstance(model.get_submodule(name), nn.LayerNorm)
    ]
    if centred and stream.raw_readers:
        stream.breakers.append(
            f"centring of {centred[0]}, while {stream.raw_readers[0]} reads the stream as it is"
        )
    stream.breakers += [
        f"gain {norm.gain} is zero where the bias {norm.bias} is not"
        for norm in stream.norms
        if _divides_by_zero(norm, ownership)
    ]
    if stream.breakers:
        raise _refusal(model, "; ".join(stream.breakers[:SHOWN]))
    return stream, ownership


@dataclass
class _Plan:
    """What is to be folded, and what stands in the way because values are used twice.

    Attributes
    ----------
    norms : list of Norm
        Those with a gain that is not one, or is trainable.
    centred : list of Norm
        Those that subtract the mean.
    tied : list of str
        Lines that name a tied parameter and what it keeps from being folded.
    shared : list of str
        Names of matrices that read a norm's output and are tied to what writes to the stream.
    """

    norms: list[Norm] = field(default_factory=list)
    centred: list[Norm] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, stream: Stream, ownership: Ownership) -> _Plan:
        plan = cls(centred=[norm for norm in stream.norms if norm.centres])
        uses: Counter[str] = Counter()
        for norm in stream.norms:
            uses.update({ownership.first_name(reader.weight) for reader in norm.readers or ()})
        for norm in stream.norms:
            breakers = norm_breakers(norm, ownership)
            if not breakers:
                continue
            if norm.gain is not None:
                plan.norms.append(norm)
            names = [reader.weight for reader in norm.readers or ()]
            shared = [name for name in names if ownership.first_name(name) in stream.writers]
            moves = not _is_neutral(norm, ownership)
            foreign: list[str] = []
            if moves:
                vectors = [norm.gain, norm.bias, *(reader.bias for reader in norm.readers or ())]
                names += [name for name in vectors if name is not None]
                foreign = ownership.used_elsewhere(map(ownership.parameter, names), names)
                foreign += [first for first in map(ownership.first_name, names) if uses[first] > 1]
            # Centring takes the mean from an embedding, which is felt where it is read as well.
            if shared and (moves or norm.centres):
                foreign = [ownership.first_name(shared[0]), *foreign]
                plan.shared += shared
            if foreign:
                plan.tied.append(
                    f"{breakers[0]} cannot be folded, {foreign[0]} is tied and its other use "
                    "would change"
                )
        return plan


def _untie_(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give those matrices a copy of their values; returns what they had, to be put back."""
    replaced = []
    for name in dict.fromkeys(names):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module.get_parameter(attribute)
        replaced.append((module, attribute, parameter))
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(module, attribute, copy)
    return replaced


def _fold_gain_(norm: Norm, ownership: Ownership) -> None:
    assert norm.gain is not None
    gain = ownership.parameter(norm.gain)
    if not _is_neutral(norm, ownership):
        readers = {ownership.first_name(reader.weight): reader for reader in norm.readers or ()}
        factor = _factor(norm, ownership)
        bias = None if norm.bias is None else ownership.parameter(norm.bias)
        if bias is not None and all(reader.bias is not None for reader in readers.values()):
            for reader in readers.values():
                rows = ownership.parameter(reader.weight).movedim(reader.axis, -1)
                shift = ownership.parameter(reader.bias or "")
                shift.add_((wide(rows) @ wide(bias)).to(shift.dtype))
            bias.zero_()
        elif bias is not None:
            bias.copy_(torch.where(bias == 0, 0, wide(bias) / factor))
        for reader in readers.values():
            rows = ownership.parameter(reader.weight).movedim(reader.axis, -1)
            rows.copy_(wide(rows) * factor)
        gain.fill_(norm.neutral)
    gain.requires_grad_(False)
    gain.grad = None


def _factor(norm: Norm, ownership: Ownership) -> Tensor:
    """γ, from the gain's parameter."""
    return wide(ownership.parameter(norm.gain or "").detach()) + (1 - norm.neutral)


def _is_neutral(norm: Norm, ownership: Ownership) -> bool:
    return norm.gain is None or bool((ownership.parameter(norm.gain) == norm.neutral).all())


def _divides_by_zero(norm: Norm, ownership: Ownership) -> bool:
    if norm.gain is None or norm.bias is None or _is_neutral(norm, ownership):
        return False
    if all(reader.bias is not None for reader in norm.readers or ()):
        return False
    bias = ownership.parameter(norm.bias)
    return bool(((_factor(norm, ownership) == 0) & (bias != 0)).any())


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"folding is not available for {type(model).__name__}: {reason}")
