"""The questions, the variants of QuotientAdam that answer them, and the figures of their runs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ablation_patches import (
    constant_size,
    covariances,
    decomposed_residual_frames,
    fixed_update_size,
    horizontal_updates,
    intervals,
    layer_and_direction,
    momentum_covariances,
    narrow_frames,
    polar_composition,
    pooled_residual_frames,
    reused_polar_factors,
    spectral_size,
    together,
    unrotated_second_moment,
)
from experiment import standard_error

from quotientopt.compare.protocol import Run, best_run


@dataclass(frozen=True)
class Variant:
    """QuotientAdam with something changed.

    Attributes
    ----------
    name : str
        Unique; what its runs are filed under.
    options : mapping
        Options of QuotientAdam that differ from the default.
    patch : callable, optional
        Makes the context in which to train, where no option does it.
    rates : tuple of float, optional
        Its own learning rates, where the default's best is not expected to suit.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: Callable[[], AbstractContextManager[None]] | None = None
    rates: tuple[float, ...] | None = None

    @property
    def is_patched(self) -> bool:
        """Whether it is no setting of QuotientAdam, so that its time is not a proper one."""
        return self.patch is not None

    def describe(self) -> dict[str, Any]:
        """What defines it, for the record."""
        return {"options": dict(self.options), "patch": _spell(self.patch)}


@dataclass(frozen=True)
class Question:
    """Variants to compare; one of them is the default.

    Attributes
    ----------
    title : str
    variants : mapping of str to Variant
        By their labels in table and plot.
    """

    title: str
    variants: Mapping[str, Variant]


def _spell(call: Any) -> str | None:
    """A partial function as one would write it."""
    if not isinstance(call, functools.partial):
        return None if call is None else call.__name__
    parts = [_spell(value) if callable(value) else repr(value) for value in call.args]
    parts += [
        f"{name}={_spell(value) if callable(value) else repr(value)}"
        for name, value in call.keywords.items()
    ]
    return f"{call.func.__name__}({', '.join(map(str, parts))})"


def _covariances(every: int, beta: float, refresh_every: int | None = None) -> Variant:
    call = functools.partial(covariances, every, beta)
    name = f"covariances every {every}, decay {beta}"
    if refresh_every is None:
        return Variant(name, patch=call)
    return Variant(f"{name}, refresh every {refresh_every}", {"refresh_every": refresh_every}, call)


def _sized(name: str, size_of: Callable[..., float]) -> Variant:
    call = functools.partial(fixed_update_size, functools.partial(size_of, size=ADAMW_SIZE))
    return Variant(name, patch=call, rates=(2e-3, 4e-3, 8e-3))


# Nearest to one, composed, on [0.0288, 1], to within 0.0744: a product of the Gram less than
# `quotientopt.optim.polar.COMPOSITION`, which begins at 0.02 (benchmarks/polar_composition.py).
TWICE_DEGREE_9 = (
    (11.9697264, -107.4628887, 348.2592822, -441.9173859, 190.8090980),
    (3.3485486, -6.1313398, 5.6886510, -2.3067938, 0.3342355),
)

# Root mean square of AdamW's updates over its learning rate, as Liu et al. (arXiv 2502.16982) take
# it to carry its learning rate over to Muon.
ADAMW_SIZE = 0.2

