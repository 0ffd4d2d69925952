"""Runs on several processes, next to the same on one."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from quotientopt import QuotientAdam, find_symmetries
from quotientopt.optim import engine
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.sharded.exchange import Parcels, ShardedPeers
from quotientopt.peft import create_quotient_optimizer
from quotientopt.symmetries.map import RESIDUAL

from .models import MODELS, batches, loss_of, part_of, shard, state_size, train, whole

# Frames over all heads make more of the last bits of gradients, in one process as well.
BY_HEAD = {"row_frame": "per_head", "polar": "step"}
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}


def compared(name, way, steps, options):
    """Largest differences of losses and of weights, share of the state, and how far both went."""
    data = batches(steps)
    alone = MODELS[name]()
    start = {n: p.detach().clone() for n, p in alone.named_parameters()}
    optimizer = QuotientAdam(alone, **OPTIONS | options)
    expected = train(alone, optimizer, data)
    model = MODELS[name]()
    shard(model, way)
    together = QuotientAdam(model, **OPTIONS | options)
    found = train(model, together, data, way)
    deviation, moved = 0.0, 0.0
    for (n, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        deviation = max(deviation, float((p - whole(q)).detach().abs().max()))
        moved = max(moved, float((p - start[n]).detach().abs().max()))
    losses = torch.tensor([expected, found], dtype=torch.float64)
    return {
        "losses": float((losses[0] - losses[1]).abs().max()),
        "weights": deviation,
        "moved": moved,
        "share": state_size(together) / state_size(optimizer),
        "heads": len(together.symmetries.heads),
    }


def same_batch(dtype, options):
    """Weights after steps in which all processes see one batch, next to those of one process."""
    models = []
    for way in (None, "fsdp"):
        model = MODELS["gpt"]().to(dtype)
        if way:
            shard(model, way)
        optimizer = QuotientAdam(model, lr=5e-3, weight_decay=0.1, **options)
        train(model, optimizer, batches(8), None)
        models.append(model)
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return max(float((p - whole(q)).detach().abs().max()) for p, q in pairs)


def in_float32(name, steps, options):
    """Differences of losses from one process that splits its batches alike: ours and AdamW's."""
    found = []
    for quotient in (True, False):
        runs = []
        for way in (None, "fsdp"):
            model = MODELS[name]().float()
            if way:
                shard(model, way)
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
            if quotient:
                optimizer = QuotientAdam(model, lr=5e-3, weight_decay=0.1, **options)
            parts = 1 if way else dist.get_world_size()
            runs.append(train(model, optimizer, batches(steps), way, parts))
        found.append(max(abs(a - b) for a, b in zip(*runs, strict=True)))
    return found


def factory(steps):
    """PEFT's factory on a sharded model."""
    losses = []
    for way in (None, "fsdp"):
        model = MODELS["lora"]()
        if way:
            shard(model, way)
        optimizer = create_quotient_optimizer(model, lr=5e-3)
        losses.append(train(model, optimizer, batches(steps), way))
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def without_pooling(name):
    """The same where every process breaks ties by its own matrices alone."""
    pooled = ShardedPeers.pooled
    ShardedPeers.pooled = lambda self, grams, wanted: grams
    try:
        return compared(name, "fsdp", 4, {})["losses"]
    finally:
        ShardedPeers.pooled = pooled


def left_behind(name):
    """Tensors that a step received, and how many of them are alive after it."""
    model = MODELS[name]()
    shard(model, "fsdp")
    optimizer = QuotientAdam(model, lr=5e-3, refresh_every=4)
    taken, take = [], Parcels.take

    def noted(own, source, region, tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            taken.append(weakref.ref(tensor))
        take(own, source, region, tensor)

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Parcels, "take", noted)
        for tokens in batches(3):
            loss_of(model, part_of(tokens, "fsdp")).backward()
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    return len(taken), sum(tensor() is not None for tensor in taken)


def without_being_told(name):
    """The same where every process takes for an embedding what its own matrices tell."""
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(ShardedPeers, "outside", property(lambda _: None, lambda *_: None))
        return compared(name, "fsdp", 4, {})["losses"]


def twins(name, way, steps, kind):
    """Largest difference of losses from x and from g x, cond(g) = 1000, both sharded."""
    losses = []
    for moved in (False, True):
        model = MODELS[name]()
        if name == "lora":
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(7))
        if moved:
            symmetries = find_symmetries(model)
            element = symmetries.random_element(1e3, generator=torch.Generator().manual_seed(3))
            if name == "lora":
                # Those of the frozen base are another gauge.
                element = {n: g for n, g in element.items() if ".lora." in n}
            elif name != "gpt":
                element.pop(RESIDUAL, None)
            heads = {symmetry.name for symmetry in symmetries.heads}
            symmetries.act_({n: g for n, g in element.items() if _is_of_heads(n, heads)})
        shard(model, way)
        if kind == "adamw":
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        else:
            optimizer = QuotientAdam(model, lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)
        losses.append(train(model, optimizer, batches(steps), way))
    first, second = torch.tensor(losses, dtype=torch.float64)
    return float((first - second).abs().max())


def _is_of_heads(name, heads):
    return name == RESIDUAL or name.removesuffix(".translation") in heads


def traffic(name):
    """Collectives and products of the steps of one run, and the bytes that this process sends.

    Events are pairs: "start" of an exchange and "reduce" with their bytes, "arrived" with what was
    still under way, and "dressed" and "updated" for every bucket.
    """
    model = MODELS[name]()
    shard(model, "fsdp")
    optimizer = QuotientAdam(model, lr=5e-3, refresh_every=4)
    rank, calls = dist.get_rank(), []
    patch = pytest.MonkeyPatch()
    # Frames last as long from the first step on as they do later.
    as_later = pytest.MonkeyPatch()
    as_later.setattr(engine, "interval_of", lambda step, longest: longest)

    def watch(owner, name, note):
        original = getattr(owner, name)

        def noted(*arguments, **options):
            calls[-1].append(note(*arguments))
            return original(*arguments, **options)

        patch.setattr(owner, name, noted)

    def sent(received, sent, expected, counts):
        others = sum(count for i, count in enumerate(counts) if i != rank)
        return "start", others * sent.element_size()

    for tokens in batches(6):
        loss_of(model, part_of(tokens, "fsdp")).backward()
        calls.append([])
        with patch.context() as patch:
            watch(dist, "all_to_all_single", sent)
            watch(dist, "all_reduce", lambda x, *_: ("reduce", x.numel() * x.element_size()))
            watch(Parcels, "finish", lambda own: ("arrived", len(own._under_way)))
            watch(Bucket, "gradients", lambda own: ("dressed", 0))
            watch(Bucket, "update_", lambda own, *_: ("updated", 0))
            optimizer.step()
        optimizer.zero_grad()
    as_later.undo()
    sharded = optimizer._sharded
    away = back = 0
    for unit in sharded.units:
        for own in unit.members:
            local = own.shard.numel() * own.parameter.element_size()
            if unit.owner != rank:
                away += local
            else:
                back += own.parameter.numel() * own.parameter.element_size() - local
    return calls, len(sharded.kinds), away, back
