"""Training runs: one, the cost of one step, and many at a time.

In reading order: `Training` and `train`, one run; `time_in_turn` and `state_bytes`, what a step
costs; `Workers`, which run trials in this process or several at a time in processes.
"""

import math
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from quotientopt.compare.data import Batch, Task, prediction_loss
from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Protocol, Run, RunFailedError, Seconds, Timing, Trial
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


def time_in_turn(
    trials: Sequence[Trial],
    protocol: Protocol,
    task: Task,
    skipped: int = 2,
    young: int = 98,
    grown: int = 30,
) -> list[Timing]:
    """Mean cost of a step of each of some runs, with nothing else running.

    They take a step each in turn, so that a machine whose speed varies slows all alike; on an
    accelerator, whose memory may not hold all at once, one after the other.

    The first steps are skipped: they allocate state and compute the first bases. As frames are made
    more often at first, the `young` steps after them count once each; the `grown` ones that
    follow, whole periods of what is done every ten steps, stand for the rest of the run. A run
    with fewer steps is young to its end.
    """
    if protocol.device != "cpu" and len(trials) > 1:
        every = (time_in_turn([trial], protocol, task, skipped, young, grown) for trial in trials)
        return [timing for own in every for timing in own]
    trainings = [Training(trial, protocol, task) for trial in trials]
    rest = max(protocol.steps - skipped - young, 0)
    counted = young + grown if rest else max(protocol.steps - skipped, grown)
    weights = [1.0] * young + [rest / grown] * grown if rest else None
    turns = [[own.step() for own in trainings] for _ in range(skipped + counted)][skipped:]
    return [_timing(list(steps), weights) for steps in zip(*turns, strict=True)]


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


def _timing(steps: list[Step], weights: list[float] | None = None) -> Timing:
    if not steps:
        return Timing(Seconds(0.0, 0.0), Seconds(0.0, 0.0))
    return Timing(
        _seconds([step.optimizer_seconds for step in steps], weights),
        _seconds([step.model_seconds for step in steps], weights),
    )


def _seconds(values: list[float], weights: list[float] | None) -> Seconds:
    return Seconds(statistics.median(values), statistics.fmean(values, weights))


def _plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Those defaults of a torch optimizer that JSON can hold."""
    kept = (bool, int, float, str, list, tuple)
    return {name: value for name, value in defaults.items() if isinstance(value, kept)}


OnProgress = Callable[[Trial, int, float], None]


class Workers(Interface):
    """Runs trials, at most `capacity` at a time."""

    capacity: int

    def start(self, trial: Trial) -> None:
        """Begin a trial; at most `capacity` may be under way."""

    def collect(self) -> list[Run]:
        """Wait until at least one trial is done and return what it gave."""

    def close(self) -> None:
        """Stop everything still under way."""


class SerialWorkers:
    """One trial at a time, in this process."""

    capacity = 1

    def __init__(self, protocol: Protocol, task: Task, on_progress: OnProgress) -> None:
        self._protocol, self._task, self._on_progress = protocol, task, on_progress
        self._waiting: list[Trial] = []
        torch.set_num_threads(protocol.threads)

    def start(self, trial: Trial) -> None:
        """Keep the trial until `collect` runs it."""
        self._waiting.append(trial)

    def collect(self) -> list[Run]:
        """Run the trial started last."""
        trial = self._waiting.pop()

        def report(step: int, loss: float) -> None:
            self._on_progress(trial, step, loss)

        return [train(trial, self._protocol, self._task, report)]

    def close(self) -> None:
        """Nothing is left running."""


class ParallelWorkers:
    """Several processes, each running one trial after the other."""

    def __init__(self, jobs: int, protocol: Protocol, task: Task, on_progress: OnProgress) -> None:
        self.capacity = jobs
        self._on_progress = on_progress
        self._busy: dict[Connection, Trial] = {}
        # A forked copy of torch's thread pools can hang, hence new interpreters.
        context = multiprocessing.get_context("spawn")
        self._idle: list[Connection] = []
        self._processes = []
        if hasattr(signal, "pthread_sigmask"):
            resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
        try:
            for _ in range(jobs):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, protocol, task))
                process.daemon = True
                with _interrupts_held_back():
                    process.start()
                    self._processes.append(process)
                there.close()
                self._idle.append(here)
        except BaseException:
            self.close()
            raise

    def start(self, trial: Trial) -> None:
        """Send the trial to an idle process."""
        connection = self._idle.pop()
        connection.send(trial)
        self._busy[connection] = trial

    def collect(self) -> list[Run]:
        """Pass progress on until a process sends a run."""
        runs: list[Run] = []
        while not runs:
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                message = self._receive(connection)
                if isinstance(message, Run):
                    del self._busy[connection]
                    self._idle.append(connection)
                    runs.append(message)
                else:
                    self._on_progress(self._busy[connection], *message)
        return runs

    def _receive(self, connection: Connection) -> Run | tuple[int, float]:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            trial = self._busy[connection]
            raise RunFailedError(
                f"the process running {trial} {self._end_of_one()}; fewer --jobs need less memory"
            ) from None
        if isinstance(message, str):
            raise RunFailedError(f"{self._busy[connection]} failed: {message}")
        return message

    def _end_of_one(self) -> str:
        """How a process that has gone away ended."""
        for process in self._processes:
            process.join(0.2)
            if process.exitcode is not None and process.exitcode < 0:
                return f"was killed by {signal.Signals(-process.exitcode).name}"
        return "has ended"

    def close(self) -> None:
        """Stop all processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Within it Ctrl-C waits, and processes started here never see it.

    It reaches the whole process group: the children inherit the blocked signal, and are stopped by
    `close`. This process, in which another thread may get it, hears of it when the block is left.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    blocked = hasattr(signal, "pthread_sigmask")  # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocked else set()
    try:
        yield
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _serve(connection: Connection, protocol: Protocol, task: Task) -> None:
    """Body of a worker process: receive trials, send (step, loss) pairs, then the run."""
    torch.set_num_threads(protocol.threads)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            trial = connection.recv()
            try:
                run = train(trial, protocol, task, lambda step, loss: connection.send((step, loss)))
            except OSError:
                raise
            except Exception as error:
                connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
            else:
                connection.send(run)
