"""Learning rates of `lora.py`: which are tried, and the figures made of their runs.

In reading order: `plan`, the search; `Figures`, an optimizer at one rank; `ShorterBudget`, runs of
fewer steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from experiment import standard_error

from quotientopt.compare.protocol import Run, Trial, best_run
from quotientopt.compare.record import BASELINE, best_runs, crossing, mean_curve, optimizers_of
from quotientopt.compare.tuning import is_interior

TOLERANCE = 0.02
MOST_RATES = 9

Rates = Generator[float, float, dict[float, float]]
Plan = Generator[Trial, Run, None]


def next_rate(losses: dict[float, float], factor: float, cover: bool) -> float | None:
    """The learning rate to try next, or None if the search is over.

    Goes on at the side where the best rate lies on the edge until it is interior, then, to
    `cover` the good ones, at both sides until the loss is `TOLERANCE` above the best.
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if len(rates) >= MOST_RATES:
        return None
    if not is_interior(best, rates):
        return best * factor if best == rates[-1] else best / factor
    if cover and losses[rates[-1]] <= losses[best] + TOLERANCE:
        return rates[-1] * factor
    if cover and losses[rates[0]] <= losses[best] + TOLERANCE:
        return rates[0] / factor
    return None


def search(start: Sequence[float], factor: float, cover: bool) -> Rates:
    """Yield learning rates, be sent their losses, return all of them."""
    losses: dict[float, float] = {}
    for rate in start:
        losses[rate] = yield rate
    while True:
        rate = next_rate(losses, factor, cover)
        if rate is None:
            return losses
        losses[rate] = yield rate


def as_given(start: Sequence[float]) -> Rates:
    """The same for rates that are to be tried and no others."""
    losses: dict[float, float] = {}
    for rate in start:
        losses[rate] = yield rate
    return losses


def plan(
    name: str,
    start: Sequence[float],
    finished: Sequence[Run],
    *,
    settings: dict[str, float],
    factor: float,
    cover: bool,
    seeds: int,
    all_seeds: bool = False,
) -> Plan:
    """Tune on seed 0, then run the best rate on the other seeds; or tune on all seeds.

    A generator: it yields trials and is sent their runs.

    Parameters
    ----------
    name : str
        Of the contender.
    start : sequence of float
        Tried first.
    finished : sequence of Run
        All runs so far, kept up to date by the caller.
    settings : dict
        Of all trials.
    factor : float
        Between neighbouring rates of the search; 1: no search, `start` alone.
    cover : bool
        Whether to find both ends of the range of good rates.
    seeds : int
    all_seeds : bool
        Whether every rate is run on every seed; the search goes by the mean then.
    """
    tuning = range(seeds if all_seeds else 1)
    rates = search(start, factor, cover) if factor > 1 else as_given(start)
    rate = next(rates)
    while True:
        scores = []
        for seed in tuning:
            run = yield Trial(name, rate, dict(settings), seed)
            scores.append(run.score)
        try:
            rate = rates.send(statistics.fmean(scores))
        except StopIteration:
            break
    if all_seeds:
        return
    own = [run for run in finished if run.trial.settings == settings]
    best = best_run(own, name)
    if best is None or math.isinf(best.score):
        return
    for seed in range(1, seeds):
        yield Trial(name, best.trial.rate, dict(settings), seed)


# A diverged run counts as this much above the best where the ends of a range are interpolated.
DIVERGED = 1.0


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, its standard error (None for one seed), and how many there are."""

    value: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None of nothing."""
        if not values:
            return None
        return cls(statistics.fmean(values), standard_error(values), len(values))

    def text(self, form: str = ".3f") -> str:
        """``mean ± error``."""
        error = "" if self.error is None else f" ± {self.error:{form}}"
        return f"{self.value:{form}}{error}"


