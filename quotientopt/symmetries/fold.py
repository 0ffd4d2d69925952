"""Fold gains and centring of norms into the matrices around them, which makes O(d) exact.

First folding itself; then LayerNorm without its centring, which folding makes superfluous, and how
it is saved.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import outside_autocast, wide
from quotientopt.symmetries.exactness import Ownership
from quotientopt.symmetries.find import collect, find_stream, find_symmetries
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.residual import SHOWN, Norm, Stream, norm_breakers
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
      :class:`~quotientopt.symmetries.fold.UncentredLayerNorm`, with the same parameters.

    An optimizer created before has to be created anew. Trained or rotated, a stream leaves mean
    zero and no model of LayerNorms computes the same: see
    :class:`~quotientopt.symmetries.fold.UncentredLayerNorm` for how it is saved then.

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
            if copies:
                copies += _untie_(model, _tied_by_the_flag(model))
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
        for parameter in model.parameters():
            parameter.grad = None  # They were those of other weights.
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


def _tied_by_the_flag(model: nn.Module) -> list[str]:
    """What transformers ties again only while ``tie_word_embeddings`` is set, and would not save.

    Embeddings that share a parameter and are not among the names that it knows as tied (Pegasus'
    encoder and decoder).
    """
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is None:
        return []
    known = getattr(model, "_tied_weights_keys", None) or {}
    covered = {*known, *(known.values() if isinstance(known, dict) else ())}
    first: dict[int, str] = {}
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name and name not in covered
    ]


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


# Means of rounded entries are this many times smaller than what counts as a mean.
ROUNDINGS = 8


class StreamWriters:
    """Everything that writes to a folded model's stream: does it still write mean zero?

    Shared by the norms of the model, copied and pickled with them.

    Parameters
    ----------
    model : Module
    writers : iterable of (Module, str, int)
        Module, name of its parameter, residual axis.
    """

    def __init__(self, model: nn.Module, writers: Iterable[tuple[nn.Module, str, int]]) -> None:
        self._model = model
        self._writers = list(writers)
        self._answer: tuple[weakref.ref[Any], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_writers": self._writers, "_answer": None}

    def are_centred(self, occasion: object = None) -> bool:
        """Whether all vectors written have mean zero, up to the rounding of their entries.

        Not where a writer was replaced: of another module nothing is known.

        Parameters
        ----------
        occasion : object, optional
            The values are looked at once as long as this object lives.
        """
        if self._answer is not None and self._answer[0]() is occasion is not None:
            return self._answer[1]
        present = set(self._model.modules())
        answer = all(
            module in present and _is_centred(getattr(module, name), axis)
            for module, name, axis in self._writers
        )
        try:
            self._answer = weakref.ref(occasion), answer
        except TypeError:
            self._answer = None
        return answer


@torch.no_grad()
def _is_centred(parameter: Tensor, axis: int) -> bool:
    vectors = wide(parameter.detach()).movedim(axis, -1)
    # Float32 may have been made float64 since.
    eps = max(torch.finfo(parameter.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = ROUNDINGS * eps * vectors.square().mean(-1).sqrt() / vectors.shape[-1] ** 0.5
    return bool((vectors.mean(-1).abs() <= allowed).all())


class UncentredLayerNorm(nn.LayerNorm):
    """A LayerNorm that does not subtract the mean: ``γ ∘ x / √(mean(x²) + ε) + β``.

    :func:`quotientopt.fold_norms_` puts it in the place of a LayerNorm once everything that writes
    to the stream writes vectors of mean zero. On such vectors both compute the same, and this one
    commutes with all of O(d) (γ = 1). Parameters and ``state_dict`` keys are those of LayerNorm.

    Training, or a rotation of the stream, leaves mean zero, and a LayerNorm that subtracts the mean
    then computes something else. No LayerNorm computes the same, so entries of the ``state_dict``
    are then marked by an axis of length one in front, ``(1, d)``: a model of LayerNorms refuses
    their shape, a folded one takes them.

    Attributes
    ----------
    writers : StreamWriters, optional
        What writes to the stream. Without it entries are never marked.
    """

    writers: StreamWriters | None = None
    # Whether the entries that were loaded last were marked; None before.
    loaded_marked: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axes of `x`."""
        # Marked entries, as `functional_call` puts in those of a state dict, have an axis more.
        own = (self.weight, self.bias)
        weight, bias = (None if p is None else p.view(self.normalized_shape) for p in own)
        x = functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return x if bias is None else x + bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or self.writers is None or self.writers.are_centred(destination):
            return
        if self.weight is None:
            raise ValueError(
                f"{prefix}: the stream has left mean zero, and a norm without parameters cannot "
                "be saved so that only folded models load it; save the whole module with "
                "torch.save(model)"
            )
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = destination[prefix + name].unsqueeze(0)
        warnings.warn(
            "the residual stream of this folded model has left mean zero, which no LayerNorm "
            "reproduces: the gains of its norms are saved in shape (1, d), which only a folded "
            "model loads. Build the model anew, fold_norms_(model), and load_state_dict there; "
            "from_pretrained refuses the shape",
            UserWarning,
            stacklevel=2,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is None or not isinstance(value, Tensor):
                continue
            marked = value.shape == (1, *parameter.shape)
            if marked:
                state_dict[prefix + name] = value.squeeze(0)
            self.loaded_marked = marked
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)


def warn_of_centring_weights(model: nn.Module, incompatible: Any) -> None:
    """Warn of weights of a model with LayerNorms that were loaded into a folded one.

    A hook after ``load_state_dict``. Such weights are not marked, and what writes to the stream
    does not write mean zero. So it is where the values of a folded model's ``named_parameters`` are
    loaded, which is right.
    """
    norms = [module for module in model.modules() if isinstance(module, UncentredLayerNorm)]
    plain = [norm for norm in norms if norm.loaded_marked is False and norm.writers is not None]
    for norm in norms:
        norm.loaded_marked = None
    if plain and plain[0].writers is not None and not plain[0].writers.are_centred():
        warnings.warn(
            f"this {type(model).__name__} was folded and its norms do not subtract the mean, and "
            "the weights just loaded need it, unless a folded model was trained to them: load "
            "weights of LayerNorms into a model built anew, then fold_norms_ it",
            UserWarning,
            stacklevel=2,
        )
