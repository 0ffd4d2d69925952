"""Runs on several processes, next to the same on one."""

import torch

from quotientopt import QuotientAdam

from .models import MODELS, batches, shard, state_size, train, whole

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0}


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
        deviation = max(deviation, float((p - whole(q)).abs().max()))
        moved = max(moved, float((p - start[n]).abs().max()))
    losses = torch.tensor([expected, found], dtype=torch.float64)
    return {
        "losses": float((losses[0] - losses[1]).abs().max()),
        "weights": deviation,
        "moved": moved,
        "share": state_size(together) / state_size(optimizer),
        "heads": len(together.symmetries.heads),
    }
