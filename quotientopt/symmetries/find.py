"""Find the symmetries of a model: by the classes of its modules, and from example inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quotientopt.symmetries.block import any_sharded, refuse_flattened, stand_ins
from quotientopt.symmetries.census import further_directions
from quotientopt.symmetries.discovery import Discovery, FoundStream, discover
from quotientopt.symmetries.exactness import (
    Elements,
    Ownership,
    half_trainable,
    with_one_dtype,
    with_own_sinks,
    without_conflicts,
)
from quotientopt.symmetries.head import BY_CLASS, HeadSymmetry
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.pairs import is_lora_pair
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    bare_modules,
    inside,
    looks_like_attention,
    lookup,
    plain,
    unwrapped,
)
from quotientopt.symmetries.residual import (
    CentredStream,
    ResidualStream,
    Stream,
    add_up,
    norm_breakers,
    unknown_layers,
)
from quotientopt.symmetries.verification import arguments_of

_SHOWN = 3
# Why inputs show no residual stream.
NO_ATTENTION = "no attention was found in it, whose heads would tell"


@dataclass
class Findings:
    """Contributions of a model's modules, by module name, and what was not understood."""

    contributions: dict[str, Contribution] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)


def find_symmetries(model: nn.Module, *inputs: Any, **kwargs: Any) -> SymmetryMap:
    """Find the symmetries of a model that are known to be exact, or that its gradients show.

    Without inputs a symmetry is known where the class of a module is. With the arguments of a call,
    everything else is found by its Noether charges, ``∂_B Bᵀ = A ∂_Aᵀ``, from gradients of random
    functions of the outputs, whatever the classes are; every pair found is proved by acting with a
    random element of its group, and by a larger group that moves the outputs.

    Parameters
    ----------
    model : Module
        Any module. It is left as it was.
    *inputs, **kwargs
        Arguments of one call of the model, a batch of its data for example: several tokens per
        text, or nothing attends to anything.

    Returns
    -------
    SymmetryMap
        Symmetries of heads and of hidden units, each with how it is known, the residual stream, and
        the attention modules that are not understood.

    Raises
    ------
    TypeError
        If ``model`` is not a Module.
    ValueError
        If a parameter has no plain floating-point values (meta device, uninitialised, quantised);
        the message names it. If FSDP1 or DeepSpeed has flattened the parameters; DTensors
        (``fully_shard``) are understood, by class alone. A quantised base under low-rank adapters
        is listed as not understood instead. If the model does not run on the inputs, its outputs
        have no gradient, are not finite or differ between two runs, or there is too little memory.

    Warns
    -----
    UserWarning
        If the two sides of a pair have different dtypes: it is then left out and listed as
        unrecognized. If only one side of a pair is trainable: it is kept, being exact, but acting
        on it changes frozen parameters.

    Notes
    -----
    Cost with inputs: four forward and backward passes in float64, two short runs of the smallest
    module around each pair, and two float64 copies of the parameters, four where the batch has more
    tokens than matrices have rows; or of one module after the other where four are more than half
    of the memory that is free.

    Examples
    --------
    >>> print(find_symmetries(model, tokens))  # doctest: +SKIP
    >>> find_symmetries(model, **batch).unrecognized  # doctest: +SKIP
    """
    if isinstance(model, nn.Module):
        refuse_flattened(model, model.parameters())
        if any_sharded(model.parameters()):
            return _of_sharded(model, bool(inputs or kwargs))
    findings = collect(model)
    ownership = Ownership(model)
    contributions = findings.contributions.values()
    claimed = [symmetry for contribution in contributions for symmetry in contribution.heads]
    heads, conflicting = without_conflicts(with_own_sinks(claimed, ownership), ownership)
    of_units = [
        symmetry for contribution in contributions for symmetry in contribution.hidden_units
    ]
    units, _ = with_one_dtype(without_conflicts(of_units, ownership)[0])
    residual, reason = merge_residual(model, findings, ownership)
    found, overlapping = Discovery(), list[str]()
    if inputs or kwargs:
        found, overlapping = _beside([*heads, *units], discover(model, inputs, kwargs))
    if residual is None and found.stream is not None:
        residual = _stream_of(found.stream, ownership)
    if residual is None and (inputs or kwargs):
        reason = NO_ATTENTION
    if residual is not None:
        order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        parameters = sorted(residual.parameters.items(), key=lambda item: order[id(item[1])])
        residual = replace(residual, parameters=dict(parameters), dropouts=_dropouts(model))
    heads, mixed = with_one_dtype([*heads, *found.heads])
    _warn(mixed, "mixes dtypes, which no group element can move as one: left out")
    _warn(
        half_trainable(heads),
        "is trainable on one side only: acting on it (act_, dress_) changes frozen parameters",
    )
    unrecognized = _without_found(_unrecognized(model, findings), heads)
    stream, why = find_stream(model, findings, ownership)
    if stream is None and residual is not None:
        why = "norms on the residual stream, which is found and not known by class"
    further = further_directions(model, stream, why, findings.contributions, ownership, heads)
    return SymmetryMap(
        [_named(symmetry, ownership) for symmetry in heads],
        residual,
        further=further,
        residual_reason=reason,
        unrecognized=[*unrecognized, *conflicting, *mixed],
        gauge_free=_gauge_free(model, findings),
        left_alone={name: why for c in contributions for name, why in c.left_alone.items()},
        hidden_units=[_named(symmetry, ownership) for symmetry in [*units, *found.hidden_units]],
        scales=[*(scale for c in contributions for scale in c.scales), *found.scales],
        not_exercised=[*found.not_exercised, *found.not_examined],
        overlapping=overlapping,
    )


