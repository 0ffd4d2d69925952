"""The report of `lora.py`: tables and plots of all ranks in a folder.

In reading order: `read_ranks`, the records; `write_report`, which writes all files; `markdown`,
the tables; `draw_curves` and `draw_rates`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiment import late_limits, markdown_table, png
from lora_summary import (
    TOLERANCE,
    Figures,
    RateRange,
    ShorterBudget,
    figures,
    seeds_of,
    shorter_budgets,
)
from lora_tasks import Recipe
from lora_training import CONTENDERS

from quotientopt.compare.protocol import Run, UsageError
from quotientopt.compare.record import BASELINE, FILE_NAME, write_atomically

NONE = "–"


@dataclass(frozen=True)
class Rank:
    """What was measured at one rank, and the figures made of it."""

    rank: int
    document: dict[str, Any]
    runs: list[Run]
    rows: list[Figures]


def read_ranks(folder: Path) -> list[Rank]:
    """The records in ``rank-*``, by rank.

    Raises
    ------
    UsageError
        If there is none.
    """
    ranks = []
    for path in folder.glob(f"rank-*/{FILE_NAME}"):
        document = json.loads(path.read_text(encoding="utf-8"))
        order = list(CONTENDERS)
        runs = [Run.from_dict(run) for run in document["runs"]]
        runs.sort(key=lambda run: order.index(run.trial.optimizer))
        ranks.append(Rank(document["protocol"]["rank"], document, runs, figures(runs)))
    if not ranks:
        raise UsageError(f"no record in {folder}: run without --report first")
    return sorted(ranks, key=lambda rank: rank.rank)


def read_shorter(folder: Path, ranks: Sequence[Rank]) -> list[ShorterBudget]:
    """Runs of fewer steps, in the folders next to `folder`, against AdamW's best losses in it."""
    found = []
    for other in sorted(folder.parent.glob(f"{folder.name}-[0-9]*")):
        if not any(other.glob(f"rank-*/{FILE_NAME}")):
            continue
        for short, full in itertools.product(read_ranks(other), ranks):
            steps = [rank.document["protocol"]["steps"] for rank in (short, full)]
            if short.rank == full.rank and steps[0] < steps[1]:
                found += shorter_budgets(short.runs, full.runs, full.rank, *steps)
    return found


