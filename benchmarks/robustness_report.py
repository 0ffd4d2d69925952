"""Figures, table and plot of `robustness.py`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiment import BANDS, late_limits, markdown_table, mean_and_range, note, png, standard_error

from quotientopt.compare.report import setting

# Okabe and Ito's palette. Widths fall from one condition number to the next, so that curves which
# coincide show as stripes of all colours.
COLORS = ("#56B4E9", "#E69F00", "#009E73", "#000000")
WIDTHS = (7.0, 4.5, 2.6, 1.0)

Run = Mapping[str, Any]


def deviation(run: Run, reference: Run) -> float | None:
    """Largest difference of two validation curves; None if either run diverged."""
    if run["status"] != "finished" or reference["status"] != "finished":
        return None
    pairs = zip(run["curve"], reference["curve"], strict=True)
    return max(abs(point[2] - other[2]) for point, other in pairs)


def first_deviation(run: Run, reference: Run) -> float | None:
    """Difference of the losses of the first step: both starts compute one function."""
    losses = [own["training_losses"][:1] for own in (run, reference)]
    return abs(losses[0][0] - losses[1][0]) if all(losses) else None


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per optimizer and condition number, compared with the same seeds at 1."""
    by_start = {(run["optimizer"], run["cond"], run["seed"]): run for run in runs}
    rows = []
    for optimizer, cond in dict.fromkeys((run["optimizer"], run["cond"]) for run in runs):
        own = [run for run in runs if (run["optimizer"], run["cond"]) == (optimizer, cond)]
        pairs = [
            (run, by_start[optimizer, 1.0, run["seed"]])
            for run in own
            if (optimizer, 1.0, run["seed"]) in by_start
        ]
        finished = [run for run in own if run["status"] == "finished"]
        losses = [run["final_loss"] for run in finished]
        rows.append(
            {
                "optimizer": optimizer,
                "cond": cond,
                "rate": own[0]["trial"]["rate"],
                "settings": own[0]["trial"]["settings"],
                "runs": len(own),
                "diverged": len(own) - len(finished),
                "final_loss": statistics.fmean(losses) if losses else None,
                "standard_error": standard_error(losses),
                "largest_deviation": _largest(itertools.starmap(deviation, pairs)),
                "first_loss_deviation": _largest(itertools.starmap(first_deviation, pairs)),
            }
        )
    return rows


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest value; None if one is missing."""
    known = list(values)
    return None if None in known or not known else max(v for v in known if v is not None)


# ---- table --------------------------------------------------------------------------------------


def markdown(record: Mapping[str, Any]) -> str:
    """The report on a record."""
    protocol, conds = record["protocol"], record["conds"]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in record["summary"]))
    header = [
        "optimizer",
        "setting",
        *(f"loss, cond {cond:g}" for cond in conds),
        *(f"deviation, cond {cond:g}" for cond in conds[1:]),
    ]
    seeds = max(row["runs"] for row in record["summary"])
    return "\n\n".join(
        [
            "# Robustness against the gauge of the start",
            f"Model `{protocol['model']}` ({protocol['layers']} layers, width "
            f"{protocol['width']}), text `{protocol['data']}`, {protocol['steps']} steps of "
            f"{protocol['batch']} × {protocol['context']} tokens with the cosine schedule over "
            f"them, {record['dtype']}, {seeds} seed(s). Training starts from g·x, with g in GL(r) "
            "on every head's query-key and value-output pair, random with the given condition "
            f"number. Settings are those tuned at the usual start in `{record['tuned']}`, unless "
            "the command says otherwise.",
            markdown_table(header, [_line(record, optimizer) for optimizer in optimizers]),
            "\n".join(f"- {remark}" for remark in _remarks(record, seeds)),
            "## Environment",
            markdown_table(("", ""), [(k, str(v)) for k, v in record["environment"].items()]),
            "## Command",
            "```\n" + "\n".join(record["commands"]) + "\n```\n",
        ]
    )


def _remarks(record: Mapping[str, Any], seeds: int) -> list[str]:
    first = _largest(row["first_loss_deviation"] for row in record["summary"])
    remarks = [
        "Loss: final validation loss in nats per byte"
        + (", mean over seeds ± standard error." if seeds > 1 else "."),
        "Deviation: the largest difference, over all evaluations and seeds, from the validation "
        "curve that starts with cond 1. Training amplifies rounding, so it is not zero where "
        "the optimizer is equivariant.",
        "Weight decay is decoupled: it is linear and commutes with g. But g changes the norm of "
        "the weights, so for optimizers that are not equivariant the size of a step, and of the "
        "decay, relative to the weights depends on g.",
    ]
    if first is not None:
        remarks.append(f"The first training losses of all starts agree to {first:.0e}.")
    return remarks


def _line(record: Mapping[str, Any], optimizer: str) -> list[str]:
    own = {row["cond"]: row for row in record["summary"] if row["optimizer"] == optimizer}
    some = next(iter(own.values()))
    losses = [_loss(own.get(cond)) for cond in record["conds"]]
    deviations = [_deviation(own.get(cond)) for cond in record["conds"][1:]]
    return [optimizer, setting(some["rate"], some["settings"]), *losses, *deviations]


def _loss(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["diverged"]:
        return f"diverged ({row['diverged']} of {row['runs']})"
    error = row["standard_error"]
    return f"{row['final_loss']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _deviation(row: Mapping[str, Any] | None) -> str:
    value = None if row is None else row["largest_deviation"]
    return "–" if value is None else f"{value:.1e}"


# ---- plot ---------------------------------------------------------------------------------------


def plot(record: Mapping[str, Any]) -> bytes:
    """One panel per optimizer with a validation curve per condition number, as PNG."""
    from matplotlib.figure import Figure

    rows, runs = record["summary"], record["runs"]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure = Figure(figsize=(3.2 * len(optimizers) + 0.8, 3.8), layout="constrained")
    panels = figure.subplots(1, len(optimizers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, optimizer in zip(panels, optimizers, strict=True):
        for place, cond in enumerate(record["conds"]):
            own = [run for run in runs if (run["optimizer"], run["cond"]) == (optimizer, cond)]
            _curve(axes, own, cond, place)
        own_rows = [row for row in rows if row["optimizer"] == optimizer]
        axes.set_title(f"{optimizer}\n{_title(own_rows)}", fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss (nats per byte)")
    curves = [run["curve"] for run in runs if run["curve"]]
    panels[0].set_ylim(*(late_limits(curves, 6) if curves else (0.0, 1.0)))
    panels[-1].legend(title="cond(g)", frameon=False)
    if len({run["seed"] for run in runs}) > 1:
        note(figure, BANDS)
    return png(figure)


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    largest = _largest(row["largest_deviation"] for row in rows)
    return "a run diverged" if largest is None else f"largest deviation {largest:.1e}"


def _curve(axes: Any, runs: Sequence[Run], cond: float, place: int) -> None:
    """Mean over seeds, with a band from the lowest to the highest; diverged runs end in a cross."""
    style = {
        "color": COLORS[place % len(COLORS)],
        "linewidth": WIDTHS[min(place, len(WIDTHS) - 1)],
        "label": f"{cond:g}",
    }
    finished = [run["curve"] for run in runs if run["status"] == "finished"]
    if finished:
        losses = [[point[2] for point in curve] for curve in finished]
        mean_and_range(axes, [point[0] for point in finished[0]], losses, **style)
    for run in runs:
        if run["status"] != "finished" and run["curve"]:
            steps, losses = [p[0] for p in run["curve"]], [p[2] for p in run["curve"]]
            axes.plot(steps, losses, marker="x", markevery=[-1], **(style | {"label": None}))
