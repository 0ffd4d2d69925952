"""Tables of `invariant_attention.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from quotientopt.compare.protocol import Protocol

PAIRS = {
    "fixed-rank": "ordinary, QuotientAdam",
    "chart": "ordinary, AdamW",
    "gauge of the chart": "ordinary, AdamW",
}
STRETCHES = (1, 5, 20, 100, 300)


def of_arm(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Runs at the arm's best rate, by seed."""
    runs = [run for run in record["runs"] if run["trial"]["optimizer"] == name]
    tuning = [run for run in runs if run["trial"]["seed"] == 0] or runs
    best = min(tuning, key=score)["trial"]["rate"]
    chosen = [run for run in runs if run["trial"]["rate"] == best]
    return sorted(chosen, key=lambda run: run["trial"]["seed"])


def score(run: dict[str, Any]) -> float:
    """Final validation loss, infinite if the run diverged."""
    return math.inf if run["final_loss"] is None else run["final_loss"]


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def rows_of(lines: Iterable[Sequence[object]]) -> list[str]:
    """Rows of a Markdown table."""
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    protocol, environment = record["protocol"], record["environment"]
    names = list(dict.fromkeys(run["trial"]["optimizer"] for run in record["runs"]))
    summary = []
    for name in names:
        runs = of_arm(record, name)
        other = PAIRS.get(name.split(", ")[0])
        difference = "–"
        if other in names:
            bases = {run["trial"]["seed"]: score(run) for run in of_arm(record, other)}
            seeds = [run["trial"]["seed"] for run in runs]
            difference = mean_and_error(
                [score(run) - bases[seed] for run, seed in zip(runs, seeds, strict=True)]
            )
        rate = f"{runs[0]['trial']['rate']:g}"
        summary.append(
            (
                name,
                rate + (" (edge)" if name in record["rates_on_the_edge"] else ""),
                mean_and_error([score(run) for run in runs]),
                difference,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['state_bytes'] / 1e6:.1f}",
            )
        )
    header = (
        "arm",
        "best lr",
        "final validation loss",
        "less that of ordinary attention",
        "parameters",
        "state MB",
    )
    everything = [
        (
            run["trial"]["optimizer"],
            f"{run['trial']['rate']:g}",
            run["trial"]["seed"],
            f"{score(run):.4f}",
            f"{sum(run['training_losses'][-20:]) / max(len(run['training_losses'][-20:]), 1):.4f}",
        )
        for run in record["runs"]
    ]
    conditions = [
        (trial, f"{found['qk']:.3g}", f"{found['vo']:.3g}")
        for trial, found in record["final_chart_conditions"].items()
    ]
    return "\n".join(
        [
            "# Ordinary and invariant attention",
            "",
            f"`{record['command']}`. `{protocol['model']}` ({protocol['layers']} layers, width "
            f"{protocol['width']}), text `{protocol['data']}`, {protocol['steps']} steps of "
            f"{protocol['batch']} × {protocol['context']} tokens, warm-up {protocol_warmup(record)}"
            f" steps, cosine to {protocol['final_fraction']:.0%}, weight decay "
            f"{protocol['weight_decay']:g}, β₂ of AdamW {record['adamw_beta2']:g}. Losses in nats "
            "per byte on fixed validation batches; means over seeds ± standard error of the mean; "
            "differences are paired by seed. Runs of one seed start from the same function.",
            "",
            *rows_of([header, ["---"] * len(header), *summary]),
            "",
            "## All runs",
            "",
            *rows_of(
                [
                    (
                        "arm",
                        "lr",
                        "seed",
                        "final validation loss",
                        "mean of the last 20 training losses",
                    ),
                    ["---"] * 5,
                ]
            ),
            *rows_of(everything),
            "",
            "## Paths",
            "",
            "Largest difference of the training losses from those of ordinary attention at the "
            "same rate, seed 0, over the first steps.",
            "",
            *rows_of([("arm", "lr", *STRETCHES), ["---"] * (2 + len(STRETCHES)), *paths(record)]),
            "",
            *float64_lines(record),
            "## Charts after training",
            "",
            "Largest condition number ‖[I, F]‖₂ over layers and heads.",
            "",
            *rows_of([("run", "QK", "VO"), ["---"] * 3, *conditions]),
            "",
            "## Environment",
            "",
            f"{environment['processor']}, one thread, {environment['platform']}, Python "
            f"{environment['python']}, torch {environment['torch']}, quotientopt "
            f"{environment['quotientopt']}; {record['cpu_seconds']:.0f} CPU seconds in all.",
            "",
        ]
    )


def paths(record: dict[str, Any]) -> list[tuple[object, ...]]:
    """How far training losses of two arms at one rate are apart, over the first steps of seed 0."""
    found: list[tuple[object, ...]] = []
    runs = [run for run in record["runs"] if run["trial"]["seed"] == 0]
    for name in dict.fromkeys(run["trial"]["optimizer"] for run in runs):
        other = PAIRS.get(name.split(", ")[0])
        for run in (run for run in runs if run["trial"]["optimizer"] == name):
            rate = run["trial"]["rate"]
            base = [
                r for r in runs if (r["trial"]["optimizer"], r["trial"]["rate"]) == (other, rate)
            ]
            if not base:
                continue
            losses = zip(run["training_losses"], base[0]["training_losses"], strict=False)
            apart = [abs(one - two) for one, two in losses]
            found.append((name, f"{rate:g}", *(f"{max(apart[:n]):.1e}" for n in STRETCHES)))
    return found


def float64_lines(record: dict[str, Any]) -> list[str]:
    """What was measured in float64, if it was."""
    path = record.get("float64_path")
    if path is None:
        return []
    return [
        f"In float64 the fixed-rank points and ordinary attention under QuotientAdam at "
        f"{path['rate']:g} are apart by at most {max(path['differences']):.1e} over the first "
        f"{path['steps']} steps of seed {path['seed']}.",
        "",
    ]


def protocol_warmup(record: dict[str, Any]) -> int:
    """Steps of warm-up."""
    return Protocol(**record["protocol"]).warmup
