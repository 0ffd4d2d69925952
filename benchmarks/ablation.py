"""Ablations of QuotientAdam under the protocol of ``quotientopt compare``.

Every question is a set of variants of the same training, one of them the default: the same
weights and batches for the same seed. The default is run with all learning rates on seed 0, and at
the best on the other seeds. Variants run at that rate too, but those whose updates are of another
size: they have rates of their own. The records are rewritten after every run, and runs they hold
are not repeated.

    python benchmarks/ablation.py head-frame --seeds 3
    python benchmarks/ablation.py --all --seeds 3 --estimate
    python benchmarks/ablation.py --report
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablation_records import Conditions, Record, code_digest, load, load_all, write_report
from ablation_variants import DEFAULT, QUESTIONS, VARIANTS, Variant
from experiment import command_of
from torch import nn

from quotientopt import QuotientAdam
from quotientopt.compare.data import MODEL_DEFAULTS, Task, load_task
from quotientopt.compare.optimizers import BETAS, OPTIMIZERS, Entry
from quotientopt.compare.protocol import (
    Protocol,
    Run,
    Trial,
    UsageError,
    available_cores,
    best_run,
    describe_environment,
    require,
)
from quotientopt.compare.record import prepare_folder
from quotientopt.compare.train import train

Start = Callable[..., "Future[Run]"]


class Ablations:
    """Questions to answer, with the runs already made.

    Parameters
    ----------
    questions : sequence of str
    conditions : Conditions
    environment : dict
    rates : tuple of float
        Tried for the default.
    seeds : int
    folder : Path
        Where the records are. Runs that fit are taken from the questions' own records and, for
        variants they share, from the others.
    command : str
    redo : bool
        Leave the questions' own records aside.
    keep : bool
        Go on with runs made by other code.

    Raises
    ------
    UsageError
        If a record of one of the questions cannot be gone on with.
    """

    def __init__(
        self,
        questions: Sequence[str],
        conditions: Conditions,
        environment: dict[str, Any],
        rates: tuple[float, ...],
        seeds: int,
        folder: Path,
        *,
        command: str = "",
        redo: bool = False,
        keep: bool = False,
    ) -> None:
        self.conditions, self.rates, self.seeds, self.folder = conditions, rates, seeds, folder
        self.records = []
        for question in questions:
            record = None if redo else _resumed(folder, question, conditions, keep)
            self.records.append(record or Record(question, conditions, environment))
        others = [name for name in QUESTIONS if name not in questions]
        fitting = [r for r in _readable(folder, others) if r.codes == [conditions.code]]
        fitting = [r for r in fitting if r.conditions == conditions]
        for run in [run for record in [*self.records, *fitting] for run in record.runs]:
            self._add(run)
        for record in self.records:
            if command not in record.commands:
                record.commands.append(command)
            if conditions.code not in record.codes:
                record.codes.append(conditions.code)
        names = dict.fromkeys(
            variant.name for q in questions for variant in QUESTIONS[q].variants.values()
        )
        self.variants = [VARIANTS[name] for name in names]

    def missing(self) -> int:
        """Number of runs to make; where seed 0 is not done, as if its best rate were new."""
        return sum(map(self._missing, self.variants))

    def _missing(self, variant: Variant) -> int:
        screening = self._screening(variant)
        screened = self._made(screening)
        if not screening:  # The default's best rate is not known, or there is none.
            return 0 if self._is_screened(DEFAULT) else self.seeds
        if len(screened) < len(screening):
            return len(screening) - len(screened) + self.seeds - 1
        repetitions = self._repetitions(variant)
        return len(repetitions) - len(self._made(repetitions))

    def _made(self, trials: Iterable[Trial]) -> list[Trial]:
        return [trial for trial in trials if self.find(trial) is not None]

    def find(self, trial: Trial) -> Run | None:
        """The run of `trial`, if it was made."""
        found = (record.find(trial) for record in self.records)
        return next((run for run in found if run is not None), None)

    def _screening(self, variant: Variant) -> list[Trial]:
        """Its trials on seed 0: at its own rates, else at the default's best once that is known."""
        rates = self.rates if variant == DEFAULT else variant.rates
        if rates is None:
            best = self._best(DEFAULT)
            rates = () if best is None else (best.trial.rate,)
        return [Trial(variant.name, rate) for rate in rates]

    def _is_screened(self, variant: Variant) -> bool:
        return all(self.find(trial) is not None for trial in self._screening(variant))

    def _best(self, variant: Variant) -> Run | None:
        """Its best run on seed 0; None if that is not known yet, or all have diverged."""
        screened = list(map(self.find, self._screening(variant)))
        if not all(screened):
            return None
        best = best_run([run for run in screened if run is not None], variant.name)
        return None if best is None or best.final_loss is None else best

    def _repetitions(self, variant: Variant) -> list[Trial]:
        """The other seeds at the best rate on seed 0."""
        best = self._best(variant)
        if best is None:
            return []
        return [Trial(variant.name, best.trial.rate, {}, seed) for seed in range(1, self.seeds)]

    def wanted(self) -> list[Trial]:
        """Trials that can be made now, those on seed 0 first."""
        trials = [trial for variant in self.variants for trial in self._screening(variant)]
        trials += [trial for variant in self.variants for trial in self._repetitions(variant)]
        return [trial for trial in trials if self.find(trial) is None]

    def _add(self, run: Run) -> None:
        for record in self.records:
            record.add(run)

    def run(self, jobs: int, on_run: Callable[[Run], None] = lambda run: None) -> None:
        """Make the runs that are missing, `jobs` at a time; records are saved after each."""
        running: dict[Future[Run], Trial] = {}
        protocol = self.conditions.protocol
        with _starter(jobs) as start:
            while True:
                waiting = [t for t in self.wanted() if t not in running.values()]
                for trial in waiting[: jobs - len(running)]:
                    running[start(train_variant, trial, protocol)] = trial
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                    self._add(done.result())
                    self.save()
                    on_run(done.result())
        self.save()

    def save(self) -> None:
        """Write all records."""
        for record in self.records:
            record.save(self.folder)


