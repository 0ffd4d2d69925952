"""The whole comparison: check the request, tune, repeat, time, write."""

import shlex
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quotientopt._system import LockedError, locked, write_atomically
from quotientopt.compare import report
from quotientopt.compare.data import IMAGES, MODEL_DEFAULTS, Task, load_task
from quotientopt.compare.optimizers import DEFAULT_OPTIMIZERS, find_optimizers
from quotientopt.compare.protocol import (
    Protocol,
    Run,
    RunFailedError,
    Trial,
    UsageError,
    available_cores,
    best_run,
    describe_environment,
    require,
)
from quotientopt.compare.record import FILE_NAME, Record, optimizers_of, prepare_folder, runs_in
from quotientopt.compare.report import Progress, make_progress
from quotientopt.compare.train import (
    ParallelWorkers,
    SerialWorkers,
    Workers,
    build_model,
    time_in_turn,
)
from quotientopt.compare.tuning import Plan, parse_grid, plan

LOCK = ".compare.lock"
REPORTS = (report.TABLE_NAME, report.PLOT_NAME)


@dataclass(frozen=True)
class Request:
    """The command line's arguments; see ``quotientopt compare --help``."""

    optimizers: str = DEFAULT_OPTIMIZERS
    data: str = "auto"
    model: str = "gpt"
    steps: int = 600
    lr_grid: str = "auto"
    seeds: int = 1
    device: str = "auto"
    out: str = "quotientopt-compare"
    jobs: int | None = None
    resume: bool = False
    redo: str | None = None
    overwrite: bool = False
    batch: int | None = None
    context: int | None = None
    layers: int | None = None
    width: int | None = None
    command: str = "quotientopt compare"


