"""Tables and plots of `low_rank.py`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiment import markdown_table, png

Run = Mapping[str, Any]

# Okabe and Ito's palette.
COLORS = ("#D55E00", "#E69F00", "#0072B2", "#000000")
FLOOR = 1e-17  # of what a logarithmic axis shows
NONE = "–"


def reached(run: Run) -> bool:
    """Whether the run ended because it was accurate enough."""
    return run["status"] == "reached"


def seconds_to_cost(run: Run, cost: float) -> float | None:
    """CPU seconds until `run` was at or below `cost`, to a relative 1e-6; None if it never was."""
    pairs = zip(run["seconds"], run["costs"], strict=True)
    return next((seconds for seconds, value in pairs if value <= cost * (1 + 1e-6)), None)


def title(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    design = f", design of condition {setting['design']:g}" if setting["design"] > 1 else ""
    target = f"target of condition {setting['condition']:g}"
    return f"{setting['problem']}, {target}{design}, noise {setting['noise']:g}"


def unique(runs: Iterable[Run], key: str) -> list[Any]:
    """The different values of a key, in order of appearance."""
    values: list[Any] = []
    for run in runs:
        if run[key] not in values:
            values.append(run[key])
    return values


def thinned(run: Run, points: int = 150) -> dict[str, Any]:
    """The run with curves of so many points at most, dense at the start, of six digits."""
    length = len(run["costs"])
    steps = max(points - 1, 1)
    kept = sorted({round(length ** (k / steps)) - 1 for k in range(points)} | {length - 1})
    return {
        key: [float(f"{value[k]:.6g}") for k in kept] if isinstance(value, list) else value
        for key, value in run.items()
    }


# ---- tables -------------------------------------------------------------------------------------


def markdown(record: Mapping[str, Any]) -> str:
    """The report on a record."""
    runs, protocol = record["runs"], record["protocol"]
    parts = [
        "# Low-rank least squares and completion: solvers of pymanopt on four geometries",
        _setup(protocol),
        "## Against Euclidean factors and against FixedRankEmbedded",
        *(_bar(runs, setting) for setting in unique(runs, "setting") if _in_bar(runs, setting)),
        "## All runs",
        _legend(protocol),
    ]
    for setting in unique(runs, "setting"):
        parts += [f"### {title(setting)}", _results([r for r in runs if r["setting"] == setting])]
    parts += [
        "## Cost of a call",
        "CPU microseconds of a call at one point, through the adapter on NumPy arrays, and of the "
        "quotient's own method on tensors. The adapter factorises and checks a point once, the "
        "method in every call.",
        _overhead(record["overhead"]),
        "## Environment",
        markdown_table(("", ""), record["environment"].items()),
        f"## Command\n\n```\n{record['command']}\n```\n",
    ]
    return "\n\n".join(parts)


def _setup(protocol: Mapping[str, Any]) -> str:
    rank, rows, columns = protocol["rank"], protocol["rows"], protocol["columns"]
    return (
        f"Matrices of rank {rank}, {rows}×{columns}, as AᵀB. Least squares: ½‖X AᵀB − Y‖² with a "
        f"Gaussian {protocol['observations']}×{rows} design X, or one of the condition number "
        f"given; completion: {protocol['observed']:.0%} of the entries are known. Singular values "
        "of the target are spaced logarithmically from 1 to 1/condition; noise is relative to the "
        "data. All runs of a seed start from the same standard normal A and B, and all solvers "
        "have pymanopt's defaults.\n\n"
        "Gradient norms of different metrics cannot be compared. Here every gradient norm is that "
        "of the cost as a function of AᵀB, projected to the tangent space of the rank-"
        f"{rank} matrices, which is the same number for every geometry; it ends a run below "
        f"{protocol['tolerance']:g}. The solvers' own tests of the gradient are switched off. "
        "Iterations are outer ones: those of trust regions count rejected steps, those of the "
        "others accepted steps. Seconds are CPU seconds of one thread without the measurements: "
        f"the machine was shared. The whole took {protocol['cpu_seconds']:.0f} of them."
    )


def _in_bar(runs: Sequence[Run], setting: Any) -> bool:
    return any(run["bar"] for run in runs if run["setting"] == setting)


def _bar(runs: Sequence[Run], setting: Any) -> str:
    own = [run for run in runs if run["setting"] == setting and run["bar"]]
    rows = []
    for seed in unique(own, "seed"):
        euclidean, embedded, quotient = sorted(
            (run for run in own if run["seed"] == seed), key=lambda run: run["geometry"]
        )
        cost, seconds = quotient["costs"][-1], quotient["seconds"][-1]
        to_cost = seconds_to_cost(embedded, cost)
        if to_cost is None:
            ratio = f"> {embedded['seconds'][-1] / seconds:.1f}"
        else:
            ratio = f"{to_cost / seconds:.1f}"
        rows.append(
            (
                seed,
                _outcome(quotient, "iterations"),
                f"{seconds:.2f}" if reached(quotient) else NONE,
                _outcome(euclidean, "iterations"),
                f"{to_cost:.2f}" if to_cost is not None else f"> {embedded['seconds'][-1]:.1f}",
                ratio,
            )
        )
    header = (
        "seed",
        "trust regions on the quotient: iterations",
        "seconds",
        "on Euclidean factors: iterations",
        "steepest descent on FixedRankEmbedded: seconds to the same cost",
        "ratio of seconds",
    )
    return f"{title(setting)}:\n\n{markdown_table(header, rows)}"


def _outcome(run: Run, quantity: str) -> str:
    """A final value, with what is known of it where the tolerance was not reached."""
    if reached(run):
        return f"{run[quantity][-1]}"
    return f"> {run[quantity][-1]} (gradient {run['gradients'][-1]:.0e})"


def _legend(protocol: Mapping[str, Any]) -> str:
    return (
        f"Seeds {', '.join(map(str, protocol['seeds']))}; medians and ranges. Runs were stopped "
        f"after {protocol['limit']:g} CPU seconds, those of the tables above after "
        f"{protocol['bar_limit']:g}. Excess cost is relative to the smallest that any run of the "
        "seed has found."
    )


def _results(runs: Sequence[Run]) -> str:
    best = {
        seed: min(min(run["costs"]) for run in runs if run["seed"] == seed)
        for seed in unique(runs, "seed")
    }
    rows = []
    for solver, geometry in itertools.product(unique(runs, "solver"), unique(runs, "geometry")):
        own = [run for run in runs if (run["geometry"], run["solver"]) == (geometry, solver)]
        if not own:
            continue
        successes = [run for run in own if reached(run)]
        excess = [(run["costs"][-1] - best[run["seed"]]) / run["costs"][0] for run in own]
        rows.append(
            (
                solver,
                geometry,
                f"{len(successes)} of {len(own)}",
                _spread([run["iterations"][-1] for run in successes], "g"),
                _spread([run["seconds"][-1] for run in successes], ".2f"),
                _spread([run["gradients"][-1] for run in own], ".0e"),
                _spread(excess, ".0e"),
                "; ".join(sorted({run["status"] for run in own if not reached(run)})) or NONE,
            )
        )
    header = (
        "solver",
        "geometry",
        "reached",
        "iterations",
        "seconds",
        "final gradient",
        "excess cost / first cost",
        "other ends",
    )
    return markdown_table(header, rows)


def _overhead(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(r["geometry"], r["call"], f"{r['adapter']:.0f}", f"{r['core']:.0f}") for r in rows]
    return markdown_table(("geometry", "call", "adapter", "quotient"), cells)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}}" + (f" ({low:{form}} – {high:{form}})" if low < high else "")


# ---- plot ---------------------------------------------------------------------------------------


def picture(runs: Sequence[Run]) -> bytes:
    """PNG of one setting: a row for each solver, cost and gradient against effort."""
    from matplotlib.figure import Figure

    solvers, geometries = unique(runs, "solver"), unique(runs, "geometry")
    figure = Figure(figsize=(15, 3.3 * len(solvers)), layout="constrained")
    grid = figure.subplots(len(solvers), 4, squeeze=False)
    best = {
        seed: min(min(run["costs"]) for run in runs if run["seed"] == seed)
        for seed in unique(runs, "seed")
    }
    columns: tuple[tuple[str, str, Callable[[Run], list[float]]], ...] = tuple(
        (abscissa, name, values)
        for name, values in (
            ("cost − smallest found", lambda run: [c - best[run["seed"]] for c in run["costs"]]),
            ("gradient norm", lambda run: run["gradients"]),
        )
        for abscissa in ("iterations", "seconds")
    )
    for axes_row, solver in zip(grid, solvers, strict=True):
        for axes, (abscissa, name, values) in zip(axes_row, columns, strict=True):
            for run in (run for run in runs if run["solver"] == solver):
                geometry = run["geometry"]
                first = run["seed"] == runs[0]["seed"]
                axes.plot(
                    run[abscissa],
                    [
                        max(value, FLOOR) if math.isfinite(value) else math.nan
                        for value in values(run)
                    ],
                    color=COLORS[geometries.index(geometry)],
                    linewidth=1.6 if first else 0.8,
                    alpha=1.0 if first else 0.6,
                    label=geometry if first else None,
                )
            axes.set_yscale("log")
            # A run may need a thousand times the effort of another.
            axes.set_xscale("symlog", linthresh=1.0 if abscissa == "iterations" else 0.01)
            axes.set_xlim(left=0)
            axes.set_xlabel(
                f"{abscissa} of {solver}" if abscissa == "iterations" else "CPU seconds"
            )
            axes.set_ylabel(name)
            axes.grid(alpha=0.25)
        axes_row[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title(runs[0]["setting"]))
    return png(figure)