def _of_sharded(model: nn.Module, with_inputs: bool) -> SymmetryMap:
    """The symmetries of a model with DTensor parameters, by the classes of its modules."""
    if with_inputs:
        raise ValueError(
            "symmetries are found from example inputs on whole parameters, and the model's are "
            "sharded: find them before fully_shard, and pass symmetries.for_model(model) after it"
        )
    with stand_ins(model) as stood_for:
        symmetries = find_symmetries(model)
    return symmetries.on(stood_for)


def _dropouts(model: nn.Module) -> tuple[str, ...]:
    """Dropout modules that mask something in training."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
    return tuple(n for n, m in model.named_modules() if isinstance(m, kinds) and m.p > 0)


def symmetries_from(model: nn.Module, example_inputs: Any = None) -> SymmetryMap:
    """The symmetries of a model from a batch as a data loader gives it.

    Parameters
    ----------
    model : Module
    example_inputs : Tensor, tuple, list or mapping, optional
        A tensor is the one argument, a tuple or list the positional ones, a mapping the keyword
        arguments of the call. None: by class alone.

    Raises
    ------
    TypeError
        For anything else.
    """
    if example_inputs is None:
        return find_symmetries(model)
    args, kwargs = arguments_of(example_inputs)
    return find_symmetries(model, *args, **kwargs)


def gaps(model: nn.Module, symmetries: SymmetryMap) -> str:
    """What of a model is not understood, and the way out, in one line; empty if nothing is.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap
        Found in it.
    """
    kind = type(model).__name__
    call = "pass example_inputs=batch (a tensor, a tuple or a mapping), from which it is found"
    if symmetries.unrecognized:
        names = ", ".join(symmetries.unrecognized[:_SHOWN])
        more = len(symmetries.unrecognized) - _SHOWN
        names += f" and {more} more" if more > 0 else ""
        return f"the symmetries of {names} in {kind} are not understood: {call}"
    if not symmetries.heads and symmetries.residual is None and not symmetries.gauge_free:
        return (
            f"{kind} has no attention and no low-rank pair that is known, and no residual stream: "
            f"if it has, {call}"
        )
    if symmetries.residual is None and not all(map(is_lora_pair, symmetries.heads)):
        reason = symmetries.residual_reason
        if reason == NO_ATTENTION:
            return f"example inputs show no residual stream of {kind} ({reason})"
        return f"the residual stream of {kind} is not understood ({reason}): {call}"
    return ""


def warn_of_gaps(
    model: nn.Module, symmetries: SymmetryMap, consequence: str, *, stacklevel: int = 3
) -> None:
    """Warn of what is not understood (:func:`gaps`), with what follows from it."""
    missing = gaps(model, symmetries)
    if missing:
        warnings.warn(
            f"{consequence} where it must: {missing}; symmetries=find_symmetries(model) says that "
            "this is meant",
            UserWarning,
            stacklevel=stacklevel,
        )


def _beside(heads: Sequence[HeadSymmetry], found: Discovery) -> tuple[Discovery, list[str]]:
    """What was found beside the pairs that are known, and the names of what overlaps.

    No element belongs to two pairs, or an optimizer could not give it one frame: heads go before
    linear chains, as those through the latent projections that their keys and values come from.
    """
    taken = Elements()
    for symmetry in heads:
        taken.add(symmetry.blocks)
    known = {symmetry.name for symmetry in heads}
    kept = [s for s in found.heads if taken.add(s.blocks)]
    units = [s for s in found.hidden_units if taken.add(s.blocks)]
    overlapping = [
        f"{s.name} ({s.group})"
        for s in (*found.heads, *found.hidden_units)
        if s not in kept and s not in units and s.name not in known
    ]
    found.heads, found.hidden_units = kept, units
    return found, overlapping


def _stream_of(found: FoundStream, ownership: Ownership) -> ResidualStream:
    kind = CentredStream if found.centred else ResidualStream
    parameters = {name: ownership.parameter(name) for name in found.axes}
    return kind(found.width, found.axes, parameters, found.broken_by)


def _without_found(unrecognized: Sequence[str], heads: Iterable[HeadSymmetry]) -> list[str]:
    """Those in which, or around which, no pair has been found."""
    names = [
        block.name for symmetry in heads if symmetry.source != BY_CLASS for block in symmetry.blocks
    ]
    return [
        module for module in unrecognized if not any(inside(plain(name), module) for name in names)
    ]


def collect(model: nn.Module) -> Findings:
    """Ask the adapter of every distinct module; see :func:`find_symmetries`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    quantised: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        _require_plain(name, parameter)
        if _is_quantised(parameter):
            quantised[id(parameter)] = f"parameter {name!r} has dtype {parameter.dtype} (quantised)"
    findings = Findings()
    opaque: list[str] = []
    for name, module in bare_modules(model):
        if any(inside(name, root) for root in opaque):
            continue
        try:
            adapter = lookup(module)
            if adapter is not None:
                contribution = adapter(module, name)
                _require_floating(model, contribution, quantised)
                findings.contributions[name] = contribution
        except NotUnderstoodError as error:
            findings.not_understood[name] = str(error)
            if error.inside:
                opaque.append(name)
    if quantised and not any(map(_is_low_rank, findings.contributions.values())):
        first = next(iter(quantised.values()))
        raise ValueError(f"{first}; a group can only act on floating-point values")
    return findings


