"""When the Riemannian gradient beats the Euclidean one: badly scaled factors.

Two experiments, each from equivalent starting points that differ by a group element alone.

1. Least squares ``½ ‖Aᵀ B − G‖²`` of rank 4 from (s A, B/s) and from (g⁻ᵀ A, g B) with g of growing
   condition number: steps of gradient descent until the loss is 1e-6 of what it was.
2. A small GPT whose query, key, value and output weights a group element acted on: training loss
   after 150 steps with momentum 0.9.

SGD is tuned for every starting point, QuotientSGD once, at the first one. Writes everything
measured as JSON, a table and a plot.

    python benchmarks/badly_scaled.py
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import QUOTIENT_SGD, SGD, note, png, run_experiment
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import quotientopt as qo
from quotientopt.compare.data import load_corpus
from quotientopt.models import reference_model
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD

RESULTS = Path(__file__).parent / "results" / "badly-scaled"
SEEDS = (0, 1, 2)
SCALES = (1, 2, 3, 10, 100, 1000)
CONDITIONS = (1, 10, 100, 1000)

RANK, ROWS, COLUMNS, SPREAD = 4, 24, 20, 10.0
RATES = [10 ** (exponent / 3) for exponent in range(-9, 4)]
TARGET, MOST_STEPS = 1e-6, 2000

STEPS, BATCH, CONTEXT, MOMENTUM = 150, 16, 32, 0.9
MODEL_RATES = [10 ** (exponent / 2) for exponent in range(-10, 2)]
LAST = 10


class Factorization(nn.Module):
    """K copies of each seed's problem, every copy with a learning rate of its own.

    The loss is ``Σ_k rate_k f_k``, so that one step of any first-order method with learning rate
    one is a step of rate_k on copy k. Diverged copies drop out.
    """

    def __init__(self, rates: Sequence[float], act: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        factors, targets = zip(*(problem(seed) for seed in SEEDS), strict=True)
        A, B = (torch.stack(side).repeat(len(rates), 1, 1) for side in zip(*factors, strict=True))
        A, B = act(A, B)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.target = torch.stack(targets).repeat(len(rates), 1, 1)
        self.rates = torch.tensor(rates, dtype=torch.float64).repeat_interleave(len(SEEDS))
        self.alive = torch.ones(len(self.rates), dtype=torch.bool)
        self.initial = self.losses().detach()

    def losses(self) -> Tensor:
        """½ ‖Aᵀ B − G‖² of every copy."""
        return (self.A.mT @ self.B - self.target).square().sum((-2, -1)) / 2

    def forward(self) -> tuple[Tensor, Tensor]:
        """The weighted loss, and the losses relative to the first ones."""
        losses = self.losses()
        relative = (losses / self.initial).detach()
        self.alive &= relative < 1e3
        return (losses * self.rates)[self.alive].sum(), relative

    def symmetry(self) -> qo.HeadSymmetry:
        """GL(r), one element for each copy."""
        return qo.HeadSymmetry([self.A], [self.B], qo.groups.GL(RANK), name="factors")


def problem(seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A rank-4 matrix with singular values from 1 to 1/10, and a balanced pair half as far away."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(columns: int) -> Tensor:
        normal = torch.randn(columns, RANK, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q.mT

    root = torch.logspace(0, -math.log10(SPREAD), RANK, dtype=torch.float64).sqrt()[:, None]
    A, B = root * orthonormal(ROWS), root * orthonormal(COLUMNS)
    target = A.mT @ B
    noise = [torch.randn(X.shape, generator=generator, dtype=torch.float64) for X in (A, B)]
    A, B = (X + 0.5 * X.norm() / e.norm() * e for X, e in zip((A, B), noise, strict=True))
    return (A, B), target


def descend(
    make: Callable[[Factorization], Optimizer],
    rates: Sequence[float],
    act: Callable[[Tensor, Tensor], Any],
) -> dict[str, Any]:
    """Steps to the target at the best rate, for every seed, and the relative loss in the end.

    The best rate is the first with which all seeds reach the target; if there is none (``steps``
    is None), the one with the smallest loss after the last step, the worst seed counting.
    """
    model = Factorization(rates, act)
    optimizer = make(model)
    reached = torch.full((len(model.rates),), -1)
    for step in range(MOST_STEPS + 1):
        optimizer.zero_grad()
        loss, relative = model()
        reached[(reached < 0) & (relative <= TARGET)] = step
        done = (reached.view(-1, len(SEEDS)) >= 0).all(1)
        if bool(done.any()) or not bool(model.alive.any()):
            break
        loss.backward()
        optimizer.step()
    relative = relative.view(-1, len(SEEDS)).nan_to_num(math.inf, math.inf)
    found = bool(done.any())
    best = int(done.nonzero()[0]) if found else int(relative.amax(1).argmin())
    return {
        "rate": rates[best],
        "steps": reached.view(-1, len(SEEDS))[best].tolist() if found else None,
        "relative_loss": relative[best].tolist(),
    }


def sgd(model: nn.Module) -> Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


def quotient_sgd(model: Factorization) -> Optimizer:
    """Riemannian gradient descent."""
    return QuotientSGD(model.parameters(), lr=1.0, symmetries=[model.symmetry()])


def scaling(scale: float) -> Callable[[Tensor, Tensor], Any]:
    """(A, B) ↦ (s A, B/s)."""
    return lambda A, B: (scale * A, B / scale)


def moved(cond: float) -> Callable[[Tensor, Tensor], Any]:
    """(A, B) ↦ (g⁻ᵀ A, g B) with cond(g) given, another g for each seed."""
    group = qo.groups.GL(RANK)
    g = torch.stack(
        [
            group.random(
                (),
                cond=cond,
                generator=torch.Generator().manual_seed(100 + seed),
                dtype=torch.float64,
            )
            for seed in SEEDS
        ]
    )
    return lambda A, B: group.act(g.repeat(len(A) // len(SEEDS), 1, 1), (A, B))


def least_squares() -> list[dict[str, Any]]:
    """Both sweeps of the first experiment, a row per starting point and optimizer."""
    # What acts has largest singular value s or √cond; SGD's largest stable rate falls with its
    # square, and so does the grid.
    starts = [("scale", s, float(s), scaling(s)) for s in SCALES]
    starts += [("condition", c, math.sqrt(c), moved(c)) for c in CONDITIONS]
    tuned = descend(quotient_sgd, RATES, scaling(1))["rate"]
    rows = []
    for kind, value, largest, act in starts:
        grid = [rate / largest**2 for rate in RATES]
        for name, make, rates in (("SGD", sgd, grid), ("QuotientSGD", quotient_sgd, [tuned])):
            start = {"start": kind, "value": value, "optimizer": name, "rates": rates}
            rows.append(start | descend(make, rates, act))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def batches(seed: int, data: Tensor) -> Iterator[Tensor]:
    """Random sequences of bytes."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        yield data[starts + torch.arange(CONTEXT + 1)].long()


