"""State dicts as they are given: parameters matched by name, nothing taken that is damaged.

All of it is looked at before an optimizer changes. What depends on the plan of an optimizer, the
shapes of framed state, is checked where it is taken over, by `state.adopt` beside this.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.options import refuse_options_of_torch

# Of a saved param group, in the order of its "params": as torch calls them, and whether there was
# state. They are not kept in an optimizer's own param groups.
NAMES, HAD_STATE = "param_names", "has_state"

# What wrappers put into the names of a model's parameters.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

Groups = Sequence[Mapping[str, Any]]
Names = list[list[str | None]]


def with_names(saved: dict[str, Any], names: Names) -> dict[str, Any]:
    """A state dict whose groups say what their parameters are called and which of them have state.

    Parameters
    ----------
    saved : dict
        As torch makes it.
    names : list of list of str or None
        Of the parameters of every group. They are saved if all are known.
    """
    groups = []
    known = all(name is not None for own in names for name in own)
    for group, own in zip(saved["param_groups"], names, strict=True):
        group = group | {HAD_STATE: [i in saved["state"] for i in group["params"]]}
        groups.append(group | {NAMES: list(own)} if known else group)
    return saved | {"param_groups": groups}


def arranged(saved: Mapping[str, Any], names: Names, optimizer: str) -> dict[str, Any]:
    """A state dict in the order of an optimizer's own parameters.

    Names decide where both sides have them; wrappers (``torch.compile``, DDP, FSDP) in front of or
    within names do not count. States without names are taken in their order, as are those
    of ``torch.distributed.checkpoint``, which has put them in order itself.

    Parameters
    ----------
    saved : mapping
    names : list of list of str or None
        Of the parameters of every group of the optimizer, as far as they are known.
    optimizer : str
        What it is called, for messages.

    Returns
    -------
    dict
        Without the entries of :func:`with_names`.

    Raises
    ------
    ValueError
        If it is no state dict, if parameters do not fit, with their names, or if state is lost.
    """
    groups = _groups_of(saved, optimizer)
    for group in groups:
        _refuse_lost(group, saved["state"])
    order = _order_of(groups, names)
    bare = [{k: v for k, v in g.items() if k not in (NAMES, HAD_STATE)} for g in groups]
    placed = [
        bare[j] | {"params": [groups[j]["params"][i] for i in members]} for j, members in order
    ]
    return dict(saved) | {"param_groups": placed}


def _groups_of(saved: Mapping[str, Any], optimizer: str) -> list[Mapping[str, Any]]:
    for key, kind in (("state", Mapping), ("param_groups", list | tuple)):
        if not isinstance(saved.get(key), kind):
            raise ValueError(
                f"this is not the state of a {optimizer}: its {key!r} is "
                f"{type(saved[key]).__name__ if key in saved else 'missing'}"
            )
    groups = list(saved["param_groups"])
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(
                f"this is not the state of a {optimizer}: param group {i} has no list of params"
            )
        for key, entries in (("params", int | str), (NAMES, str), (HAD_STATE, bool)):
            own: Any = group.get(key)
            count = len(group["params"])
            if key in group and not (
                isinstance(own, list | tuple)
                and len(own) == count
                and all(isinstance(entry, entries) for entry in own)
            ):
                raise ValueError(
                    f"this is not the state of a {optimizer}: {key!r} of param group {i} is not a "
                    f"list of {count} entries of their kind"
                )
    for index, own in saved["state"].items():
        if not isinstance(own, Mapping):
            raise ValueError(
                f"this is not the state of a {optimizer}: entry {index!r} is {type(own).__name__}"
            )
    return groups


def _is_distributed(groups: Groups) -> bool:
    """Whether parameters are filed under their names, as torch.distributed.checkpoint does.

    It hands them on in the order of the model that loads; lists beside them are in the old order.
    """
    return any(isinstance(index, str) for group in groups for index in group["params"])


def _refuse_lost(group: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
    """Refuse a state of which entries were lost."""
    had = group.get(HAD_STATE)
    if had is None or _is_distributed([group]):
        return
    names = group.get(NAMES) or [f"parameter {index}" for index in group["params"]]
    for index, name, wanted in zip(group["params"], names, had, strict=False):
        if wanted and index not in state:
            raise ValueError(
                f"the saved state of {name!r} is missing, which it had when it was saved: the "
                f"state is damaged (without {HAD_STATE!r} in its param groups it is taken as it is)"
            )


def _order_of(groups: Groups, names: Names) -> list[tuple[int, list[int]]]:
    """For every own group the saved one to take, and the places of its parameters there."""
    as_given = [(j, list(range(len(group["params"])))) for j, group in enumerate(groups)]
    given = [list(group.get(NAMES) or [None] * len(group["params"])) for group in groups]
    if _is_distributed(groups) or not any(name for own in given for name in own):
        return as_given
    own, saved = bare_names(names), bare_names(given)
    known = all(name is not None for part in (*own, *saved) for name in part)
    if [len(part) for part in own] == [len(part) for part in saved]:
        pairs = zip(chain.from_iterable(own), chain.from_iterable(saved), strict=True)
        same = operator.eq if known else _agree
        strangers = [(a, b) for a, b in pairs if a and b and not same(a, b)]
        if not strangers:
            return as_given
        if not known:
            raise ValueError(
                f"parameter {strangers[0][0]!r} stands where the saved state has "
                f"{strangers[0][1]!r}, and not all parameters have names to match them by; make "
                "the optimizer from the model, or from named parameters"
            )
    if not known:
        return as_given  # of other sizes: torch refuses it
    _refuse_other_names(own, saved)
    order = []
    for i, part in enumerate(own):
        # Groups may come in another order, but a parameter's options may not change unseen.
        j = next(
            (j for j in (i, *range(len(saved))) if j < len(saved) and set(saved[j]) == set(part)),
            None,
        )
        if j is None:
            k = next(k for k, names in enumerate(saved) if part[0] in names)
            lost = next((n for n in part if n not in saved[k]), None)
            lost = lost or next(n for n in saved[k] if n not in part)
            here = next(k for k, names in enumerate(own) if lost in names)
            there = next(k for k, names in enumerate(saved) if lost in names)
            raise ValueError(
                f"parameter {lost!r} is in param group {here}, and in group {there} of the saved "
                "state; group the parameters as they were"
            )
        places = {name: place for place, name in enumerate(saved[j])}
        order.append((j, [places[name] for name in part]))
    return order


def _agree(first: str, second: str) -> bool:
    """Whether two names are the same but for modules around one of them."""
    return f".{first}".endswith(f".{second}") or f".{second}".endswith(f".{first}")


def _refuse_other_names(own: Names, saved: Names) -> None:
    """Refuse a state that lacks a parameter, or has another one."""
    mine, theirs = [list(chain.from_iterable(names)) for names in (own, saved)]
    for counts in (Counter(mine), Counter(theirs)):
        twice = next((name for name, count in counts.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two parameters are called {twice!r}: their states cannot be told")
    known, given = set(mine), set(theirs)
    lost = next((name for name in mine if name not in given), None)
    foreign = next((name for name in theirs if name not in known), None)
    ways = f"(without {NAMES!r} in its param groups a state is taken in its order)"
    if lost is not None:
        other = f", but one of {foreign!r}" if foreign is not None else ""
        raise ValueError(f"the saved state has no parameter {lost!r}{other} {ways}")
    if foreign is not None:
        raise ValueError(
            f"the saved state has a parameter {foreign!r} that is not in the param groups {ways}"
        )


def bare_names(names: Names) -> Names:
    """Names without what wrappers put into them, and, if all are known, modules around them all."""
    split = [[_parts(name) for name in own] for own in names]
    every = list(chain.from_iterable(split))
    shared = 0
    while every and all(p[shared + 1 :] and p[shared] == every[0][shared] for p in every):
        shared += 1
    return [[".".join(parts[shared:]) or None for parts in own] for own in split]


def _parts(name: str | None) -> list[str]:
    """The modules in a name; none where it is not known."""
    return [] if name is None else [part for part in name.split(".") if part not in WRAPPERS]


def refuse_foreign_keys(
    state: Mapping[Any, Mapping[str, Any]],
    groups: Groups,
    keys: Sequence[str],
    name_of: Callable[[int, int], str],
    kinds: tuple[str, str],
) -> None:
    """Refuse options and entries of another optimizer, which would be left unused.

    Parameters
    ----------
    state : mapping
        Of the saved state, by index.
    groups : sequence of mapping
        Of the saved state, arranged.
    keys : sequence of str
        What this optimizer knows, without the suffix of blocks of a fused parameter.
    name_of : callable
        Name of the parameter at a place of a group.
    kinds : tuple of str
        What this optimizer is called, and torch's of the kind.

    Raises
    ------
    ValueError
        Naming parameter and entry.
    """
    filed = {index: (i, place) for i, g in enumerate(groups) for place, index in _places(g)}
    for group in groups:
        refuse_options_of_torch(group, kinds[0])
    for index, own in state.items():
        if index not in filed:
            raise ValueError(
                f"the saved state has an entry {index!r} that is of no parameter: the state is "
                "damaged"
            )
        for key in own:
            if not isinstance(key, str) or key.partition(".")[0] not in keys:
                raise ValueError(
                    f"the saved state of {name_of(*filed[index])!r} has a {key!r}: it is not the "
                    f"state of a {kinds[0]} or {kinds[1]}"
                )


def _places(group: Mapping[str, Any]) -> Iterable[tuple[int, Any]]:
    return enumerate(group["params"])


def refuse_foreign_groups(
    groups: Groups, marks: tuple[str, str], kinds: tuple[str, str], *, plain: bool
) -> None:
    """Refuse param groups of another optimizer, whose options would be taken for this one's.

    Parameters
    ----------
    groups : sequence of mapping
        As saved.
    marks : tuple of str
        An option that only this optimizer has, and one that torch's of the kind has as well.
    kinds : tuple of str
        What the two are called.
    plain : bool
        Whether torch's state will do.

    Raises
    ------
    ValueError
    """
    for i, group in enumerate(groups):
        if marks[0] in group:
            continue
        if not plain or marks[1] not in group:
            raise ValueError(
                f"param group {i} of the saved state has no {marks[plain]!r}: it is not the state "
                f"of a {' or '.join(kinds if plain else kinds[:1])}"
            )


def refuse_damaged(
    state: Mapping[Any, Mapping[str, Any]], groups: Groups, name_of: Callable[[int, int], str]
) -> None:
    """Refuse values that no optimizer has saved: text, NaN, negative second moments or counts.

    Parameters
    ----------
    state : mapping
        Of the saved state, by index.
    groups : sequence of mapping
        Of the saved state, arranged.
    name_of : callable
        Name of the parameter at a place of a group.

    Raises
    ------
    ValueError
        Naming parameter and entry.
    """
    for i, group in enumerate(groups):
        for place, index in _places(group):
            for key, value in state.get(index, {}).items():
                problem = problem_of(key, value)
                if problem is not None:
                    raise ValueError(
                        f"the saved {key!r} of {name_of(i, place)!r} {problem}: the state is "
                        "damaged"
                    )


def problem_of(key: str, value: Any) -> str | None:
    """What is wrong with a saved value, if anything is."""
    if value is None and key == "momentum_buffer":
        return None  # as torch's SGD saves that there is none
    if not isinstance(value, Tensor | int | float) or isinstance(value, bool):
        return f"is {value!r}, expected a number or a tensor"
    tensor = torch.as_tensor(value).detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_sparse:
        tensor = tensor._values()  # momentum of an embedding with sparse gradients
    if not bool(tensor.isfinite().all()):
        return "has NaN or infinite entries"
    kind = key.partition(".")[0]
    if (kind == "step" or kind.startswith("exp_avg_sq")) and bool((tensor < 0).any()):
        return "has negative entries"
    if kind == "step" and tensor.numel() != 1:
        return f"has shape {tuple(tensor.shape)}, expected one number"
    return None


def refuse_unfit(
    parameters: Iterable[Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    wanted: Sequence[str],
    name_of: Callable[[Tensor], str],
    *,
    optional: Sequence[str] = (),
    kind: str = "saved ",
) -> None:
    """Refuse state of plain parameters that lacks an entry, or has one of another shape.

    Parameters
    ----------
    parameters : iterable of Tensor
    state : mapping
    wanted : sequence of str
        What must be there if anything is; all but ``"step"`` shaped like the parameter.
    name_of : callable
    optional : sequence of str
        What may be there, in that shape.
    kind : str
        Of the state, for messages.

    Raises
    ------
    ValueError
        Naming parameter and entry.
    """
    for parameter in parameters:
        own = state.get(parameter, {})
        if not own:
            continue
        for key in (*wanted, *optional):
            value = own.get(key)
            if value is None and key in optional:
                continue
            problem = "is missing" if value is None else problem_of(key, value)
            if problem is not None:
                raise ValueError(
                    f"the {kind}{key!r} of {name_of(parameter)!r} {problem}: the state is damaged"
                )
            shape = torch.as_tensor(value).shape
            if key != "step" and shape != parameter.shape:
                raise ValueError(
                    f"the {kind}{key!r} of {name_of(parameter)!r} has shape {tuple(shape)}, "
                    f"expected {tuple(parameter.shape)}: it is the state of another parameter"
                )
