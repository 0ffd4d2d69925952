"""Plots of `lora.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiment import png

from lora_tasks.contenders import CONTENDERS
from lora_tasks.planning import TOLERANCE
from lora_tasks.summary import seeds_of
from lora_tasks.tasks import Recipe

if TYPE_CHECKING:
    from lora_tasks.report import Rank

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
            lowest = min(p[2] for row in drawn for p in row.curve)
            # What every curve has reached after a quarter of the steps.
            highest = max(row.curve[len(row.curve) // 4][2] for row in drawn)
            margin = 0.05 * max(highest - lowest, 0.1)
            axes.set_ylim(lowest - margin, highest + margin)
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
