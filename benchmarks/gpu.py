"""One run on a GPU, of at most nine minutes: tests, step times, a replayed graph, a small training.

In this order, each part within what is left of the time, and the record is written after each:

1. ``pytest -m gpu``.
2. Seconds of a step on the shapes of GPT-2 small and of a Llama with 1.1 billion parameters.
3. A step recorded as a CUDA graph, held against steps taken directly.
4. A GPT with 124 million parameters on source text, bytes, autocast to bfloat16: as many steps for
   every optimizer as fit, at one learning rate each, which nobody tuned at this size.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small --minutes 1       # the same in small
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiment import command_of, markdown_table
from step_timing import PERIOD, set_gradients, summarise_periods, time_laps
from torch import nn
from torch.optim import Optimizer

from quotientopt import QuotientAdam
from quotientopt.compare.data import Task, load_task, prediction_loss
from quotientopt.compare.optimizers import BETAS, OPTIMIZERS
from quotientopt.compare.protocol import Protocol, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import state_bytes
from quotientopt.models import GPT, Llama

RESULTS = Path(__file__).parent / "results" / "gpu"
# Rates at which matrices are stepped; beside Muon and SOAP-Muon, AdamW's.
RATES: dict[str, tuple[float, dict[str, float]]] = {
    "adamw": (1e-3, {"beta2": 0.95}),
    "muon": (2e-2, {"adamw_rate": 1e-3}),
    "soap-muon": (4e-3, {"adamw_rate": 2e-3}),
    "quotient-adam": (1e-3, {}),
}


@dataclass(frozen=True)
class Run:
    """What one run has: device, sizes, and the time at which it must be done."""

    device: str
    small: bool
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def gpt(self) -> GPT:
        """GPT-2 small, with bytes for tokens and 17 layers: 121 million parameters."""
        sizes = (256, 2, 32, 2, 64) if self.small else (256, 17, 768, 12, 1024)
        return GPT(*sizes).to(self.device)

    def shapes(self) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
        """Models for step times."""
        if self.small:
            yield "gpt, small", lambda: GPT(64, 1, 32, 2, 16)
            yield "llama, small", lambda: Llama(64, 1, 32, 4, 2, 16)
        else:
            yield "gpt2-small", lambda: GPT(50257, 12, 768, 12, 1024)
            yield "llama-1b", lambda: Llama(32000, 16, 2048, 32, 8, 2048, 8192)


def optimizers_of(name: str, model: nn.Module, protocol: Protocol) -> list[Optimizer]:
    """An optimizer of the comparison at its rate."""
    rate, settings = RATES[name]
    return OPTIMIZERS[name].build(model, rate, settings, protocol)


def run_tests(run: Run) -> dict[str, Any]:
    """``pytest -m gpu``: its exit status and last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["tests/optim/test_numerics.py"] if run.small else []
    limit = max(1.0, 0.3 * run.left())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"status": None, "last line": f"stopped after {limit:.0f} s"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return {"status": done.returncode, "last line": lines[-1]}


def time_steps(run: Run) -> list[dict[str, Any]]:
    """Seconds of a step on fixed gradients, per shape and optimizer."""
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + 0.4 * run.left()
    for shape, build in run.shapes():
        for name in RATES:
            row: dict[str, Any] = {"shape": shape, "optimizer": name}
            rows.append(row)
            if time.monotonic() > end:
                row["skipped"] = "no time was left"
                continue
            model = build().to(run.device)
            row["parameters"] = sum(p.numel() for p in model.parameters())
            try:
                optimizers = optimizers_of(name, model, Protocol(device=run.device))
                set_gradients(model)
                laps = time_laps([o.step for o in optimizers], PERIOD + 2, run.device)[2:]
                row["step"] = summarise_periods([[sum(lap) for lap in laps]], refreshes=True)
                row["state bytes"] = state_bytes(optimizers)
            except (RuntimeError, ValueError) as error:
                row["skipped"] = str(error).splitlines()[0]
            del model
    return rows


def replay(run: Run) -> dict[str, Any]:
    """Steps of QuotientAdam replayed from a CUDA graph against the same taken directly."""
    if run.device != "cuda":
        return {"skipped": "CUDA graphs need a CUDA device"}
    models = [run.gpt()]
    set_gradients(models[0])
    models.append(copy.deepcopy(models[0]))
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert own.grad is not None
        other.grad = own.grad.clone()
    direct, recorded = (
        QuotientAdam(model, lr=1e-3, betas=BETAS, capturable=True, refresh_every=1000)
        for model in models
    )
    for _ in range(3):
        direct.step()
        recorded.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.step()
    for _ in range(5):
        graph.replay()
        direct.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    times = {
        name: summarise_periods([[lap[0] for lap in time_laps([act], PERIOD, "cuda")]], False)
        for name, act in (("direct", direct.step), ("replayed", graph.replay))
    }
    return {"largest difference of weights": difference, "step": times}


