"""The whole comparison: check the request, tune, repeat, time, write."""

import shlex
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quotientopt.compare import plot, report
from quotientopt.compare.data import Corpus, load_corpus
from quotientopt.compare.environment import available_cores, describe_environment
from quotientopt.compare.errors import UsageError, require
from quotientopt.compare.optimizers import find_optimizers
from quotientopt.compare.progress import Progress, make_progress
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.record import Record, prepare_folder, write_atomically
from quotientopt.compare.summary import optimizers_of
from quotientopt.compare.train import time_alone
from quotientopt.compare.trial import Run, Trial, best_run
from quotientopt.compare.tuning import Plan, parse_grid, plan
from quotientopt.compare.workers import ParallelWorkers, SerialWorkers, Workers
from quotientopt.models import REFERENCE_MODELS


@dataclass(frozen=True)
class Request:
    """The command line's arguments; see ``quotientopt compare --help``."""

    optimizers: str = "adamw,quotient-adam,soap,muon"
    data: str = "stdlib"
    model: str = "gpt"
    steps: int = 600
    lr_grid: str = "auto"
    seeds: int = 1
    device: str = "auto"
    out: str = "quotientopt-compare"
    jobs: int | None = None
    resume: bool = False
    batch: int = 16
    context: int = 128
    command: str = "quotientopt compare"


class Comparison:
    """A checked request, ready to run.

    Parameters
    ----------
    request : Request

    Raises
    ------
    UsageError
        If anything in the request is wrong; nothing is written then.
    """

    def __init__(self, request: Request) -> None:
        for name in ("steps", "seeds", "batch", "context"):
            if getattr(request, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(request, name)}")
        if request.model not in REFERENCE_MODELS:
            known = ", ".join(REFERENCE_MODELS)
            raise UsageError(f"unknown model {request.model!r}; known: {known}")
        self.entries = find_optimizers(request.optimizers)
        self.grid = parse_grid(request.lr_grid, [entry.name for entry in self.entries])
        self.seeds = request.seeds
        device = _find_device(request.device)
        self.jobs = _count_jobs(request.jobs, device)
        require("matplotlib")
        self.corpus: Corpus = load_corpus(request.data, request.context)
        protocol = Protocol(
            model=request.model,
            data=request.data,
            data_digest=self.corpus.digest,
            device=device,
            threads=max(1, available_cores() // self.jobs),
            steps=request.steps,
            batch=request.batch,
            context=request.context,
        )
        environment = describe_environment(device) | {"runs at a time": self.jobs}
        self.record = Record(request.command, protocol, environment)
        self.folder = Path(request.out)
        if request.resume:
            self.record.resume(self.folder)
        prepare_folder(self.folder)

    def run(self) -> None:
        """Train everything; compare.json is up to date after every run."""
        progress = make_progress(self.record.protocol.steps)
        self.record.save(self.folder)
        workers = self._workers(progress)
        try:
            protocol = self.record.protocol
            plans = {
                entry.name: plan(
                    entry, protocol.model, self.grid.get(entry.name), self.seeds, self.record.runs
                )
                for entry in self.entries
            }
            self._execute(plans, workers, progress)
            workers.close()
            if self.jobs > 1:
                self._time_alone(progress)
        finally:
            workers.close()
            progress.close()

    def write_report(self) -> list[Path]:
        """Write compare.md and compare.png from what was measured so far."""
        self.record.save(self.folder)
        table, curves = self.folder / report.FILE_NAME, self.folder / plot.FILE_NAME
        write_atomically(table, report.markdown(self.record))
        curves.unlink(missing_ok=True)  # no run finished: an earlier plot must not pass for one
        plot.plot(self.record, curves)
        return [path for path in (table, curves) if path.exists()]

    def _workers(self, progress: Progress) -> Workers:
        protocol = self.record.protocol
        if self.jobs == 1:
            return SerialWorkers(protocol, self.corpus, progress.step)
        return ParallelWorkers(self.jobs, protocol, self.corpus, progress.step)

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
        self.record.save(self.folder)
        progress.finished(run, len(self.record.runs), left)

    def _time_alone(self, progress: Progress) -> None:
        """Time the best settings in this process, now that nothing else runs."""
        protocol = self.record.protocol
        torch.set_num_threads(protocol.threads)
        for name in optimizers_of(self.record.runs):
            best = best_run(self.record.runs, name)
            if best is not None and best.status == "finished":
                progress.say(f"timing {name} alone")
                self.record.timings[name] = time_alone(best.trial, protocol, self.corpus)
        self.record.save(self.folder)


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