@dataclass(frozen=True)
class RateRange:
    """Learning rates within 0.02 of the best loss, the mean over the seeds of all rates.

    Attributes
    ----------
    low, high : float
        Interpolated in the logarithm of the rate.
    open_low, open_high : bool
        The range was not left at that end: it is wider than this.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def width(self) -> float:
        """Largest over smallest."""
        return self.high / self.low

    @property
    def open(self) -> bool:
        """Whether it is wider than what was measured."""
        return self.open_low or self.open_high


@dataclass(frozen=True)
class Figures:
    """An optimizer at one rank, at its best learning rate.

    Attributes
    ----------
    optimizer : str
    rate : float
    interior : bool
        Whether smaller and larger rates were tried.
    seeds, diverged : int
    final, best : Mean or None
        Validation loss after the last step, and the smallest of the run.
    accuracy : Mean or None
    steps_to_target : Mean or None
        Steps to AdamW's best loss from the same seed, of the seeds that reach it.
    reached : int
        How many do, of those that AdamW has as well.
    compared : int
    rates : RateRange or None
    losses : dict of float to float or None
        Final loss at every rate that was tried, the mean over those seeds on which all rates were
        (seed 0 at least); None where one diverged.
    tuning_seeds : int
        How many seeds these are.
    curve : list of [step, seconds, loss]
        Mean over seeds.
    optimizer_seconds, model_seconds : float
        Processor seconds of a step, median.
    state_bytes, parameters : int
    """

    optimizer: str
    rate: float
    interior: bool
    seeds: int
    diverged: int
    final: Mean | None
    best: Mean | None
    accuracy: Mean | None
    steps_to_target: Mean | None
    reached: int
    compared: int
    rates: RateRange | None
    losses: dict[float, float | None]
    tuning_seeds: int
    curve: list[list[float]]
    optimizer_seconds: float
    model_seconds: float
    state_bytes: int
    parameters: int


@dataclass(frozen=True)
class ShorterBudget:
    """An optimizer's runs of fewer steps, against AdamW's full ones.

    Attributes
    ----------
    optimizer : str
    rank : int
    rate : float
    steps : int
    share : float
        Of AdamW's steps.
    final : Mean
        Validation loss after the last step, of the seeds that AdamW has as well.
    excess : Mean
        The same less the smallest validation loss of AdamW's run from the same seed.
    """

    optimizer: str
    rank: int
    rate: float
    steps: int
    share: float
    final: Mean
    excess: Mean


def best_loss(run: Run) -> float:
    """Smallest validation loss of a run."""
    return min(point[2] for point in run.curve)


def rate_range(losses: dict[float, float | None]) -> RateRange | None:
    """The range of rates within `TOLERANCE` of the best loss; None if all diverged."""
    rates = sorted(losses)
    finite = [loss for loss in losses.values() if loss is not None]
    if not finite:
        return None
    lowest = min(finite)
    values = []
    for rate in rates:
        loss = losses[rate]
        values.append(lowest + DIVERGED if loss is None else loss)
    best = values.index(lowest)

    def end(direction: int) -> tuple[float, bool]:
        index = best
        while 0 <= index + direction < len(rates):
            here, there = values[index], values[index + direction]
            if there > lowest + TOLERANCE:
                part = (lowest + TOLERANCE - here) / (there - here)
                return rates[index] * (rates[index + direction] / rates[index]) ** part, False
            index += direction
        return rates[index], True

    (low, open_low), (high, open_high) = end(-1), end(1)
    return RateRange(low, high, open_low, open_high)


def tuning_losses(runs: Sequence[Run]) -> tuple[dict[float, float | None], int]:
    """Mean final loss by learning rate, over the seeds that every rate was run on."""
    by_rate: dict[float, dict[int, float | None]] = {}
    for run in runs:
        by_rate.setdefault(run.trial.rate, {})[run.trial.seed] = run.final_loss
    common = set.intersection(*(set(losses) for losses in by_rate.values()))
    means: dict[float, float | None] = {}
    for rate, losses in by_rate.items():
        own = [losses[seed] for seed in common]
        finite = [loss for loss in own if loss is not None]
        means[rate] = statistics.fmean(finite) if len(finite) == len(own) else None
    return means, len(common)


def seeds_of(rows: Sequence[Figures]) -> str:
    """On which seeds learning rates were compared."""
    counts = sorted({row.tuning_seeds for row in rows})
    return "seed 0" if counts == [1] else f"mean over {' or '.join(map(str, counts))} seeds"


def tuned(runs: list[Run], name: str) -> tuple[dict[float, float | None], int, list[Run]]:
    """Losses of :func:`tuning_losses`, their number of seeds, and all runs at the best rate."""
    settings = best_runs(runs, name)[0].trial.settings
    own = [r for r in runs if (r.trial.optimizer, r.trial.settings) == (name, settings)]
    tuning, seeds = tuning_losses(own)
    rate = min(tuning, key=lambda rate: math.inf if tuning[rate] is None else tuning[rate])
    return tuning, seeds, [run for run in own if run.trial.rate == rate]


def figures(runs: list[Run]) -> list[Figures]:
    """One per optimizer, in order of appearance."""
    targets = _targets(runs)
    return [_figures(runs, name, targets) for name in optimizers_of(runs)]


def _targets(runs: list[Run]) -> dict[int, float]:
    """AdamW's smallest validation loss by seed."""
    chosen = best_runs(runs, BASELINE)
    return {run.trial.seed: best_loss(run) for run in chosen if run.status == "finished"}


