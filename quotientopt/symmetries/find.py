"""Find the symmetries of a model: ask every module's adapter, merge what is exact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quotientopt.symmetries.exactness import Ownership, without_conflicts
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.registry import (
    Contribution,
    NotUnderstoodError,
    lookup,
)
from quotientopt.symmetries.residual import ResidualStream

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
        sharded); the message names it.
    """
    findings = collect(model)
    ownership = Ownership(model)
    claimed = [
        symmetry
        for contribution in findings.contributions.values()
        for symmetry in contribution.heads
    ]
    heads, conflicting = without_conflicts(claimed, ownership)
    residual, reason = merge_residual(model, findings, ownership)
    return SymmetryMap(
        [_named(symmetry, ownership) for symmetry in heads],
        residual,
        residual_reason=reason,
        unrecognized=[*_unrecognized(model, findings), *conflicting],
    )


def collect(model: nn.Module) -> Findings:
    """Ask the adapter of every distinct module; see :func:`find_symmetries`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        _require_plain(name, parameter)
    findings = Findings()
    for name, module in model.named_modules():
        try:
            adapter = lookup(module)
            if adapter is not None:
                findings.contributions[name] = adapter(module, name)
        except NotUnderstoodError as error:
            findings.not_understood[name] = str(error)
    return findings


def merge_residual(
    model: nn.Module, findings: Findings, ownership: Ownership
) -> tuple[ResidualStream | None, str]:
    """Merge the residual axes of all contributions; None and the reason where there are none."""
    recognised = {
        name: contribution
        for name, contribution in findings.contributions.items()
        if contribution.residual_axes
    }
    if not recognised:
        problems = [
            f"{name or 'model'}: {why}"
            for name, why in findings.not_understood.items()
            if not _looks_like_attention(model.get_submodule(name))
        ]
        return None, "; ".join(problems[:1]) or "no model or layer with a known residual stream"
    axes: dict[str, int] = {}
    breakers: dict[str, None] = {}
    declared: set[str] = set()
    for contribution in recognised.values():
        breakers |= dict.fromkeys(contribution.residual_breakers)
        for gain in contribution.gains:
            declared.add(gain)
            breakers |= dict.fromkeys(gain_breakers(gain, ownership.parameter(gain)))
        for name, axis in contribution.residual_axes.items():
            declared.add(name)
            first = ownership.first_name(name)
            if axes.setdefault(first, axis) != axis:
                breakers[f"two different axes of {first}"] = None
    parameters = {name: ownership.parameter(name) for name in axes}
    widths = {parameters[name].shape[axis] for name, axis in axes.items()}
    if len(widths) > 1:
        return None, f"several streams, of widths {', '.join(map(str, sorted(widths)))}"
    for name in ownership.used_elsewhere(parameters.values(), declared):
        breakers[f"another use of {name}"] = None
    outside = [
        name
        for name, _ in model.named_parameters()
        if not any(not root or name.startswith(f"{root}.") for root in recognised)
    ]
    if outside:
        breakers[f"parameters outside the recognised stream ({outside[0]}, …)"] = None
    return ResidualStream(widths.pop(), axes, parameters, tuple(breakers)), ""


def gain_breakers(name: str, gain: nn.Parameter) -> list[str]:
    """How a gain with known readers breaks O(d); empty once it is one and stays one."""
    if gain.requires_grad:
        return [f"trainable gain {name}"]
    if not bool((gain == 1).all()):
        return [f"gain {name}, which is not one"]
    return []


def _unrecognized(model: nn.Module, findings: Findings) -> list[str]:
    """Outermost modules that look like attention and that no adapter covers."""
    covered = [name for name, contribution in findings.contributions.items() if contribution.heads]
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
            and not any(_inside(name, other) or _inside(other, name) for other in covered)
            and not any(_inside(name, other) for other in names)
        ):
            names.append(name)
    return [name or type(model).__name__ for name in names]


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
    if not parameter.dtype.is_floating_point and not parameter.dtype.is_complex:
        raise ValueError(
            f"parameter {name!r} has dtype {parameter.dtype} (quantised); a group can only act "
            "on floating-point values"
        )