def write_report(folder: Path, recipe: Recipe) -> str:
    """Write lora.md, lora.json and the plots of all ranks in `folder`; return the tables.

    What a file notes.md there says of the limits of the measurement ends lora.md.
    """
    ranks = read_ranks(folder)
    shorter = read_shorter(folder, ranks)
    text = markdown(ranks, recipe, shorter)
    notes = folder / "notes.md"
    if notes.exists():
        text += f"\n{notes.read_text(encoding='utf-8')}"
    write_atomically(folder / "lora.md", text)
    summary = {
        "title": recipe.title,
        "loss": recipe.unit,
        "ranks": {
            str(rank.rank): {
                "protocol": rank.document["protocol"],
                "environment": rank.document["environment"],
                "optimizers": [_plain(row) for row in rank.rows],
            }
            for rank in ranks
        },
        "fewer steps": [asdict(row) for row in shorter],
    }
    write_atomically(folder / "lora.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    for name, draw in (("curves.png", draw_curves), ("learning-rates.png", draw_rates)):
        if (picture := draw(ranks, recipe)) is not None:
            write_atomically(folder / name, picture)
    return text


def _plain(row: Figures) -> dict[str, Any]:
    return asdict(row) | {"width": row.rates.width if row.rates else None}


def markdown(ranks: Sequence[Rank], recipe: Recipe, shorter: Sequence[ShorterBudget] = ()) -> str:
    """Everything in tables."""
    first = ranks[0].document
    protocol, environment = first["protocol"], first["environment"]
    versions = ", ".join(
        f"{package} {environment[package]}"
        for package in ("torch", "peft", "transformers", "pytorch_optimizer", "quotientopt")
    )
    autocast = (
        "the model runs under autocast to bfloat16" if protocol["autocast"] else "no autocast"
    )
    lines = [
        f"# LoRA: {recipe.title}",
        "",
        f"{protocol['model']}; {protocol['data']}, hash {protocol['data_digest']}. "
        f"{protocol['steps']} steps of {protocol['batch']} examples of at most "
        f"{protocol['context']} tokens; warm-up, then a cosine to "
        f"{100 * protocol['final_fraction']:g} % of the peak. Adapters scaled by "
        f"{protocol['alpha']} / rank, no dropout, no weight decay, betas "
        f"({protocol['beta1']:g}, {protocol['beta2']:g}). A head, where there is one, is trained "
        f"by AdamW at a peak rate of {protocol['head_rate']:g} whatever trains the adapters. "
        f"Weights, gradients and optimizers are float32; {autocast}. "
        f"Validation: {protocol['batch'] * protocol['validation_batches']} fixed examples, every "
        f"{protocol['evaluate_every']} steps. Loss: {recipe.unit}.",
        "",
        f"{environment['processor']}, one thread per run on a machine that did other work as well; "
        f"{versions}.",
    ]
    for rank in ranks:
        lines += ["", *_rank_table(rank)]
    if shorter:
        lines += ["", *_shorter_table(shorter)]
    lines += ["", *_robustness_table(ranks)]
    return "\n".join(lines) + "\n"


def _rank_table(rank: Rank) -> list[str]:
    steps = rank.document["protocol"]["steps"]
    accurate = any(row.accuracy for row in rank.rows)
    columns = [
        "optimizer",
        "best rate",
        "seeds",
        "final loss",
        "best loss",
        *(["accuracy"] if accurate else []),
        "steps to AdamW's best",
        "% of AdamW's",
        "ms optimizer",
        "ms model",
        "MB state",
    ]
    cells = []
    for row in rank.rows:
        edge = "" if row.interior else " (edge)"
        cells.append(
            [
                CONTENDERS[row.optimizer].label,
                f"{row.rate:.3g}{edge}",
                f"{row.seeds}" + (f", {row.diverged} diverged" if row.diverged else ""),
                row.final.text() if row.final else NONE,
                row.best.text() if row.best else NONE,
                *([row.accuracy.text() if row.accuracy else NONE] if accurate else []),
                _steps(row),
                _share(row, steps),
                f"{1e3 * row.optimizer_seconds:.1f}",
                f"{1e3 * row.model_seconds:.0f}",
                f"{row.state_bytes / 1e6:.1f}",
            ]
        )
    return [
        f"## Rank {rank.rank}",
        "",
        markdown_table(columns, cells),
        "",
        "Mean ± standard error over seeds. *Steps to AdamW's best*: to the smallest validation "
        "loss of AdamW's run from the same seed, interpolated between validations, of the seeds "
        "that reach it (k of n where some do not). Milliseconds are medians of the processor time "
        "of a step on one thread, next to other work on the machine.",
    ]


def _steps(row: Figures) -> str:
    if row.steps_to_target is None:
        return "not reached" if row.compared else NONE
    some = "" if row.reached == row.compared else f" ({row.reached} of {row.compared})"
    return row.steps_to_target.text(".0f") + some


def _share(row: Figures, steps: int) -> str:
    if row.steps_to_target is None or row.optimizer == BASELINE:
        return NONE
    return f"{100 * row.steps_to_target.value / steps:.0f}"


def _shorter_table(rows: Sequence[ShorterBudget]) -> list[str]:
    columns = [
        "optimizer",
        "rank",
        "rate",
        "steps",
        "% of AdamW's",
        "seeds",
        "final loss",
        "above AdamW's best",
    ]
    cells = [
        [
            CONTENDERS[row.optimizer].label,
            f"{row.rank}",
            f"{row.rate:.3g}",
            f"{row.steps}",
            f"{100 * row.share:.0f}",
            f"{row.final.count}",
            row.final.text(),
            row.excess.text("+.3f").replace("± +", "± "),
        ]
        for row in rows
    ]
    return [
        "## With fewer steps",
        "",
        "Whole runs of fewer steps, warm-up and decay included, against the smallest validation "
        "loss of AdamW's full run from the same seed (negative: below it).",
        "",
        markdown_table(columns, cells),
    ]


def _robustness_table(ranks: Sequence[Rank]) -> list[str]:
    columns = ["optimizer", *(f"rank {rank.rank}" for rank in ranks)]
    seeds = seeds_of([row for rank in ranks for row in rank.rows])
    cells = []
    for name, contender in CONTENDERS.items():
        found = [next((r for r in rank.rows if r.optimizer == name), None) for rank in ranks]
        if any(found):
            widths = [_range(row.rates) if row and row.rates else NONE for row in found]
            cells.append([contender.label, *widths])
    return [
        "## Robustness against the learning rate",
        "",
        f"The largest over the smallest learning rate whose final loss is within {TOLERANCE:g} of "
        f"the optimizer's own best ({seeds}), interpolated in the logarithm of the "
        "rate (a run that diverged counts as 1 above the best); in brackets the range. ≥: not left "
        "at that end.",
        "",
        markdown_table(columns, cells),
    ]


def _range(rates: RateRange) -> str:
    sign = "≥ " if rates.open else ""
    return f"{sign}{rates.width:.1f} ({rates.low:.2g} … {rates.high:.2g})"


# Okabe and Ito's palette, distinguishable with colour-blindness; line styles tell apart in print.
STYLES: dict[str, tuple[str, Any]] = {
    "adamw": ("#000000", "-"),
    "loraplus": ("#56B4E9", "--"),
    "riemannian": ("#CC79A7", (0, (1, 1))),
    "lora-rite": ("#0072B2", "-."),
    "muon": ("#009E73", (0, (5, 1, 1, 1, 1, 1))),
    "quotient-adam": ("#D55E00", "-"),
    "quotient-adam-polar": ("#D55E00", "--"),
}
# Losses further above the best are not shown.
SHOWN = 0.5
WIDTHS = (1, 2, 3, 5, 10, 20, 50, 100)


def draw_curves(ranks: Sequence[Rank], recipe: Recipe) -> bytes | None:
    """Validation loss against steps, one panel per rank: mean over seeds at the best rate.

    Nothing where all curves are single points: those are data, which the tables have.
    """
    ranks = [rank for rank in ranks if any(len(row.curve) > 1 for row in rank.rows)]
    if not ranks:
        return None
    figure, panels = _panels(len(ranks), 8.0)
    for axes, rank in zip(panels, ranks, strict=True):
        drawn = [row for row in rank.rows if len(row.curve) > 1]
        for row in drawn:
            color, style = STYLES[row.optimizer]
            steps, losses = [p[0] for p in row.curve], [p[2] for p in row.curve]
            seeds = f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"
            name = CONTENDERS[row.optimizer].label
            label = f"{name} ({row.rate:.2g}, {seeds}): {losses[-1]:.3f}"
            axes.plot(steps, losses, color=color, linestyle=style, label=label)
        if drawn:
            axes.set_ylim(*late_limits([row.curve for row in drawn], 4))
            # Beside the curves, which leave no corner free.
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set(xlabel="steps", ylabel=f"validation loss,\n{recipe.unit}")
        axes.set_title(f"rank {rank.rank}", fontsize=10)
        axes.grid(alpha=0.25)
    figure.suptitle(f"{recipe.title}\n(best learning rate of each)", fontsize=10)
    return png(figure)


def draw_rates(ranks: Sequence[Rank], recipe: Recipe) -> bytes | None:
    """Final loss against learning rate per rank, and the width of the good range over ranks.

    Nothing where every optimizer has a single rate; no widths over a single rank.
    """
    ranks = [rank for rank in ranks if any(len(row.losses) > 1 for row in rank.rows)]
    if not ranks:
        return None
    several = len(ranks) > 1
    figure, panels = _panels(len(ranks) + several, 4.2 if several else 7.0)
    lines: dict[str, list[tuple[int, float, bool]]] = {}
    for axes, rank in zip(panels, ranks, strict=False):
        lowest = min((row.final.value for row in rank.rows if row.final), default=0.0)
        for row in rank.rows:
            color, style = STYLES[row.optimizer]
            known = [(rate, loss) for rate, loss in row.losses.items() if loss is not None]
            x, y = [pair[0] for pair in known], [pair[1] for pair in known]
            label = CONTENDERS[row.optimizer].label
            axes.plot(x, y, color=color, linestyle=style, marker=".", label=label)
            if row.rates:
                point = (rank.rank, row.rates.width, row.rates.open)
                lines.setdefault(row.optimizer, []).append(point)
        axes.set(xscale="log", xlabel="peak learning rate", ylabel=recipe.unit)
        axes.set_ylim(lowest - 0.05, lowest + SHOWN)
        axes.set_title(f"rank {rank.rank}: final loss, {seeds_of(rank.rows)}", fontsize=10)
        axes.grid(alpha=0.25)
    figure.suptitle(recipe.title, fontsize=10)
    if not several:
        panels[0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return png(figure)
    last = panels[-1]
    for name, points in lines.items():
        color, style = STYLES[name]
        x, y = [p[0] for p in points], [p[1] for p in points]
        last.plot(x, y, color=color, linestyle=style, label=CONTENDERS[name].label)
        for rank_, width, is_open in points:
            last.plot(rank_, width, color=color, marker="^" if is_open else "o", linestyle="")
    last.set(xscale="log", yscale="log", xlabel="rank", ylabel="largest / smallest rate")
    last.set_xticks([rank.rank for rank in ranks], [str(rank.rank) for rank in ranks])
    last.set_title(f"width of the range within {TOLERANCE:g} of the best", fontsize=10)
    last.set_yticks(WIDTHS, [f"{width:g}" for width in WIDTHS])
    last.minorticks_off()
    widest = max((p[1] for points in lines.values() for p in points), default=1.0)
    last.set_ylim(1, 1.3 * max(widest, 2.0))
    last.grid(alpha=0.25)
    last.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{recipe.title} (triangle: at least so wide)", fontsize=10)
    return png(figure)


def _panels(count: int, width: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 4.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