class Comparison:
    """A checked request, ready to run; holds its folder until it is closed.

    Parameters
    ----------
    request : Request

    Raises
    ------
    UsageError
        If anything in the request is wrong, another comparison is at work in the folder, or one is
        there that is neither to be resumed nor to be overwritten; nothing is written then.
    """

    def __init__(self, request: Request) -> None:
        _check_numbers(request)
        if request.model not in MODEL_DEFAULTS:
            known = ", ".join(MODEL_DEFAULTS)
            raise UsageError(f"unknown model {request.model!r}; known: {known}")
        self.entries = find_optimizers(request.optimizers)
        redo = _parse_redo(request, [entry.name for entry in self.entries])
        self.grid = parse_grid(request.lr_grid, [entry.name for entry in self.entries])
        self.seeds = request.seeds
        device = _find_device(request.device)
        self.jobs = _count_jobs(request.jobs, device)
        require("matplotlib")
        protocol = _protocol(request, device, max(1, available_cores() // self.jobs))
        self.task: Task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
        protocol = replace(protocol, data_digest=self.task.digest)
        _check_size(protocol, self.task)
        environment = describe_environment(device) | {"runs at a time": self.jobs}
        self.record = Record(request.command, protocol, environment)
        self.folder = Path(request.out)
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        prepare_folder(self.folder)
        self._held = ExitStack()
        try:
            self._hold_folder()
            self._take_over(request, redo)
        except BaseException:
            self.close()
            for path in made:
                path.rmdir()
            raise

    def _hold_folder(self) -> None:
        try:
            self._held.enter_context(locked(self.folder / LOCK))
        except LockedError:
            raise UsageError(
                f"another comparison is at work in {str(self.folder)!r}: wait for it, or choose "
                "another --out"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot lock {str(self.folder)!r}: {reason}") from error

    def _take_over(self, request: Request, redo: list[str]) -> None:
        """Take over the runs in the folder, or make sure that they may be replaced."""
        runs = runs_in(self.folder)
        # An earlier record stays until there is something to put in its place.
        self._replaces = runs is not None and not request.resume
        if request.resume:
            self.record.resume(self.folder, redo)
            for name in optimizers_of(self.record.runs):
                find_optimizers(name)  # each is timed again at the end
        elif not request.overwrite:
            there = [n for n in (FILE_NAME, *REPORTS) if (self.folder / n).exists()]
            if there:
                what = there[0] if runs is None else f"a comparison of {runs} runs"
                raise UsageError(
                    f"{str(self.folder)!r} holds {what}: --resume goes on with it, --overwrite "
                    "starts anew, or choose another --out"
                )

    def close(self) -> None:
        """Let go of the folder."""
        self._held.close()

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> None:
        """Train everything; compare.json is up to date after every run.

        Raises
        ------
        RunFailedError
            If a run cannot be finished, or its result not be written.
        """
        progress = make_progress(self.record.protocol.steps)
        workers: Workers | None = None
        try:
            if not self._replaces:
                self._save()
            workers = self._workers(progress)
            protocol = self.record.protocol
            plans = {
                entry.name: plan(
                    entry, protocol.model, self.grid.get(entry.name), self.seeds, self.record.runs
                )
                for entry in self.entries
            }
            self._execute(plans, workers, progress)
            workers.close()
            if self.jobs > 1 or self.record.resumed:
                self._time_alone(progress)
        finally:
            if workers is not None:
                workers.close()
            progress.close()

    def write_report(self) -> list[Path]:
        """Write compare.md and compare.png from what was measured so far.

        Without a run nothing is written in the place of an earlier comparison.

        Raises
        ------
        RunFailedError
            If they cannot be written.
        """
        if self._replaces and not self.record.runs:
            return []
        self._save()
        table, curves = self.folder / report.TABLE_NAME, self.folder / report.PLOT_NAME
        try:
            write_atomically(table, report.markdown(self.record))
            curves.unlink(missing_ok=True)  # no run finished: an earlier plot must not pass for one
            report.plot(self.record, curves)
        except OSError as error:
            raise self._not_written(error) from error
        return [path for path in (table, curves) if path.exists()]

    def _save(self) -> None:
        try:
            self.record.save(self.folder)
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> RunFailedError:
        return RunFailedError(f"cannot write in {str(self.folder)!r}: {error.strerror or error}")

    def _workers(self, progress: Progress) -> Workers:
        protocol = self.record.protocol
        if self.jobs == 1:
            return SerialWorkers(protocol, self.task, progress.step)
        return ParallelWorkers(self.jobs, protocol, self.task, progress.step)

    def _execute(self, plans: Mapping[str, Plan], workers: Workers, progress: Progress) -> None:
        """Advance every plan as its runs come in, with as many runs at a time as there is room."""
        asked = {name: next(plan) for name, plan in plans.items()}
        waiting: deque[Trial] = deque(trial for trials in asked.values() for trial in trials)
        running = 0
        while asked:
            self._advance(plans, asked, waiting)
            while waiting and running < workers.capacity:
                trial = waiting.popleft()
                if self.record.find(trial) is None:
                    workers.start(trial)
                    running += 1
            if running:
                for run in workers.collect():
                    running -= 1
                    self._keep(run, progress, running + len(waiting))

    def _advance(
        self,
        plans: Mapping[str, Plan],
        asked: dict[str, list[Trial]],
        waiting: deque[Trial],
    ) -> None:
        """Send complete batches of runs to their plans, and queue what they ask for next."""
        for name in list(asked):
            while name in asked:
                runs = [run for run in map(self.record.find, asked[name]) if run is not None]
                if len(runs) < len(asked[name]):
                    break
                try:
                    asked[name] = plans[name].send(runs)
                    waiting.extend(asked[name])
                except StopIteration:
                    del asked[name]

    def _keep(self, run: Run, progress: Progress, left: int) -> None:
        self.record.runs.append(run)
        self._save()
        progress.finished(run, len(self.record.runs), left)

    def _time_alone(self, progress: Progress) -> None:
        """Time the best settings in this process, now that nothing else runs."""
        protocol = self.record.protocol
        torch.set_num_threads(protocol.threads)
        best = (best_run(self.record.runs, name) for name in optimizers_of(self.record.runs))
        trials = [run.trial for run in best if run is not None and run.status == "finished"]
        if not trials:
            return
        progress.say(f"timing {', '.join(trial.optimizer for trial in trials)}, a step in turn")
        timings = time_in_turn(trials, protocol, self.task)
        for trial, timing in zip(trials, timings, strict=True):
            self.record.timings[trial.optimizer] = timing
        self._save()


def _check_numbers(request: Request) -> None:
    if request.resume and request.overwrite:
        raise UsageError("--resume goes on with a comparison and --overwrite starts anew: take one")
    for name in ("steps", "seeds", "batch", "context", "layers", "width"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")


def _parse_redo(request: Request, optimizers: list[str]) -> list[str]:
    if request.redo is None:
        return []
    if not request.resume:
        raise UsageError("--redo needs --resume: without it every run is made anew")
    redo = [name.strip() for name in request.redo.split(",")]
    for name in redo:
        if name not in optimizers:
            raise UsageError(
                f"--redo {name!r}: not among the optimizers of this comparison, "
                f"{', '.join(optimizers)}"
            )
    return redo


def _protocol(request: Request, device: str, threads: int) -> Protocol:
    """The request's settings, the model's own where it gives none; the data not yet hashed."""
    defaults = MODEL_DEFAULTS[request.model]
    if defaults.kind == IMAGES and request.context is not None:
        raise UsageError(
            f"--context is for texts; model {request.model!r} reads images, "
            f"each of {defaults.context} patches"
        )

    def given(name: str) -> int:
        value = getattr(request, name)
        return getattr(defaults, name) if value is None else value

    return Protocol(
        model=request.model,
        data=defaults.data if request.data == "auto" else request.data,
        device=device,
        threads=threads,
        steps=request.steps,
        batch=given("batch"),
        context=given("context"),
        layers=given("layers"),
        width=given("width"),
        # Short runs have a curve too.
        evaluate_every=min(Protocol.evaluate_every, max(1, request.steps // 8)),
        validation_batches=defaults.validation_batches,
    )


def _check_size(protocol: Protocol, task: Task) -> None:
    """Refuse a size the model does not come in, before anything is trained."""
    try:
        build_model(protocol, task, 0)
    except ValueError as error:
        raise UsageError(f"model {protocol.model!r}: {error}") from error


def _find_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' is not available: torch finds no CUDA device")
    return name


def _count_jobs(jobs: int | None, device: str) -> int:
    """As many runs at a time as cores: one thread each trains more steps a second in all."""
    if jobs is None:
        return 1 if device == "cuda" else available_cores()
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    return jobs


def command_line(arguments: list[str]) -> str:
    """The command as the user would type it again."""
    return shlex.join(["quotientopt", *arguments])
