"""One run on a GPU, of at most nine minutes: tests, step times, a replayed graph, a training.

In this order, each part within its share of the time; the record is written after each, and a part
that fails leaves its error there:

1. ``pytest -m gpu``.
2. Seconds of a step on the shapes of GPT-2 small and of a Llama with 1.1 billion parameters, how
   often it makes the host wait, and what runs on the device in it.
3. A step recorded as a CUDA graph, held against steps taken directly.
4. A GPT with 121 million parameters on source text, bytes, autocast to bfloat16: every optimizer's
   rate tuned in short runs, then as many steps for each as fit.

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
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiment import command_of, markdown_table
from step_timing import (
    PERIOD,
    grow_,
    measure_synchronisations,
    set_gradients,
    summarise_periods,
    time_laps,
)
from torch import nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from quotientopt import QuotientAdam
from quotientopt.compare.data import Task, load_task, prediction_loss
from quotientopt.compare.optimizers import BETAS, OPTIMIZERS
from quotientopt.compare.protocol import Protocol, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import state_bytes
from quotientopt.models import GPT, Llama

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu"
# Rates at which tuning starts, of matrices; beside Muon and SOAP-Muon, AdamW's.
RATES: dict[str, tuple[float, dict[str, float]]] = {
    "adamw": (1e-3, {"beta2": 0.95}),
    "muon": (2e-2, {"adamw_rate": 2e-3}),
    "quotient-adam": (1e-3, {}),
    "soap-muon": (8e-3, {"adamw_rate": 2e-3}),
}
# Runs that tune a rate have this share of the steps of those that count.
TUNING = 0.15
PRECISIONS = ("highest", "high", "fast")
# Kernels that are named, of those that run in a step.
LONGEST = 12


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
        torch.manual_seed(0)
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


def optimizers_of(
    name: str, model: nn.Module, protocol: Protocol, rate: float | None = None
) -> list[Optimizer]:
    """An optimizer of the comparison at a rate, or at that where its tuning starts.

    QuotientAdam's products are in TF32 where there is one, as SOAP-Muon's are in `_step`.
    """
    first, settings = RATES[name]
    made = OPTIMIZERS[name].build(model, rate or first, settings, protocol)
    if name == "quotient-adam":
        set_precision(made, "high")
    return made


def set_precision(optimizers: list[Optimizer], precision: str) -> None:
    """QuotientAdam's option, from the next step on."""
    for group in optimizers[0].param_groups:
        group["precision"] = precision


def run_tests(run: Run) -> dict[str, Any]:
    """``pytest -m gpu``: its exit status and last lines."""
    files = ["tests/optim/test_numerics.py"]
    if not run.small:
        marked = (
            p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()
        )
        files = [str(path.relative_to(ROOT)) for path in marked]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    limit = max(1.0, 0.25 * run.left())
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "last lines": [f"stopped after {limit:.0f} s"]}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    first = next((i for i, line in enumerate(lines) if "short test summary" in line), -1)
    if done.returncode:
        print("\n".join(lines[-150:]))
    return {"status": done.returncode, "files": files, "last lines": lines[first:]}


def time_steps(run: Run, keep: Callable[[Any], None]) -> None:
    """Seconds of a step on fixed gradients, per shape and optimizer."""
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + 0.4 * run.left()
    for shape, build in run.shapes():
        with torch.device(run.device):
            model = build()
        set_gradients(model)
        for name in RATES:
            row: dict[str, Any] = {"shape": shape, "optimizer": name}
            row["parameters"] = sum(p.numel() for p in model.parameters())
            if time.monotonic() > end:
                rows.append(row | {"skipped": "no time was left"})
            elif (shape, name) == ("llama-1b", "soap-muon"):
                why = "48 eigenbases of 8192 × 8192 matrices at its first step alone"
                rows.append(row | {"skipped": why})
            else:
                rows.extend(row | own for own in _time_optimizer(name, model, run))
            keep(rows)


