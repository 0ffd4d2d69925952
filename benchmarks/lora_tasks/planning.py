"""Which learning rates are tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence

from quotientopt.compare.protocol import Run, Trial, best_run
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