DEFAULT = Variant("default")
QUESTIONS: dict[str, Question] = {
    "residual-frame": Question(
        "Residual frames",
        {
            "one per matrix": DEFAULT,
            "two per layer (reading, writing)": Variant(
                "residual frames per layer",
                patch=functools.partial(pooled_residual_frames, layer_and_direction),
            ),
            "one for the model": Variant(
                "shared residual frame", {"residual_frame": "shared"}, rates=(2e-3, 4e-3, 8e-3)
            ),
            "none": Variant(
                "no residual frames", {"residual_frame": None}, rates=(2e-3, 4e-3, 8e-3)
            ),
        },
    ),
    "head-frame": Question(
        "Sections that head frames start from",
        {
            "balanced": DEFAULT,
            "orthonormal": Variant("orthonormal head frames", {"head_frame": "orthonormal"}),
            "svd": Variant("svd head frames", {"head_frame": "svd"}),
            "no head frames": Variant("no head frames", {"head_frame": None}),
        },
    ),
    "row-frame": Question(
        "Frames of the rows of heads",
        {
            "over all heads of a matrix": DEFAULT,
            "head by head": Variant("frames head by head", {"row_frame": "per_head"}),
        },
    ),
    "hidden-frame": Question(
        "Frames of the hidden units of MLPs",
        {
            "none": DEFAULT,
            "of the leading directions": Variant("leading frames", {"hidden_frame": "leading"}),
            "one per matrix": Variant("hidden frames", {"hidden_frame": "per_matrix"}),
            "one per matrix, the head's follow, fresh every 5 steps": Variant(
                "all that lowers the loss",
                {
                    "hidden_frame": "per_matrix",
                    "embedding_frame": "fixed_but_head",
                    "refresh_every": 5,
                },
            ),
        },
    ),
    "embedding": Question(
        "Embeddings, positions and head",
        {
            "fixed frames, twice the size": DEFAULT,
            "fixed frames, the same size": Variant("embeddings once", {"embedding_scale": 1.0}),
            "fixed frames, half the size": Variant("embeddings half", {"embedding_scale": 0.5}),
            "fixed frames, but the head's follows": Variant(
                "head follows", {"embedding_frame": "fixed_but_head"}
            ),
            "as all other matrices": Variant(
                "embeddings as all others", {"embedding_frame": "per_matrix"}
            ),
        },
    ),
    "young": Question(
        "While training is young",
        {
            "the default": DEFAULT,
            "frames every ten steps from the first on": Variant(
                "frames as later", patch=functools.partial(intervals, None)
            ),
            "covariances of twenty steps from the first on": Variant(
                "covariances as later", patch=functools.partial(covariances, 2, 0.9)
            ),
            "both as later": Variant(
                "frames and covariances as later",
                patch=functools.partial(
                    together,
                    functools.partial(intervals, None),
                    functools.partial(covariances, 2, 0.9),
                ),
            ),
            "frames of a quarter of the steps so far": Variant(
                "frames of a quarter", patch=functools.partial(intervals, 4)
            ),
            "frames of a twentieth of the steps so far": Variant(
                "frames of a twentieth", patch=functools.partial(intervals, 20)
            ),
        },
    ),
    "refresh": Question(
        "Fresh frames",
        {
            "every 2 steps, covariances of every gradient, 0.8": _covariances(1, 0.8, 2),
            "every 5 steps, covariances of every gradient, 0.9": _covariances(1, 0.9, 5),
            "every 5 steps": Variant("refresh every 5", {"refresh_every": 5}),
            "the default": DEFAULT,
            "every 20 steps": Variant("refresh every 20", {"refresh_every": 20}),
            "every 50 steps": Variant("refresh every 50", {"refresh_every": 50}),
            "every 10 steps, eigen-decomposed": Variant(
                "residual frames by eigen-decomposition", patch=decomposed_residual_frames
            ),
        },
    ),
    "second-moment": Question(
        "Second moment",
        {
            "whole, rotated when frames change": DEFAULT,
            "kept as it is when frames change": Variant(
                "second moment kept", patch=unrotated_second_moment
            ),
            "factored": Variant("factored second moment", {"second_moment": "factored"}),
            "factored, head frames of singular vectors": Variant(
                "little state", {"second_moment": "factored", "head_frame": "svd"}
            ),
        },
    ),
    "parts": Question(
        "Nesterov momentum and polar factor",
        {
            "both": DEFAULT,
            "without Nesterov": Variant("without Nesterov", {"nesterov": False}),
            "without polar factor": Variant(
                "without polar", {"polar": False}, rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
            ),
            "without both": Variant(
                "without Nesterov and polar",
                {"nesterov": False, "polar": False},
                rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
            ),
        },
    ),
    "polar": Question(
        "Polar factor",
        {
            "of whole matrices, at every step": DEFAULT,
            "one polynomial step, head by head": Variant("polar step", {"polar": "step"}),
            "factors of every second step, reused": Variant(
                "polar factors every 2", patch=functools.partial(reused_polar_factors, 2)
            ),
            "by two polynomials of degree 9": Variant(
                "polar of degrees 9, 9",
                patch=functools.partial(polar_composition, *TWICE_DEGREE_9),
            ),
            "products of factors rounded to bfloat16": Variant(
                "products in bfloat16", {"precision": "fast"}
            ),
        },
    ),
    "covariance": Question(
        "Covariances: what they take, and their decay each time",
        {
            "every gradient, 0.95": _covariances(1, 0.95),
            "every gradient, 0.9": _covariances(1, 0.9),
            "every gradient, 0.8": _covariances(1, 0.8),
            "every second gradient, 0.6": _covariances(2, 0.6),
            "the default": DEFAULT,
            "every fifth gradient, 0.8": _covariances(5, 0.8),
            "every second momentum, 0.9": Variant(
                "covariances of momentum", patch=momentum_covariances
            ),
            "covariances and frames kept in bfloat16": Variant(
                "frames in bfloat16", patch=narrow_frames
            ),
        },
    ),
    "horizontal": Question(
        "Updates of head pairs",
        {
            "as they are": DEFAULT,
            "horizontal component": Variant("horizontal updates", patch=horizontal_updates),
        },
    ),
    "update-size": Question(
        "Size of updates over the rate (root mean square)",
        {
            "as it comes": DEFAULT,
            f"{ADAMW_SIZE} for every matrix": _sized("constant size", constant_size),
            f"{ADAMW_SIZE} · √max(1, out/in)": _sized("spectral size", spectral_size),
        },
    ),
    "betas": Question(
        "Decay of the moments",
        {
            "0.9, 0.95": DEFAULT,
            "0.85, 0.95": Variant("betas 0.85, 0.95", {"betas": (0.85, 0.95)}),
            "0.9, 0.98": Variant("betas 0.9, 0.98", {"betas": (0.9, 0.98)}),
            "0.95, 0.95": Variant("betas 0.95, 0.95", {"betas": (0.95, 0.95)}),
        },
    ),
}
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for question in QUESTIONS.values()
    for variant in question.variants.values()
}


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
        standard_error=standard_error(list(losses.values())),
        difference=_mean(differences),
        difference_error=standard_error(differences),
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