def merge_residual(
    model: nn.Module, findings: Findings, ownership: Ownership
) -> tuple[ResidualStream | None, str]:
    """Merge what is known of the residual stream; None and the reason where there is none."""
    stream, reason = find_stream(model, findings, ownership)
    if stream is None:
        return None, reason
    centring = {f"centring of {norm.name}" for norm in stream.norms if norm.centres}
    breakers = [
        *stream.breakers,
        *(breaker for norm in stream.norms for breaker in norm_breakers(norm, ownership)),
    ]
    kind = CentredStream if breakers and set(breakers) <= centring else ResidualStream
    width = stream.widths.pop()
    return kind(width, stream.axes, stream.parameters, tuple(breakers)), ""


def find_stream(
    model: nn.Module, findings: Findings, ownership: Ownership
) -> tuple[Stream | None, str]:
    """The stream that the contributions add up to; None and the reason where there is none."""
    recognised = {
        name: contribution
        for name, contribution in findings.contributions.items()
        if contribution.residual_axes or contribution.consumers
    }
    if not recognised:
        problems = (
            f"{name or 'model'}: {why}"
            for name, why in findings.not_understood.items()
            if not looks_like_attention(unwrapped(model.get_submodule(name)))
        )
        return None, next(problems, "no model or layer with a known residual stream")
    stream = add_up(model, recognised, ownership)
    if len(stream.widths) > 1:
        widths = ", ".join(map(str, sorted(stream.widths)))
        return None, f"several streams, of widths {widths}"
    stream.breakers += [
        f"{name or 'model'}, which is not understood ({why})"
        for name, why in findings.not_understood.items()
    ]
    stream.breakers += [
        f"{name}, a layer that is not known"
        for name in unknown_layers(model, recognised)
        if name not in findings.not_understood
    ]
    return stream, ""


