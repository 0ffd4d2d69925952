"""Which runs are missing, and making them."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ablations.record import Conditions, Record, load, load_all
from ablations.variants import QUESTIONS, VARIANTS, Variant
from quotientopt import QuotientAdam
from quotientopt.compare.data import Task, load_task
from quotientopt.compare.optimizers import BETAS, FIRST_EDITION, OPTIMIZERS, Entry
from quotientopt.compare.protocol import Protocol, Run, Trial, UsageError, best_run
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
        For variants that have no rates of their own.
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
        rates = variant.rates or self.rates
        screened = self._made(Trial(variant.name, rate) for rate in rates)
        if len(screened) < len(rates):
            return len(rates) - len(screened) + self.seeds - 1
        repetitions = self._repetitions(variant)
        return len(repetitions) - len(self._made(repetitions))

    def _made(self, trials: Iterable[Trial]) -> list[Trial]:
        return [trial for trial in trials if self.find(trial) is not None]

    def find(self, trial: Trial) -> Run | None:
        """The run of `trial`, if it was made."""
        found = (record.find(trial) for record in self.records)
        return next((run for run in found if run is not None), None)

    def _repetitions(self, variant: Variant) -> list[Trial]:
        """The other seeds at the best rate on seed 0; none if that diverged or is not known yet."""
        rates = variant.rates or self.rates
        screened = self._made(Trial(variant.name, rate) for rate in rates)
        best = best_run([run for record in self.records for run in record.runs], variant.name)
        if best is None or best.final_loss is None or len(screened) < len(rates):
            return []
        return [Trial(variant.name, best.trial.rate, {}, seed) for seed in range(1, self.seeds)]

    def wanted(self) -> list[Trial]:
        """Trials that can be made now, those on seed 0 first."""
        trials = [
            Trial(variant.name, rate)
            for variant in self.variants
            for rate in variant.rates or self.rates
        ]
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
    # The record is of version 0.1.0, whose polar step the patches alter.
    options = {"betas": BETAS, "weight_decay": protocol.weight_decay, **FIRST_EDITION}
    options |= dict(variant.options)

    def build(model: nn.Module, rate: float, *_: Any) -> list[torch.optim.Optimizer]:
        symmetries = variant.symmetries and variant.symmetries(model)
        return [QuotientAdam(model, lr=rate, symmetries=symmetries, **options)]

    torch.set_num_threads(protocol.threads)
    task = _task(protocol.data, protocol.model, protocol.batch, protocol.context)
    OPTIMIZERS[variant.name] = Entry(variant.name, build, {})
    try:
        with variant.patch() if variant.patch else nullcontext():
            return train(trial, protocol, task)
    finally:
        del OPTIMIZERS[variant.name]
