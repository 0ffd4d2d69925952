"""Find the symmetries of a model: ask every module's adapter, merge what is exact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quotientopt.symmetries.adapters.peft_lora import is_lora_pair
from quotientopt.symmetries.centred_stream import CentredStream
from quotientopt.symmetries.exactness import (
    Ownership,
    half_trainable,
    with_one_dtype,
    without_conflicts,
)
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    lookup,
)
from quotientopt.symmetries.residual import ResidualStream
from quotientopt.symmetries.stream import Stream, add_up, norm_breakers

_ATTENTION_WORDS = ("attention", "attn", "multihead")


@dataclass
class Findings:
    """Contributions of a model's modules, by module name, and what was not understood."""

    contributions: dict[str, Contribution] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)


def find_symmetries(model: nn.Module) -> SymmetryMap:
    """Find the symmetries of a model that are known to be exact.

    Parameters
    ----------
    model : Module
        Any module. Its parameters are looked at, not changed.

    Returns
    -------
    SymmetryMap
        Head symmetries, the residual stream, and the attention modules that are not understood.

    Raises
    ------
    TypeError
        If ``model`` is not a Module.
    ValueError
        If a parameter has no plain floating-point values (meta device, uninitialised, quantised,
        sharded); the message names it. A quantised base under low-rank adapters is listed as not
        understood instead.

    Warns
    -----
    UserWarning
        If the two sides of a pair have different dtypes: it is then left out and listed as
        unrecognized. If only one side of a pair is trainable: it is kept, being exact, but acting
        on it changes frozen parameters.
    """
    findings = collect(model)
    ownership = Ownership(model)
    claimed = [
        symmetry
        for contribution in findings.contributions.values()
        for symmetry in contribution.heads
    ]
    heads, conflicting = without_conflicts(claimed, ownership)
    heads, mixed = with_one_dtype(heads)
    _warn(mixed, "mixes dtypes, which no group element can move as one: left out")
    _warn(
        half_trainable(heads),
        "is trainable on one side only: acting on it (act_, dress_) changes frozen parameters",
    )
    residual, reason = merge_residual(model, findings, ownership)
    return SymmetryMap(
        [_named(symmetry, ownership) for symmetry in heads],
        residual,
        residual_reason=reason,
        unrecognized=[*_unrecognized(model, findings), *conflicting, *mixed],
        gauge_free=_gauge_free(model, findings),
    )


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
    for name, module in model.named_modules():
        if any(_inside(name, root) for root in opaque):
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
            if not _looks_like_attention(model.get_submodule(name))
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
    return stream, ""


def _unrecognized(model: nn.Module, findings: Findings) -> list[str]:
    """Outermost modules that look like attention and that no adapter covers."""
    covered = [
        name
        for name, contribution in findings.contributions.items()
        if contribution.heads or contribution.gauge_free
    ]
    # Adapters beside quantised matrices are no pairs of those matrices.
    whole = [name for name in covered if not _is_low_rank(findings.contributions[name])]
    attentions = [name for name, module in model.named_modules() if _looks_like_attention(module)]
    # A model changed in one attention is not itself the attention that is not understood.
    suspects = attentions + [
        name
        for name in findings.not_understood
        if not any(_inside(attention, name) for attention in attentions)
    ]
    names: list[str] = []
    for name, module in model.named_modules():
        if (
            name in suspects
            and next(module.parameters(), None) is not None
            and not any(
                _inside(name, other) or _inside(other, name)
                for other in (whole if any(map(_is_quantised, module.parameters())) else covered)
            )
            and not any(_inside(name, other) for other in names)
        ):
            names.append(name)
    return [name or type(model).__name__ for name in names]


def _gauge_free(model: nn.Module, findings: Findings) -> list[str]:
    """Attentions that are understood and have no gauge."""
    contributions = findings.contributions.items()
    return [name or type(model).__name__ for name, found in contributions if found.gauge_free]


def _looks_like_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in _ATTENTION_WORDS)


def _inside(name: str, other: str) -> bool:
    """Whether module ``name`` is ``other`` or lies inside it."""
    return not other or name == other or name.startswith(f"{other}.")


def _named(symmetry: HeadSymmetry, ownership: Ownership) -> HeadSymmetry:
    """The same symmetry, every block under the first name of its parameter."""
    left, right = (
        [replace(block, name=ownership.first_name(block.parameter)) for block in blocks]
        for blocks in (symmetry.left_blocks, symmetry.right_blocks)
    )
    return HeadSymmetry(left, right, symmetry.group, symmetry.name)


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
    touched = [b.parameter for symmetry in contribution.heads for b in symmetry.blocks]
    touched += [model.get_parameter(name) for name in contribution.residual_axes]
    for parameter in touched:
        if id(parameter) in quantised:
            raise NotUnderstoodError(quantised[id(parameter)])
