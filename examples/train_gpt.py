"""QuotientAdam beside AdamW: a small GPT reads the sources of Python's standard library."""

import argparse
import os
import time
from pathlib import Path

import torch
from torch.nn import functional

import quotientopt as qo
from quotientopt.models import reference_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps

files = sorted(Path(os.__file__).parent.glob("*.py"))
data = torch.tensor(list(b"".join(path.read_bytes() for path in files))[:2_000_000])
train, test = data[:-100_000], data[-100_000:]


def batch_of(text: torch.Tensor, generator: torch.Generator, sequences: int = 8) -> torch.Tensor:
    """Random sequences of 129 bytes."""
    starts = torch.randint(len(text) - 129, (sequences, 1), generator=generator)
    return text[starts + torch.arange(129)]


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Nats per byte."""
    return functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])


def make_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """At its own best rate for this size."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def make_quotient_adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The one line that changes."""
    return qo.QuotientAdam(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


for make in (make_adamw, make_quotient_adam):
    model = reference_model("gpt", 0, layers=2, width=64)  # the same start for both
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=0.1
    )
    batches = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    for _ in range(steps):
        loss = loss_of(model, batch_of(train, batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        final = loss_of(model, batch_of(test, torch.Generator().manual_seed(1), 64))
    name = type(optimizer).__name__
    print(f"{name:>12}: validation loss {final:.3f} nats per byte after {seconds:.0f} s")
