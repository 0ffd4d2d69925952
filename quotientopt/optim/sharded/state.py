"""The state of a QuotientAdam of sharded parameters, as torch.distributed.checkpoint takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from quotientopt.optim.bookkeeping.checks import full_precision
from quotientopt.optim.bookkeeping.saved import arranged, with_names
from quotientopt.optim.sharded.ownership import Placed, local_part

if TYPE_CHECKING:
    from quotientopt.optim.sharded.step import Sharded

# State tensors of no more elements than this are the same on all processes, not sharded.
SMALL = 2


def collect(sharded: Sharded) -> dict[int, dict[str, Any]]:
    """The state of every parameter, by ``id``; every process calls it.

    Tensors of owned units become DTensors, sharded along their longest axis, so that each
    process saves its part.
    """
    own_tensors = {
        i: dict(sharded.inner.state[own.local])
        for i, own in enumerate(sharded.placed)
        if own.unit is not None and own.local is not None and own.local in sharded.inner.state
    }
    told: list[Any] = [None] * sharded.size
    dist.all_gather_object(
        told,
        {
            i: {
                key: (value.cpu(), value.device.type == "cpu")
                if value.numel() <= SMALL
                else (value.shape, value.dtype)
                for key, value in own.items()
            }
            for i, own in own_tensors.items()
        },
        group=sharded.group,
    )
    found: dict[int, dict[str, Any]] = {}
    for i, own in enumerate(sharded.placed):
        parameter = own.parameter
        if own.unit is None:
            if parameter in sharded.optimizer.state:
                found[id(parameter)] = dict(sharded.optimizer.state[parameter])
            continue
        owner = own.unit.owner
        entries = told[owner].get(i)
        if entries is None:
            continue
        found[id(parameter)] = values = {}
        for key, entry in entries.items():
            if isinstance(entry[0], Tensor):
                small, on_host = entry
                values[key] = small if on_host else small.to(sharded.device)
                continue
            shape, dtype = entry
            if owner == sharded.rank:
                tensor = own_tensors[i][key].detach().contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=sharded.device)
            dist.broadcast(tensor, dist.get_global_rank(sharded.group, owner), group=sharded.group)
            values[key] = _sharded_along_longest(tensor, parameter)
    return found


def packed(sharded: Sharded) -> dict[str, Any]:
    """A state dict of the optimizer, all of whose tensors are DTensors; every process calls it."""
    optimizer = sharded.optimizer
    state, optimizer.state = optimizer.state, defaultdict(dict)
    try:
        given = Optimizer.state_dict(optimizer)
    finally:
        optimizer.state = state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = collect(sharded)
    own = {i: found[id(p)] for i, p in enumerate(parameters) if id(p) in found}
    return with_names(given | {"state": own}, optimizer._names_of_groups())


def load(sharded: Sharded, state_dict: Mapping[str, Any]) -> None:
    """Take over a state dict and its options; every process calls it.

    Raises
    ------
    ValueError
        If it does not fit; the optimizer is then as it was.
    """
    optimizer = sharded.optimizer
    given = arranged(state_dict, optimizer._names_of_groups(), type(optimizer).__name__)
    groups, state = given["param_groups"], given["state"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError("the saved param groups have other numbers of parameters")
    order = [i for group in groups for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = {id(p): state.get(i, {}) for i, p in zip(order, parameters, strict=True)}
    with full_precision():
        restore(sharded, saved, groups)
    for group, loaded in zip(optimizer.param_groups, sharded.inner.param_groups, strict=True):
        group.update({k: v for k, v in loaded.items() if k != "params"})


def restore(
    sharded: Sharded, saved: Mapping[int, Mapping[str, Any]], groups: Sequence[Any]
) -> None:
    """Take over a state, whole or sharded in any way; every process calls it.

    Parameters
    ----------
    saved : mapping
        ``id`` of a parameter to its state.
    groups : sequence of mapping
        Options of the param groups.

    Raises
    ------
    ValueError
        If it does not fit, on all processes; the state is then as it was.
    """
    inner = sharded.inner
    index = {
        id(p): i for i, p in enumerate(p for group in inner.param_groups for p in group["params"])
    }
    state: dict[int, dict[str, Any]] = {}
    counts: dict[int, int] = {}
    for own in sharded.placed:
        entries = saved.get(id(own.parameter), {})
        counts[id(own.parameter)] = int(_whole_of(entries.get("step", 0)))
        values = {}
        for key in sorted(entries):
            value = entries[key]
            if own.unit is None and isinstance(value, Tensor) and value.ndim:
                value = _part_of(sharded, value, own, key)
            values[key] = _whole_of(value)
        if own.local is not None and values:
            state[index[id(own.local)]] = values
    start = 0
    own_groups = []
    for group, own_group in zip(groups, inner.param_groups, strict=True):
        stop = start + len(own_group["params"])
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        own_groups.append(options | {"params": list(range(start, stop))})
        start = stop
    before = inner.state, inner.param_groups
    problem: Exception | None = None
    sharded.hold()
    try:
        inner.load_state_dict({"state": state, "param_groups": own_groups})
    except Exception as found:
        problem = found
    failed = torch.tensor(float(problem is not None), device=sharded.device)
    dist.all_reduce(failed, group=sharded.group)
    if failed:
        inner.state, inner.param_groups = before
        inner._plan()
        sharded.release()
        told: list[Any] = [None] * sharded.size
        dist.all_gather_object(told, problem and str(problem), group=sharded.group)
        raise problem or ValueError(next(text for text in told if text))
    sharded.release()
    for own in sharded.placed:
        own.steps = counts[id(own.parameter)]
    sharded.optimizer.state.clear()
    show(sharded)


def show(sharded: Sharded) -> None:
    """Show each parameter's state in the optimizer: whole at the owner, else its shard."""
    state = sharded.optimizer.state
    for own in sharded.placed:
        if own.local is not None and own.local in sharded.inner.state:
            inner = sharded.inner.state[own.local]
            if own.unit is not None:
                state[own.parameter] = inner
                continue
            shown = state[own.parameter]
            for key, value in inner.items():
                if isinstance(own.parameter, DTensor) and value.shape == own.shard.shape:
                    if key not in shown or local_part(shown[key]) is not value:
                        shown[key] = _as_shard(value, own.parameter)
                else:
                    shown[key] = value
        elif own.steps:
            state[own.parameter]["step"] = torch.tensor(float(own.steps))