def train_all(run: Run, keep: Callable[[Any], None]) -> list[dict[str, Any]]:
    """The same batches and number of steps for every optimizer, as many as fit."""
    batch, context = (4, 64) if run.small else (32, 1024)
    protocol = Protocol(
        device=run.device, batch=batch, context=context, evaluate_every=50, validation_batches=4
    )
    task = load_task("stdlib", "gpt", batch, context)
    initial = run.gpt()
    seconds = {name: _seconds_per_step(name, initial, run, protocol, task) for name in RATES}
    evaluations = 1.15
    steps = int(0.9 * run.left() / (evaluations * sum(seconds.values())))
    protocol = replace(protocol, steps=max(2, min(steps, 30 if run.small else 3000)))
    rows: list[dict[str, Any]] = []
    for name in RATES:
        rows.append(_train(name, initial, run, protocol, task))
        rows[-1]["parameters"] = sum(p.numel() for p in initial.parameters())
        keep(rows)
    return rows


def _step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, fraction: float, peaks: Any
) -> None:
    """One step at a fraction of the peak learning rates."""
    for optimizer, own in zip(optimizers, peaks, strict=True):
        optimizer.zero_grad()
        for group, peak in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = peak * fraction
    with torch.autocast(batch.inputs.device.type, torch.bfloat16):
        loss = prediction_loss(model, batch)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _prepare(
    name: str, initial: nn.Module, protocol: Protocol
) -> tuple[nn.Module, list[Optimizer], list[list[float]]]:
    model = copy.deepcopy(initial)
    optimizers = optimizers_of(name, model, protocol)
    return model, optimizers, [[g["lr"] for g in o.param_groups] for o in optimizers]


def _seconds_per_step(
    name: str, initial: nn.Module, run: Run, protocol: Protocol, task: Task
) -> float:
    model, optimizers, peaks = _prepare(name, initial, protocol)
    batches = task.training_batches(protocol, 0)
    for batch in itertools.islice(batches, 2):
        _step(model, optimizers, batch.to(torch.device(run.device)), 0.0, peaks)
    start = time.monotonic()
    # A whole period, with what is done every ten steps only.
    for batch in itertools.islice(batches, PERIOD):
        _step(model, optimizers, batch.to(torch.device(run.device)), 0.0, peaks)
    return (time.monotonic() - start) / PERIOD


def _train(
    name: str, initial: nn.Module, run: Run, protocol: Protocol, task: Task
) -> dict[str, Any]:
    model, optimizers, peaks = _prepare(name, initial, protocol)
    device = torch.device(run.device)
    held_out = [batch.to(device) for batch in task.validation_batches(protocol)]
    curve: list[list[float]] = []
    start = time.monotonic()
    batches = task.training_batches(protocol, 0)
    for step, batch in enumerate(itertools.islice(batches, protocol.steps)):
        _step(model, optimizers, batch.to(device), protocol.schedule(step), peaks)
        if protocol.evaluates_after(step):
            with torch.no_grad(), torch.autocast(run.device, torch.bfloat16):
                losses = [float(prediction_loss(model, own)) for own in held_out]
            curve.append([step + 1, time.monotonic() - start, sum(losses) / len(losses)])
    rate, settings = RATES[name]
    return {"optimizer": name, "rate": rate, "settings": settings, "curve": curve}


def table(record: dict[str, Any]) -> str:
    """The last losses and the step times, as Markdown."""
    trained = [
        (row["optimizer"], row["curve"][-1][0], f"{row['curve'][-1][2]:.4f}")
        for row in record.get("training", [])
    ]
    timed = [
        (row["shape"], row["optimizer"], f"{1e3 * row['step']['mean']:.2f}")
        for row in record.get("step times", [])
        if "step" in row
    ]
    return "\n\n".join(
        (
            markdown_table(("optimizer", "steps", "validation loss"), trained),
            markdown_table(("shape", "optimizer", "ms per step"), timed),
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run all parts and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true", help="small models: does it run at all?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    run = Run(given.device, given.small, time.monotonic() + 60 * given.minutes)
    given.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "command": command_of("gpu.py", argv),
        "environment": describe_environment(given.device),
    }

    def keep(part: str, found: Any) -> None:
        record[part] = found
        write_atomically(given.out / "gpu.json", json.dumps(record, indent=1) + "\n")
        print(f"{part}: {run.left():.0f} s left", flush=True)

    keep("tests", run_tests(run))
    keep("step times", time_steps(run))
    keep("graph", replay(run))
    train_all(run, lambda rows: keep("training", rows))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
