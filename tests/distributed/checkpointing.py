"""Checkpoints of torch.distributed.checkpoint, written by some processes and read by others."""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from quotientopt import QuotientAdam
from quotientopt.optim.sharded import exchange

from .models import MODELS, batches, shard, train, whole

SAVED, MORE = 7, 3


def make(name, way):
    model = MODELS[name]()
    if way is not None:
        shard(model, way)
    return model, QuotientAdam(model, lr=1.25e-3, weight_decay=0.1, refresh_every=4)


def states(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def values_of(model, optimizer):
    """All values of model and optimizer, whole, by name."""
    packed = get_optimizer_state_dict(model, optimizer)["state"]
    found = {f"{n}.{k}": whole(v).clone() for n, own in packed.items() for k, v in own.items()}
    return found | {n: whole(p).detach().clone() for n, p in model.named_parameters()}


def save(name, way, folder):
    """Train and save; the values, and the losses of what comes after."""
    data = batches(SAVED + MORE)
    model, optimizer = make(name, way)
    train(model, optimizer, data[:SAVED], way)
    dcp.save(states(model, optimizer), checkpoint_id=folder)
    values = values_of(model, optimizer)
    losses = train(model, optimizer, data[SAVED:], way)
    return values, losses, values_of(model, optimizer)


def load(name, way, folder):
    """The same from a checkpoint."""
    data = batches(SAVED + MORE)
    model, optimizer = make(name, way)
    loaded = states(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    values = values_of(model, optimizer)
    losses = train(model, optimizer, data[SAVED:], way)
    return values, losses, values_of(model, optimizer)


def full(name, way):
    """A full state dict on one process, and back to all."""
    data = batches(SAVED + MORE)
    model, optimizer = make(name, way)
    train(model, optimizer, data[:SAVED], way)
    values = values_of(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    packed = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model, options=options)
    complete = True
    if dist.get_rank() == 0:
        found = {f"{n}.{k}": v for n, own in packed["state"].items() for k, v in own.items()}
        named = {n: v for n, v in values.items() if n not in weights}
        plain = not any(hasattr(value, "full_tensor") for value in found.values())
        complete = plain and same(named, found) == []
    other, again = make(name, way)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, again, packed, options=options)
    loaded = values_of(other, again)
    return complete, same(values, loaded)


def same(first, second):
    """Names of what differs in a bit."""
    if first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys())
    return [n for n in first if not torch.equal(first[n].cpu(), second[n].cpu())]


def damaged(name, way):
    """A state that does not fit is refused on all processes, and nothing changes."""
    data = batches(3)
    model, optimizer = make(name, way)
    train(model, optimizer, data, way)
    before = values_of(model, optimizer)
    messages = []
    for change in ("nan", "shape", "missing"):
        packed = optimizer.state_dict()
        state = next(own for own in packed["state"].values() if "residual_frame" in own)
        if change == "nan":
            state["exp_avg"].to_local().fill_(torch.nan)
        elif change == "shape":
            state["exp_avg"] = torch.zeros(3)
        else:
            del state["residual_frame"]
        try:
            optimizer.load_state_dict(packed)
        except ValueError as error:
            messages.append(str(error))
    return messages, same(before, values_of(model, optimizer))


def killed_in_a_save(name, way, folder):
    """Save once, train, and die on the last process while its part of the next is written."""
    data = batches(SAVED + MORE)
    model, optimizer = make(name, way)
    train(model, optimizer, data[:SAVED], way)
    dcp.save(states(model, optimizer), checkpoint_id=f"{folder}/old")
    values = values_of(model, optimizer)
    train(model, optimizer, data[SAVED:], way)

    class Dying(dcp.FileSystemWriter):
        def write_data(self, plan, planner):
            if dist.get_rank() == dist.get_world_size() - 1:
                os._exit(9)
            return super().write_data(plan, planner)

    if dist.get_rank() == 0:
        torch.save(values, f"{folder}/values.pt")
    dist.barrier()
    dcp.save(states(model, optimizer), storage_writer=Dying(f"{folder}/new"))


def killed_in_a_step(name, way, folder):
    """Save, and die on the last process between the exchanges of the next step."""
    data = batches(SAVED + MORE)
    model, optimizer = make(name, way)
    train(model, optimizer, data[:SAVED], way)
    dcp.save(states(model, optimizer), checkpoint_id=folder)
    send_back = exchange.send_back

    def dying(*arguments):
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        return send_back(*arguments)

    exchange.send_back = dying
    train(model, optimizer, data[SAVED:], way)