def _resumed(folder: Path, question: str, conditions: Conditions, keep: bool) -> Record | None:
    record = load(folder, question)
    if record is None:
        return None
    wanted = Conditions(conditions.protocol, record.conditions.code) if keep else conditions
    differences = wanted.differences(record.conditions)
    if differences:
        raise UsageError(
            f"{folder / question}.json was made with {'; '.join(differences)}: --redo makes its "
            "runs anew, --keep goes on with runs of other code, --out writes elsewhere"
        )
    return record


def _readable(folder: Path, questions: Sequence[str]) -> list[Record]:
    """Records that can be read; nothing depends on the others."""
    found: list[Record] = []
    for question in questions:
        try:
            found += load_all(folder, [question])
        except UsageError:
            continue
    return found


@contextmanager
def _starter(jobs: int) -> Iterator[Start]:
    """How to start a run: in one of several processes, or here and now."""
    if jobs == 1:
        yield _at_once
        return
    # A forked copy of torch's thread pools can hang, hence new interpreters.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            yield pool.submit
        finally:
            pool.shutdown(cancel_futures=True)


def _at_once(call: Callable[..., Run], *arguments: Any) -> Future[Run]:
    future: Future[Run] = Future()
    future.set_result(call(*arguments))
    return future


@functools.lru_cache(maxsize=1)
def _task(data: str, model: str, batch: int, context: int) -> Task:
    return load_task(data, model, batch, context)


def train_variant(trial: Trial, protocol: Protocol) -> Run:
    """Train the variant that `trial` names, as a comparison trains an optimizer."""
    variant = VARIANTS[trial.optimizer]
    options = {"betas": BETAS, "weight_decay": protocol.weight_decay} | dict(variant.options)

    def build(model: nn.Module, rate: float, *_: Any) -> list[torch.optim.Optimizer]:
        return [QuotientAdam(model, lr=rate, **options)]

    torch.set_num_threads(protocol.threads)
    task = _task(protocol.data, protocol.model, protocol.batch, protocol.context)
    OPTIMIZERS[variant.name] = Entry(variant.name, build, {})
    try:
        with variant.patch() if variant.patch else nullcontext():
            return train(trial, protocol, task)
    finally:
        del OPTIMIZERS[variant.name]


