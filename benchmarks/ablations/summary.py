"""The figures of an ablation, from its runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ablations.variants import DEFAULT, QUESTIONS, Variant
from quotientopt.compare.protocol import Run, best_run


@dataclass(frozen=True)
class Row:
    """A variant at the learning rate that was best on seed 0.

    Attributes
    ----------
    label : str
    default : bool
    rate : float
    rates : list of float
        All that were tried.
    seeds, diverged : int
        Runs at `rate`, and how many of them diverged; the rest enter the means.
    loss, standard_error : float or None
        Final validation loss over seeds; the standard error needs two.
    difference, difference_error : float or None
        To the default's loss from the same weights and batches, seed by seed; None for the
        default itself.
    milliseconds : float or None
        Mean time of an optimizer step, of runs side by side; None for patched variants.
    """

    label: str
    default: bool
    rate: float
    rates: list[float]
    seeds: int
    diverged: int
    loss: float | None
    standard_error: float | None
    difference: float | None
    difference_error: float | None
    milliseconds: float | None


def summarise(question: str, runs: Sequence[Run]) -> list[Row]:
    """One row for every variant that has been run on seed 0, in the question's order."""
    variants = QUESTIONS[question].variants.items()
    rows = (_row(label, variant, list(runs)) for label, variant in variants)
    return [row for row in rows if row is not None]


def _row(label: str, variant: Variant, runs: list[Run]) -> Row | None:
    best = best_run(runs, variant.name)
    if best is None:
        return None
    losses, own = _losses(runs, best), _at(runs, best)
    baseline = best_run(runs, DEFAULT.name)
    differences: list[float] = []
    if variant != DEFAULT and baseline is not None:
        others = _losses(runs, baseline)
        differences = [loss - others[seed] for seed, loss in losses.items() if seed in others]
    times = [run.timing.optimizer.mean for run in own if run.final_loss is not None]
    return Row(
        label=label,
        default=variant == DEFAULT,
        rate=best.trial.rate,
        rates=sorted({run.trial.rate for run in runs if run.trial.optimizer == variant.name}),
        seeds=len(own),
        diverged=len(own) - len(losses),
        loss=_mean(list(losses.values())),
        standard_error=_standard_error(list(losses.values())),
        difference=_mean(differences),
        difference_error=_standard_error(differences),
        milliseconds=None if variant.is_patched or not times else 1e3 * statistics.fmean(times),
    )


def _at(runs: Sequence[Run], best: Run) -> list[Run]:
    """Runs of one variant at one learning rate."""
    key = (best.trial.optimizer, best.trial.rate)
    return [run for run in runs if (run.trial.optimizer, run.trial.rate) == key]


def _losses(runs: Sequence[Run], best: Run) -> dict[int, float]:
    """Final losses by seed; diverged runs are left out."""
    return {r.trial.seed: r.final_loss for r in _at(runs, best) if r.final_loss is not None}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