def final_loss(
    make: Callable[[nn.Module, float], Optimizer],
    rate: float,
    *,
    cond: float,
    seed: int,
    data: Tensor,
) -> float | None:
    """Mean training loss of the last steps; None if training diverged."""
    model = reference_model("gpt", seed, layers=2, width=64, heads=4, context=CONTEXT)
    symmetries = qo.find_symmetries(model)
    element = symmetries.random_element(cond, generator=torch.Generator().manual_seed(seed))
    symmetries.act_({name: g for name, g in element.items() if name != "residual"})
    optimizer = make(model, rate)
    losses: list[float] = []
    for _, tokens in zip(range(STEPS), batches(seed, data), strict=False):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 20:
            return None
        loss.backward()
        try:
            optimizer.step()
        except ValueError:  # the gradient or a factor is no longer finite
            return None
    return statistics.fmean(losses[-LAST:])


MODEL_OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "SGD": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM),
    "QuotientSGD": lambda model, rate: QuotientSGD(model, lr=rate, momentum=MOMENTUM),
}


def tune(run: Callable[[float], float | None]) -> tuple[float, dict[float, float | None]]:
    """Walk over the grid from its middle until the best rate has a worse one on either side."""
    losses: dict[float, float | None] = {}

    def loss(index: int) -> float:
        rate = MODEL_RATES[index]
        if rate not in losses:
            losses[rate] = run(rate)
        value = losses[rate]
        return math.inf if value is None else value

    best = len(MODEL_RATES) // 2
    # Where all is lost, go down.
    while best > 0 and loss(best) == math.inf:
        best -= 1
    while True:
        around = [i for i in (best - 1, best, best + 1) if 0 <= i < len(MODEL_RATES)]
        nearest = min(around, key=loss)
        if nearest == best:
            return MODEL_RATES[best], losses
        best = nearest