def _part_of(sharded: Sharded, value: Tensor, own: Placed, key: str) -> Tensor:
    """This process's part of a saved tensor of a parameter's shape."""
    parameter = own.parameter
    if value.shape != parameter.shape:
        raise ValueError(
            f"the saved {key!r} of {sharded.optimizer._name(parameter)!r} has shape "
            f"{tuple(value.shape)}, expected {tuple(parameter.shape)}: it is not the state of "
            "a QuotientAdam with these options on this model"
        )
    if isinstance(value, DTensor) and isinstance(parameter, DTensor):
        alike = value.placements == parameter.placements
        if alike and value.device_mesh == parameter.device_mesh:
            return local_part(value)
    return own.regions[sharded.rank].take(_whole_of(value))


def _sharded_along_longest(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes have, as a DTensor on the first axis of a parameter's mesh."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    dim = max(range(tensor.ndim), key=lambda axis: tensor.shape[axis])
    chunks = tensor.chunk(mesh.size(0), dim)
    mine = coordinate[0]
    local = chunks[mine] if mine < len(chunks) else tensor.narrow(dim, 0, 0)
    placements = [Shard(dim), *(Replicate() for _ in range(mesh.ndim - 1))]
    return DTensor.from_local(
        local.clone(),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _whole_of(value: Any) -> Any:
    """All of a saved value, which every process asks for."""
    return local_part(value.full_tensor()) if isinstance(value, DTensor) else value


def _as_shard(local: Tensor, parameter: DTensor) -> DTensor:
    """A DTensor placed as a parameter is, of this process's part."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