def _time_optimizer(name: str, model: nn.Module, run: Run) -> Iterator[dict[str, Any]]:
    """Rows of one optimizer; of QuotientAdam one for each precision."""
    try:
        optimizers = optimizers_of(name, model, Protocol(device=run.device), 1e-5)
        steps = [optimizer.step for optimizer in optimizers]
        first = sum(time_laps(steps, 1, run.device)[0])
        grow_(optimizers)
        for precision in PRECISIONS if name == "quotient-adam" else (None,):
            row: dict[str, Any] = {"first step": first, "state bytes": state_bytes(optimizers)}
            if precision:
                set_precision(optimizers, precision)
                row["precision"] = precision
            laps = time_laps(steps, PERIOD + 1, run.device)[1:]
            row["step"] = summarise_periods([[sum(lap) for lap in laps]], refreshes=True)
            if run.device == "cuda" and precision in (None, "highest"):
                row["waits"] = measure_synchronisations(lambda: _all(steps), refreshes=True)
                row["on the device"] = _kernels(lambda: _all(steps))
            yield row
    except (RuntimeError, ValueError) as error:
        yield {"skipped": str(error).splitlines()[0]}


def _all(acts: list[Callable[..., object]]) -> None:
    for act in acts:
        act()


def _kernels(act: Callable[[], object]) -> dict[str, Any]:
    """Number and time of what runs on the device, and the kernels that take longest."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        act()
        torch.cuda.synchronize()
    spans: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        # What torch writes on the time line around a step is no kernel.
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.step#"):
            spans[event.name].append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(spans.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "launches": sum(map(len, spans.values())),
        "ms": sum(map(sum, spans.values())),
        "longest": [[name[:100], len(own), sum(own)] for name, own in longest],
    }


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
    difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
    times = {
        name: summarise_periods([[lap[0] for lap in time_laps([act], PERIOD, "cuda")]], False)
        for name, act in (("direct", direct.step), ("replayed", graph.replay))
    }
    return {"largest difference of weights": difference, "step": times}


def train_all(run: Run, keep: Callable[[Any], None]) -> None:
    """Rates tuned in short runs; then the same batches and number of steps for every optimizer."""
    batch, context = (4, 64) if run.small else (16, 1024)
    protocol = Protocol(
        device=run.device, batch=batch, context=context, evaluate_every=50, validation_batches=8
    )
    task = load_task("stdlib", "gpt", batch, context)
    trainer = Trainer(run, replace(protocol, data_digest=task.digest), task, run.gpt())
    found: dict[str, Any] = {
        "data": {"name": "stdlib", "digest": task.digest, "batch": batch, "context": context},
        "parameters": sum(p.numel() for p in trainer.initial.parameters()),
        "seconds per step": {name: trainer.seconds_per_step(name) for name in RATES},
        "tuning": [],
        "runs": [],
    }
    keep(found)
    evaluations = 1.05
    per_step = evaluations * sum(found["seconds per step"].values())
    most = 20 if run.small else 3000
    steps = max(8, min(most, int(0.9 * run.left() / (per_step * (1 + 4 * TUNING)))))
    short, long = (replace(protocol, steps=n) for n in (max(2, int(TUNING * steps)), steps))
    best: dict[str, float] = {}
    for name, (first, _) in RATES.items():
        losses: dict[float, float] = {}
        for rate in climb(first, losses):
            row = trainer.train(name, rate, short)
            losses[rate] = row["curve"][-1][2]
            found["tuning"].append(row)
            keep(found)
        best[name] = min(losses, key=losses.__getitem__)
    for name, rate in best.items():
        found["runs"].append(trainer.train(name, rate, long))
        keep(found)


def climb(first: float, losses: dict[float, float], most: int = 4) -> Iterator[float]:
    """Rates by factors of two, towards the lower of `losses` until both neighbours are known."""
    yield from (first, 2 * first, first / 2)
    for _ in range(most - 3):
        best = min(losses, key=losses.__getitem__)
        unknown = [rate for rate in (2 * best, best / 2) if rate not in losses]
        if not unknown:
            return
        yield unknown[0]


@dataclass(frozen=True)
class Trainer:
    """A model to start from and what it is trained on."""

    run: Run
    protocol: Protocol
    task: Task
    initial: nn.Module

    def seconds_per_step(self, name: str) -> float:
        """Over a whole period, with what is done every ten steps only."""
        protocol = replace(self.protocol, steps=2 + PERIOD)
        model, optimizers, peaks = self._start(name, RATES[name][0], protocol)
        batches = itertools.islice(self.task.training_batches(protocol, 0), protocol.steps)
        start = 0.0
        for step, batch in enumerate(batches):
            if step == 2:
                grow_(optimizers)
                start = self._now()
            self._step(model, optimizers, batch, 0.0, peaks)
        return (self._now() - start) / PERIOD

    def train(self, name: str, rate: float, protocol: Protocol) -> dict[str, Any]:
        """One run: its curve of (steps, seconds without validations, validation loss)."""
        model, optimizers, peaks = self._start(name, rate, protocol)
        held_out = [
            batch.to(torch.device(self.run.device))
            for batch in self.task.validation_batches(protocol)
        ]
        curve: list[list[float]] = []
        seconds, start = 0.0, self._now()
        batches = itertools.islice(self.task.training_batches(protocol, 0), protocol.steps)
        for step, batch in enumerate(batches):
            self._step(model, optimizers, batch, protocol.schedule(step), peaks)
            if protocol.evaluates_after(step):
                seconds += self._now() - start
                with torch.no_grad(), torch.autocast(self.run.device, torch.bfloat16):
                    losses = [float(prediction_loss(model, own)) for own in held_out]
                curve.append([step + 1, seconds, sum(losses) / len(losses)])
                start = self._now()
        settings = RATES[name][1]
        return {
            "optimizer": name,
            "rate": rate,
            "settings": settings,
            "curve": curve,
            "state bytes": state_bytes(optimizers),
        }

    def _start(
        self, name: str, rate: float, protocol: Protocol
    ) -> tuple[nn.Module, list[Optimizer], list[list[float]]]:
        model = copy.deepcopy(self.initial)
        optimizers = optimizers_of(name, model, protocol, rate)
        return model, optimizers, [[g["lr"] for g in o.param_groups] for o in optimizers]

    def _step(
        self, model: nn.Module, optimizers: list[Optimizer], batch: Any, fraction: float, peaks: Any
    ) -> None:
        """One step at a fraction of the peak learning rates; products of optimizers in TF32."""
        for optimizer, own in zip(optimizers, peaks, strict=True):
            optimizer.zero_grad()
            for group, peak in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = peak * fraction
        batch = batch.to(torch.device(self.run.device))
        with torch.autocast(self.run.device, torch.bfloat16):
            loss = prediction_loss(model, batch)
        loss.backward()
        torch.set_float32_matmul_precision("high")
        for optimizer in optimizers:
            optimizer.step()
        torch.set_float32_matmul_precision("highest")

    def _now(self) -> float:
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()


def table(record: dict[str, Any]) -> str:
    """The last losses and the step times, as Markdown."""
    trained = [
        (
            row["optimizer"],
            f"{row['rate']:g}",
            row["curve"][-1][0],
            *(f"{x:.3f}" for x in row["curve"][-1][1:]),
        )
        for part in ("tuning", "runs")
        for row in record.get("training", {}).get(part, [])
    ]
    timed = [
        (
            row["shape"],
            row["optimizer"],
            row.get("precision", ""),
            f"{1e3 * row['step']['mean']:.2f}" if "step" in row else row["skipped"],
            row.get("on the device", {}).get("launches", ""),
            row.get("waits", {}).get("per step", ""),
        )
        for row in record.get("step times", [])
    ]
    parts = (
        "# On a GPU",
        markdown_table(("shape", "optimizer", "precision", "ms", "launches", "waits"), timed),
        "Training: first the runs that tune a rate, last one for every optimizer.",
        markdown_table(("optimizer", "rate", "steps", "seconds", "validation loss"), trained),
    )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run all parts and write the record; 1 if a part failed."""
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

    parts: dict[str, Callable[[], None]] = {
        "tests": lambda: keep("tests", run_tests(run)),
        "step times": lambda: time_steps(run, lambda rows: keep("step times", rows)),
        "graph": lambda: keep("graph", replay(run)),
        "training": lambda: train_all(run, lambda found: keep("training", found)),
    }
    failed = False
    for part, act in parts.items():
        try:
            act()
        except Exception as error:  # The time is short: the other parts are still to come.
            failed = True
            traceback.print_exc()
            keep(f"error in {part}", f"{type(error).__name__}: {error}")
        if given.device == "cuda":
            torch.cuda.empty_cache()
    write_atomically(given.out / "gpu.md", table(record))
    print(table(record))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