def _unrecognized(model: nn.Module, findings: Findings) -> list[str]:
    """Outermost modules that look like attention and that no adapter covers."""
    covered = [
        name
        for name, contribution in findings.contributions.items()
        if contribution.heads or contribution.gauge_free or contribution.left_alone
    ]
    # Adapters beside quantised matrices are no pairs of those matrices.
    whole = [name for name in covered if not _is_low_rank(findings.contributions[name])]
    attentions = [name for name, module in bare_modules(model) if looks_like_attention(module)]
    # A model changed in one attention is not itself the attention that is not understood.
    suspects = attentions + [
        name
        for name in findings.not_understood
        if not any(inside(attention, name) for attention in attentions)
    ]
    names: list[str] = []
    for name, module in bare_modules(model):
        if (
            name in suspects
            and next(module.parameters(), None) is not None
            and not any(
                inside(name, other) or inside(other, name)
                for other in (whole if any(map(_is_quantised, module.parameters())) else covered)
            )
            and not any(inside(name, other) for other in names)
        ):
            names.append(name)
    return [name or type(model).__name__ for name in names]


def _gauge_free(model: nn.Module, findings: Findings) -> list[str]:
    """Attentions that are understood and have no gauge."""
    contributions = findings.contributions.items()
    return [name or type(model).__name__ for name, found in contributions if found.gauge_free]


def _named(symmetry: HeadSymmetry, ownership: Ownership) -> HeadSymmetry:
    """The same symmetry, every block under the first name of its parameter."""
    return symmetry.renamed(lambda block: ownership.first_name(block.parameter))


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        others = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        warnings.warn(f"symmetry {names[0]!r}{others} {what}", UserWarning, stacklevel=3)


def _require_plain(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(f"parameter {name!r} is uninitialised; run the model once first")
    if parameter.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device; load its values before asking for "
            "symmetries"
        )
    if is_traceable_wrapper_subclass(parameter):
        raise ValueError(
            f"parameter {name!r} is a {type(parameter).__name__} (sharded or quantised); only "
            "plain tensors can be viewed per head"
        )


def _is_low_rank(contribution: Contribution) -> bool:
    return any(map(is_lora_pair, contribution.heads))


def _is_quantised(parameter: nn.Parameter) -> bool:
    return not parameter.dtype.is_floating_point and not parameter.dtype.is_complex


def _require_floating(
    model: nn.Module, contribution: Contribution, quantised: Mapping[int, str]
) -> None:
    """Nothing is claimed of a module whose part in a pair or in the stream is quantised."""
    if not quantised:
        return
    pairs = [*contribution.heads, *contribution.hidden_units]
    touched = [block.parameter for symmetry in pairs for block in symmetry.blocks]
    touched += [model.get_parameter(name) for name in contribution.residual_axes]
    for parameter in touched:
        if id(parameter) in quantised:
            raise NotUnderstoodError(quantised[id(parameter)])