def shorter_budgets(
    runs: list[Run], full: list[Run], rank: int, steps: int, full_steps: int
) -> list[ShorterBudget]:
    """Runs of `steps` steps against AdamW's of `full_steps`, where all its seeds were run."""
    targets = _targets(full)
    found = []
    for name in optimizers_of(runs):
        _, _, chosen = tuned(runs, name)
        own = {
            run.trial.seed: run.final_loss
            for run in chosen
            if run.final_loss is not None and run.trial.seed in targets
        }
        final = Mean.of(list(own.values()))
        excess = Mean.of([loss - targets[seed] for seed, loss in own.items()])
        if final is None or excess is None or len(own) < len(targets):
            continue
        rate = chosen[0].trial.rate
        share = steps / full_steps
        found.append(ShorterBudget(name, rank, rate, steps, share, final, excess))
    return found


def _figures(runs: list[Run], name: str, targets: dict[int, float]) -> Figures:
    tuning, tuning_seeds, chosen = tuned(runs, name)
    rate = chosen[0].trial.rate
    finished = [run for run in chosen if run.status == "finished"]
    compared = [run for run in chosen if run.trial.seed in targets]
    crossings = [
        found[0]
        for run in compared
        if (found := crossing(run.curve, targets[run.trial.seed])) is not None
    ]
    accuracies = [run.final_accuracy for run in finished if run.final_accuracy is not None]
    return Figures(
        optimizer=name,
        rate=rate,
        interior=is_interior(rate, list(tuning)),
        seeds=len(chosen),
        diverged=len(chosen) - len(finished),
        final=Mean.of([run.final_loss for run in finished if run.final_loss is not None]),
        best=Mean.of([best_loss(run) for run in finished]),
        accuracy=Mean.of(accuracies),
        steps_to_target=Mean.of(crossings),
        reached=len(crossings),
        compared=len(compared),
        rates=rate_range(tuning),
        losses=dict(sorted(tuning.items())),
        tuning_seeds=tuning_seeds,
        curve=mean_curve([run.curve for run in finished]),
        optimizer_seconds=statistics.median(run.timing.optimizer.median for run in chosen),
        model_seconds=statistics.median(run.timing.model.median for run in chosen),
        state_bytes=chosen[0].state_bytes,
        parameters=chosen[0].parameters,
    )
