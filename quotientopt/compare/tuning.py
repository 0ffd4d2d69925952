"""Learning rates: grids from the command line, and a search that extends until it has a valley."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from quotientopt.compare.optimizers import Entry, Settings
from quotientopt.compare.protocol import Run, Trial, UsageError, best_run

FACTOR = 2.0
EXTENSIONS = 4

Plan = Generator[list[Trial], list[Run], None]


@dataclass(frozen=True)
class Optimum:
    """Best learning rate of a search, and whether both its neighbours were tried and are worse."""

    rate: float
    loss: float
    interior: bool


def is_interior(rate: float, rates: Sequence[float]) -> bool:
    """Whether `rates` holds smaller and larger values than `rate`."""
    return min(rates) < rate < max(rates)


def search_rates(
    rates: Sequence[float], *, extend: bool
) -> Generator[list[float], list[float], Optimum]:
    """Search for the best learning rate.

    A generator: it yields learning rates to try, is sent their losses, and returns the optimum.

    Parameters
    ----------
    rates : sequence of float
        Tried first.
    extend : bool
        Whether to go on by factors of 2 on the side where the optimum lies on the edge, at most
        four times, until it is interior.
    """
    losses: dict[float, float] = {}
    pending = sorted(set(rates))
    extensions = EXTENSIONS if extend else 0
    while True:
        losses.update(zip(pending, (yield pending), strict=True))
        best = min(sorted(losses), key=losses.__getitem__)
        interior = is_interior(best, list(losses))
        if interior or extensions == 0:
            return Optimum(best, losses[best], interior)
        extensions -= 1
        pending = [best / FACTOR if best == min(losses) else best * FACTOR]


def plan(
    entry: Entry, model: str, rates: Sequence[float] | None, seeds: int, finished: list[Run]
) -> Plan:
    """Tune an optimizer on seed 0, then run its best setting on the other seeds.

    A generator: it yields trials and is sent their runs.

    Parameters
    ----------
    entry : Entry
    model : str
    rates : sequence of float, optional
        An explicit grid. Default: a search around the optimizer's usual rate for `model`; for
        further settings, from the best rate found so far upwards; then the entry's weight decays
        at the best of all, and, if one of them is better, the rates around it, the other settings
        with it, and the rates around the best of those.
    seeds : int
    finished : list of Run
        All runs so far, kept up to date by the caller.
    """
    centre = entry.centres[model]
    start: Sequence[float] = rates or (centre / FACTOR, centre, centre * FACTOR)
    optimum, best_settings = Optimum(centre, math.inf, False), entry.settings_grid[0]
    for settings in entry.settings_grid:
        found = yield from _search(entry.name, settings, start, extend=rates is None)
        if found.loss < optimum.loss:
            optimum, best_settings = found, settings
        start = rates or (optimum.rate, optimum.rate * FACTOR)
    if rates is None and entry.decays and math.isfinite(optimum.loss):
        yield from _search_decays(entry, best_settings, optimum)
    best = best_run(finished, entry.name)
    # A new best setting takes the seeds of the one before.
    own = (run.trial.seed for run in finished if run.trial.optimizer == entry.name)
    seeds = max(seeds, 1 + max(own, default=0))
    if best is not None and math.isfinite(best.score) and seeds > 1:
        trial = best.trial
        yield [Trial(entry.name, trial.rate, trial.settings, seed) for seed in range(1, seeds)]


def _search_decays(entry: Entry, settings: Settings, optimum: Optimum) -> Plan:
    """Other weight decays at the optimum; at one that is better, rates and settings once more."""
    choices = [dict(settings) | {"weight_decay": decay} for decay in entry.decays]
    runs = yield [Trial(entry.name, optimum.rate, choice) for choice in choices]
    best = min(runs, key=lambda run: run.score)
    if best.score < optimum.loss:
        around = (optimum.rate / FACTOR, optimum.rate, optimum.rate * FACTOR)
        found = yield from _search(entry.name, best.trial.settings, around, extend=True)
        decay = {"weight_decay": best.trial.settings["weight_decay"]}
        others = [dict(own) | decay for own in entry.settings_grid if own != settings]
        if others:
            runs = yield [Trial(entry.name, found.rate, own) for own in others]
            best = min(runs, key=lambda run: run.score)
            if best.score < found.loss:
                around = (found.rate / FACTOR, found.rate, found.rate * FACTOR)
                yield from _search(entry.name, best.trial.settings, around, extend=True)


def _search(
    name: str, settings: Settings, rates: Sequence[float], *, extend: bool
) -> Generator[list[Trial], list[Run], Optimum]:
    search = search_rates(rates, extend=extend)
    pending = next(search)
    while True:
        runs = yield [Trial(name, rate, dict(settings)) for rate in pending]
        try:
            pending = search.send([run.score for run in runs])
        except StopIteration as stop:
            return stop.value


def parse_grid(text: str, optimizers: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Learning rates per optimizer; those that are absent search by themselves.

    Parameters
    ----------
    text : str
        ``"auto"``, ``"1e-3,2e-3"`` for all, or ``"adamw=1e-3:2e-3,soap=4e-3"`` for some.
    optimizers : sequence of str

    Raises
    ------
    UsageError
        If `text` has another form, or a rate is not a positive number.
    """
    if text == "auto":
        return {}
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return dict.fromkeys(optimizers, _rates(parts, text))
    grid: dict[str, tuple[float, ...]] = {}
    for part in parts:
        name, equals, values = part.partition("=")
        if not equals or name not in optimizers or name in grid:
            raise UsageError(
                f"bad --lr-grid {text!r}: {part!r} is not OPTIMIZER=RATE:RATE:... "
                f"for one of {', '.join(optimizers)}, each at most once"
            )
        grid[name] = _rates(values.split(":"), text)
    return grid


def _rates(values: Sequence[str], text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted({float(value) for value in values}))
    except ValueError as error:
        raise UsageError(f"bad --lr-grid {text!r}: {error}") from error
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(f"bad --lr-grid {text!r}: learning rates must be positive numbers")
    return rates
