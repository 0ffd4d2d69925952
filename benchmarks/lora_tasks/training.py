"""One training run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lora_tasks.batches import Batch
from lora_tasks.contenders import CONTENDERS, optimizers_of
from lora_tasks.model import Adapted
from lora_tasks.protocol import LoraProtocol
from lora_tasks.tasks import CLASSES, Task
from quotientopt._system import progress
from quotientopt.compare.protocol import Run, Seconds, Timing, Trial
from quotientopt.compare.train import DivergedError, state_bytes
from quotientopt.optim import StepRefusedError


class Step(NamedTuple):
    """Loss of a training step and where its processor seconds went.

    Those of this process, so that they mean something on a machine that does other work.
    """

    loss: float
    model_seconds: float
    optimizer_seconds: float


class Training:
    """Adapters in training: factors and batches depend on the seed, not on the optimizer."""

    def __init__(self, trial: Trial, protocol: LoraProtocol, task: Task) -> None:
        self.protocol = protocol
        self.model = Adapted(task, protocol, trial.seed)
        contender = CONTENDERS[trial.optimizer]
        self.optimizers = optimizers_of(self.model, contender, trial.rate, trial.settings, protocol)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.batches = task.training_batches(protocol, trial.seed)
        self.steps = 0

    def step(self) -> Step:
        """Train on the next batch."""
        fraction = self.protocol.schedule(self.steps)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            optimizer.zero_grad()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
        batch = next(self.batches)
        start = time.process_time()
        loss = self.model.losses(batch).mean()
        loss.backward()
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss of step {self.steps + 1} is {value}")
        middle = time.process_time()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.process_time()
        self.steps += 1
        return Step(value, middle - start, end - middle)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss of all predictions in `batches`."""
        return torch.cat([self.model.losses(batch) for batch in batches]).mean().item()

    @torch.no_grad()
    def accuracy(self, batches: Iterable[Batch]) -> float | None:
        """Fraction of classes predicted rightly; None where there are none."""
        if self.model.kind != CLASSES:
            return None
        pairs = [self.model.predictions(batch) for batch in batches]
        right = torch.cat([outputs.argmax(-1) == targets for outputs, targets in pairs])
        return right.double().mean().item()


def train(trial: Trial, protocol: LoraProtocol, task: Task) -> Run:
    """Train once from the seed of `trial` and measure.

    Returns
    -------
    Run
        Diverged if a loss is not finite or the optimizer refuses a step; training stops there.
    """
    training = Training(trial, protocol, task)
    held_out = task.validation_batches(protocol)
    steps: list[Step] = []
    curve: list[list[float]] = []
    seconds, finite = 0.0, True
    for _ in progress(range(protocol.steps), str(trial)):
        try:
            step = training.step()
        except (DivergedError, StepRefusedError, torch.linalg.LinAlgError):
            finite = False
            break
        steps.append(step)
        seconds += step.model_seconds + step.optimizer_seconds
        if protocol.evaluates_after(training.steps - 1):
            loss = training.validate(held_out)
            finite = math.isfinite(loss)
            if not finite:
                break
            curve.append([training.steps, seconds, loss])
    trained = [p for p in training.model.parameters() if p.requires_grad]
    return Run(
        trial=trial,
        status="finished" if finite else "diverged",
        final_loss=curve[-1][2] if finite else None,
        final_accuracy=training.accuracy(held_out) if finite else None,
        curve=curve,
        training_losses=[step.loss for step in steps],
        timing=timing(steps),
        state_bytes=state_bytes(training.optimizers),
        parameters=sum(parameter.numel() for parameter in trained),
        hyperparameters=hyperparameters(training.optimizers),
    )


def hyperparameters(optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Any]]:
    """What the optimizers, that of the head last, were built with, as far as JSON can hold it."""
    found: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        found[f"{name} (head)" if name in found else name] = plain(optimizer.defaults)
    return found


def timing(steps: list[Step]) -> Timing:
    """Seconds of a step; the first, which allocates state, is left out."""
    counted = steps[1:]
    if not counted:
        return Timing(Seconds(0.0, 0.0), Seconds(0.0, 0.0))
    columns = ([s.optimizer_seconds for s in counted], [s.model_seconds for s in counted])
    return Timing(*(Seconds(statistics.median(c), statistics.fmean(c)) for c in columns))


def plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Those defaults of an optimizer that JSON can hold."""
    kept = {
        n: v for n, v in defaults.items() if isinstance(v, bool | int | float | str | list | tuple)
    }
    return {n: list(v) if isinstance(v, tuple) else v for n, v in kept.items()}