def language_model() -> list[dict[str, Any]]:
    """The second experiment, a row per condition number and optimizer."""
    data = torch.frombuffer(bytearray(load_corpus("stdlib", CONTEXT).training), dtype=torch.uint8)
    rows = []
    once: tuple[float, dict[float, float | None]] | None = None
    for cond, (name, make) in itertools.product(CONDITIONS, MODEL_OPTIMIZERS.items()):
        run = functools.partial(final_loss, make, data=data)
        if name == "QuotientSGD" and once is not None:
            rate, tried = once[0], dict[float, float | None]()
        else:
            rate, tried = tune(functools.partial(run, cond=cond, seed=SEEDS[0]))
            once = (rate, tried) if name == "QuotientSGD" else once
        losses = [tried.get(rate) or run(rate, cond=cond, seed=SEEDS[0])]
        losses += [run(rate, cond=cond, seed=seed) for seed in SEEDS[1:]]
        rows.append(
            {
                "condition": cond,
                "optimizer": name,
                "rate": rate,
                "losses": losses,
                "tried": [[r, tried[r]] for r in sorted(tried)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    finished = [value for value in values if value is not None]
    if len(finished) < len(values):
        return f"diverged ({len(values) - len(finished)} of {len(values)})"
    return f"{statistics.fmean(finished):.{digits}f} ± {statistics.stdev(finished):.{digits}f}"


def needed(row: dict[str, Any]) -> str:
    """Steps to the target, or where the loss is after all of them."""
    if row["steps"] is not None:
        return spread(row["steps"], 0)
    return f"> {MOST_STEPS} (loss then {max(row['relative_loss']):.1e})"


def table(record: dict[str, Any]) -> str:
    """Both experiments as Markdown."""
    lines = [
        "# Badly scaled factors",
        "",
        f"`{record['command']}`, {record['environment']['processor']}, "
        f"torch {record['environment']['torch']}, one thread; seeds {', '.join(map(str, SEEDS))}, "
        "mean ± standard deviation. SGD has its best learning rate of a grid at every starting "
        "point, QuotientSGD the one that is best at the first; for gpt tuned on the first seed.",
        "",
        f"Least squares of rank {RANK}, steps until the loss is {TARGET:g} of the first one:",
        "",
        "| start | SGD | its lr | QuotientSGD | its lr |",
        "|---|---|---|---|---|",
    ]
    rows = record["least_squares"]
    for plain, quotient in zip(rows[::2], rows[1::2], strict=True):
        start = {"scale": "(s A, B/s), s = ", "condition": "cond(g) = "}[plain["start"]]
        lines.append(
            f"| {start}{plain['value']} | {needed(plain)} | {plain['rate']:.1e} "
            f"| {needed(quotient)} | {quotient['rate']:.1e} |"
        )
    lines += [
        "",
        f"`gpt` (2 layers, width 64), momentum {MOMENTUM}, training loss (nats per byte) over the "
        f"last {LAST} of {STEPS} steps:",
        "",
        "| cond(g) on Q, K, V, O | SGD | its lr | QuotientSGD | its lr |",
        "|---|---|---|---|---|",
    ]
    rows = record["language_model"]
    for plain, quotient in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {plain['condition']} | {spread(plain['losses'], 3)} | {plain['rate']:.1e} "
            f"| {spread(quotient['losses'], 3)} | {quotient['rate']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Steps against scale and condition, and the GPT's loss against condition, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    styles = {"SGD": (SGD, "o-"), "QuotientSGD": (QUOTIENT_SGD, "s-")}
    rows = record["least_squares"]
    for axes, kind in zip(panels[:2], ("scale", "condition"), strict=True):
        for name, (color, style) in styles.items():
            own = [row for row in rows if row["start"] == kind and row["optimizer"] == name]
            done = [row for row in own if row["steps"] is not None]
            x = [row["value"] for row in done]
            means = [statistics.fmean(row["steps"]) for row in done]
            low = [m - min(row["steps"]) for m, row in zip(means, done, strict=True)]
            high = [max(row["steps"]) - m for m, row in zip(means, done, strict=True)]
            axes.errorbar(x, means, [low, high], fmt=style, color=color, label=name, capsize=3)
            missed = [row["value"] for row in own if row["steps"] is None]
            axes.plot(missed, [MOST_STEPS] * len(missed), "x", color=color, markersize=9)
        axes.axhline(MOST_STEPS, color="0.6", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", ylabel=f"steps to {TARGET:g} of the first loss")
        axes.set_ylim(top=2 * MOST_STEPS)
    panels[0].set_xlabel("s in (s A, B/s)")
    panels[1].set_xlabel("cond(g) in (g⁻ᵀA, gB)")
    panels[0].set_title(f"least squares; ×: not within {MOST_STEPS} steps", fontsize=10)
    panels[1].set_title("least squares", fontsize=10)
    for name, (color, style) in styles.items():
        own = [row for row in record["language_model"] if row["optimizer"] == name]
        own = [row for row in own if None not in row["losses"]]
        x = [row["condition"] for row in own]
        means = [statistics.fmean(row["losses"]) for row in own]
        low = [m - min(row["losses"]) for m, row in zip(means, own, strict=True)]
        high = [max(row["losses"]) - m for m, row in zip(means, own, strict=True)]
        panels[2].errorbar(x, means, [low, high], fmt=style, color=color, label=name, capsize=3)
    panels[2].set(xscale="log", xlabel="cond(g) on Q, K, V, O", ylabel="training loss (nats/byte)")
    panels[2].set_title(f"gpt, {STEPS} steps, momentum {MOMENTUM}", fontsize=10)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    note(figure, "points: means over the seeds; bars: from the lowest to the highest seed")
    return png(figure)


def make_record() -> dict[str, Any]:
    """Settings and measurements."""
    return {
        "seeds": SEEDS,
        "settings": {
            "least_squares": {
                "rank": RANK,
                "rows": ROWS,
                "columns": COLUMNS,
                "singular_values": [1.0, 1 / SPREAD],
                "rates_at_scale_1": RATES,
                "target": TARGET,
                "most_steps": MOST_STEPS,
            },
            "language_model": {
                "steps": STEPS,
                "batch": BATCH,
                "context": CONTEXT,
                "momentum": MOMENTUM,
                "rates": MODEL_RATES,
            },
        },
        "least_squares": least_squares(),
        "language_model": language_model(),
    }


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    run_experiment("badly_scaled.py", description, RESULTS, make_record, table, plot)


if __name__ == "__main__":
    main()