RESULTS = Path(__file__).parent / "results" / "ablation"
SIZES = ("batch", "context", "layers", "width")


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out the command line; a wrong one ends with a line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    given = parser.parse_args(argv)
    given.command = command_of("ablation.py", argv)
    try:
        check(given)
        run(given)
    except UsageError as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--all", action="store_true", help="all questions")
    add("--report", action="store_true", help="write table and plot of all questions in --out")
    add("--estimate", action="store_true", help="print the number of runs to make, make none")
    add("--rates", default="2e-3,4e-3,8e-3", help="learning rates to try for the default")
    add("--seeds", type=int, default=1)
    add("--steps", type=int, default=300)
    add("--jobs", type=int, default=available_cores(), help="runs at a time")
    add("--model", choices=("gpt", "llama"), default="gpt")
    add("--data", default="stdlib")
    for name in SIZES:
        add(f"--{name}", type=int)
    add("--out", type=Path, default=RESULTS, metavar="FOLDER")
    add("--redo", action="store_true", help="make the questions' runs anew")
    add("--keep", action="store_true", help="go on with runs that other code has made")
    return parser


def check(given: argparse.Namespace) -> None:
    """Check the arguments; afterwards `questions` is complete and `rates` are numbers.

    Raises
    ------
    UsageError
        Naming the argument.
    """
    for name in given.questions:
        if name not in QUESTIONS:
            raise UsageError(f"unknown question {name!r}; known: {', '.join(QUESTIONS)}")
    given.questions = list(QUESTIONS) if given.all else list(dict.fromkeys(given.questions))
    if not given.questions and not given.report:
        raise UsageError(f"name a question ({', '.join(QUESTIONS)}), or give --all or --report")
    if given.redo and given.keep:
        raise UsageError("choose --redo or --keep, not both")
    try:
        given.rates = tuple(dict.fromkeys(float(rate) for rate in given.rates.split(",")))
    except ValueError as error:
        raise UsageError(f"--rates: {error}") from error
    if not all(math.isfinite(rate) and rate > 0 for rate in given.rates):
        raise UsageError("--rates: learning rates must be positive numbers")
    for name in ("seeds", "steps", "jobs", *SIZES):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")


def run(given: argparse.Namespace) -> None:
    """Make the runs that are missing, or count them, and write the report.

    Raises
    ------
    UsageError
        For data or sizes that cannot be used, and records that cannot be gone on with.
    """
    if given.report:
        require("matplotlib")
    if given.questions:
        ablations = Ablations(
            given.questions,
            Conditions(find_protocol(given), code_digest()),
            describe_environment("cpu") | {"runs at a time": given.jobs},
            given.rates,
            given.seeds,
            given.out,
            command=given.command,
            redo=given.redo,
            keep=given.keep,
        )
        if given.estimate:
            print(f"{ablations.missing()} runs of {given.steps} steps")
            return
        make_runs(ablations, given)
    if given.report:
        for path in write_report(load_all(given.out), given.out):
            print(path)


def find_protocol(given: argparse.Namespace) -> Protocol:
    """The protocol of `quotientopt compare`, for these steps, this model and its data."""
    defaults = MODEL_DEFAULTS[given.model]
    sizes = {name: getattr(given, name) or getattr(defaults, name) for name in SIZES}
    protocol = Protocol(
        model=given.model,
        data=given.data,
        steps=given.steps,
        threads=max(1, available_cores() // given.jobs),
        validation_batches=defaults.validation_batches,
        **sizes,
    )
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    return replace(protocol, data_digest=task.digest)


def make_runs(ablations: Ablations, given: argparse.Namespace) -> None:
    """Make the missing runs and say how they end."""
    prepare_folder(given.out)
    start, done = time.perf_counter(), 0

    def tell(finished: Run) -> None:
        nonlocal done
        done += 1
        loss = "diverged" if finished.final_loss is None else f"{finished.final_loss:.4f}"
        minutes = (time.perf_counter() - start) / 60
        left = ablations.missing()
        print(f"{finished.trial}: {loss} ({minutes:.0f} min, {left} runs to go)", flush=True)

    ablations.run(given.jobs, tell)
    print(f"{done} runs made; records in {given.out}")


if __name__ == "__main__":
    main()
