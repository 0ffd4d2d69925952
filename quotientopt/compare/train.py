"""One training run and the cost of one step."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.task import Batch, Task, prediction_loss
from quotientopt.compare.trial import Run, Seconds, Timing, Trial
from quotientopt.models import reference_model
from quotientopt.optim import StepRefusedError

OnStep = Callable[[int, float], None]


class Step(NamedTuple):
    """Loss of a training step and where its seconds went."""

    loss: float
    model_seconds: float
    optimizer_seconds: float
    all_seconds: float


class DivergedError(ArithmeticError):
    """A training loss is not finite."""


def build_model(protocol: Protocol, task: Task, seed: int) -> nn.Module:
    """The model of a comparison with the initial weights of that seed."""
    return reference_model(
        protocol.model,
        seed,
        layers=protocol.layers,
        width=protocol.width,
        **task.model_arguments(protocol),
    )


class Training:
    """A model in training: weights and batches depend on the seed only, not on the optimizer."""

    def __init__(self, trial: Trial, protocol: Protocol, task: Task) -> None:
        torch.manual_seed(trial.seed)
        self.protocol = protocol
        self.device = torch.device(protocol.device)
        self.model = build_model(protocol, task, trial.seed).to(self.device)
        build = OPTIMIZERS[trial.optimizer].build
        self.optimizers = build(self.model, trial.rate, trial.settings, protocol)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.batches = task.training_batches(protocol, trial.seed)
        self.steps = 0

    def step(self) -> Step:
        """Train on the next batch."""
        start = time.perf_counter()
        fraction = self.protocol.schedule(self.steps)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            optimizer.zero_grad()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
        batch = next(self.batches).to(self.device)
        before_model = self._now()
        loss = prediction_loss(self.model, batch)
        loss.backward()
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss of step {self.steps + 1} is {value}")
        before_optimizer = self._now()
        for optimizer in self.optimizers:
            optimizer.step()
        end = self._now()
        self.steps += 1
        return Step(value, before_optimizer - before_model, end - before_optimizer, end - start)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over `batches` of equal size, in nats."""
        return statistics.fmean(
            prediction_loss(self.model, batch.to(self.device)).item() for batch in batches
        )

    @torch.no_grad()
    def accuracy(self, batches: Iterable[Batch]) -> float | None:
        """Fraction of all predictions in `batches` that are right; None without batches."""
        right = total = 0
        for inputs, targets in batches:
            predicted = self.model(inputs.to(self.device)).argmax(dim=-1)
            right += int((predicted == targets.to(self.device)).sum())
            total += targets.numel()
        return right / total if total else None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train(
    trial: Trial, protocol: Protocol, task: Task, on_step: OnStep = lambda step, loss: None
) -> Run:
    """Train once from the seed of `trial` and measure.

    Parameters
    ----------
    trial : Trial
    protocol : Protocol
    task : Task
    on_step : callable
        Called with the number of steps done and the training loss after every step.

    Returns
    -------
    Run
        Diverged if a loss is not finite, in which case training stops there.
    """
    training = Training(trial, protocol, task)
    held_out = task.validation_batches(protocol)
    steps: list[Step] = []
    curve: list[list[float]] = []
    seconds, finite = 0.0, True
    while finite and training.steps < protocol.steps:
        try:
            step = training.step()
        except (DivergedError, StepRefusedError, torch.linalg.LinAlgError):
            finite = False
            break
        steps.append(step)
        seconds += step.all_seconds
        on_step(training.steps, step.loss)
        if finite and protocol.evaluates_after(training.steps - 1):
            loss = training.validate(held_out)
            finite = math.isfinite(loss)
            if finite:
                curve.append([training.steps, seconds, loss])
    return Run(
        trial=trial,
        status="finished" if finite else "diverged",
        final_loss=curve[-1][2] if finite else None,
        final_accuracy=training.accuracy(task.labelled_batches(protocol)) if finite else None,
        curve=curve,
        training_losses=[step.loss for step in steps],
        timing=_timing(steps),
        state_bytes=state_bytes(training.optimizers),
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        hyperparameters={type(o).__name__: _plain(o.defaults) for o in training.optimizers},
    )


def time_alone(
    trial: Trial, protocol: Protocol, task: Task, skipped: int = 10, counted: int = 30
) -> Timing:
    """Cost of a step with nothing else running.

    The first steps are skipped: they allocate state and compute the first bases. The counted ones
    hold whole periods of what is done every ten steps.
    """
    training = Training(trial, protocol, task)
    return _timing([training.step() for _ in range(skipped + counted)][skipped:])


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' states; shared storage counts once."""
    storages: dict[int, tuple[int, dict[tuple[Any, ...], int]]] = {}
    for tensor in _tensors([dict(optimizer.state) for optimizer in optimizers]):
        storage = tensor.untyped_storage()
        view = (tensor.storage_offset(), tensor.shape, tensor.stride())
        views = storages.setdefault(storage.data_ptr(), (storage.nbytes(), {}))[1]
        views[view] = tensor.numel() * tensor.element_size()
    return sum(min(size, sum(views.values())) for size, views in storages.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _timing(steps: list[Step]) -> Timing:
    if not steps:
        return Timing(Seconds(0.0, 0.0), Seconds(0.0, 0.0))
    return Timing(
        _seconds([step.optimizer_seconds for step in steps]),
        _seconds([step.model_seconds for step in steps]),
    )


def _seconds(values: list[float]) -> Seconds:
    return Seconds(statistics.median(values), statistics.fmean(values))


def _plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Those defaults of a torch optimizer that JSON can hold."""
    kept = (bool, int, float, str, list, tuple)
    return {name: value for name, value in defaults.items() if isinstance(value, kept)}
