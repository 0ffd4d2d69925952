"""How the lead over AdamW changes with the size of a model: GPTs of growing width, rates tuned.

The protocol of ``quotientopt compare`` with 512 tokens per step and steps in proportion to the
width, so that tokens grow with the square root of the parameters. Per width AdamW, Muon, SOAP-Muon
and QuotientAdam are tuned from the best rate of the width before; what counts is the first step at
which the validation loss is below AdamW's last one, as a fraction of AdamW's steps, and how that
fraction goes with the number of parameters.

    python benchmarks/ladder.py                       # every width, ends with table and plot
    python benchmarks/ladder.py --widths 192,256      # further ones
    python benchmarks/ladder.py --report              # table and plot of the record

Runs in the record are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import command_of, markdown_table, note, png, write_report

from quotientopt.compare.data import load_task
from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.report import COLORS
from quotientopt.compare.train import train
from quotientopt.compare.tuning import search_rates

RESULTS = Path(__file__).parent / "results" / "ladder"
WIDTHS = (32, 64, 128)
STEPS_PER_WIDTH = 4
BASELINE = "adamw"
# And the first rate tried at the smallest width.
CONTENDERS = {BASELINE: 4e-3, "muon": 4e-2, "soap-muon": 1.6e-2, "quotient-adam": 4e-3}


def protocol_of(width: int) -> Protocol:
    """512 tokens per step, steps in proportion to the width; forty validations."""
    steps = STEPS_PER_WIDTH * width
    return Protocol(
        steps=steps, batch=8, context=64, width=width, evaluate_every=max(1, steps // 40)
    )


def tuned(record: dict[str, Any], path: Path, name: str, width: int, start: float) -> float:
    """Runs of a contender at a width until its best rate has worse neighbours; returns that rate.

    Parameters
    ----------
    record : dict
        What is known; filled, and written to ``path`` after every run.
    path : Path
    name : str
    width : int
    start : float
        The best rate of the width before, or the contender's first.
    """
    protocol, settings = protocol_of(width), dict(OPTIMIZERS[name].settings_grid[0])
    runs = record["runs"].setdefault(str(width), {}).setdefault(name, {})
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    search = search_rates((start / 2, start), extend=True)
    pending = next(search)
    while True:
        for rate in pending:
            if f"{rate:g}" not in runs:
                run = train(Trial(name, rate, settings), protocol, task)
                runs[f"{rate:g}"] = {
                    "loss": run.final_loss,
                    "curve": [[step, loss] for step, _, loss in run.curve],
                    "parameters": run.parameters,
                    "settings": settings,
                }
                print(width, name, f"{rate:g}", run.final_loss, flush=True)
                write_atomically(path, json.dumps(record) + "\n")
        losses = [runs[f"{rate:g}"]["loss"] for rate in pending]
        try:
            pending = search.send([math.inf if loss is None else loss for loss in losses])
        except StopIteration as stop:
            return float(stop.value.rate)


def best(runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Rate and run of the lowest last loss."""
    return min(runs.items(), key=lambda item: item[1]["loss"] or math.inf)


def rungs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per width and contender: best rate, last loss, and steps to AdamW's loss over AdamW's."""
    rows = []
    for width, contenders in record["runs"].items():
        if BASELINE not in contenders:
            continue
        target = best(contenders[BASELINE])[1]["loss"]
        for name in CONTENDERS:
            if name not in contenders:
                continue
            rate, run = best(contenders[name])
            reached = [step for step, loss in run["curve"] if loss <= target]
            steps = run["curve"][-1][0]
            rows.append(
                {
                    "width": int(width),
                    "parameters": run["parameters"],
                    "steps": steps,
                    "optimizer": name,
                    "rate": float(rate),
                    "loss": run["loss"],
                    "fraction": reached[0] / steps if reached else None,
                }
            )
    return rows


def trends(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Exponent and factor of fraction ∝ parameters^exponent, by least squares of logarithms."""
    found = {}
    for name in CONTENDERS:
        own = [r for r in rows if r["optimizer"] == name and r["fraction"]]
        if name != BASELINE and len(own) >= 3:
            x, y = (np.log([r[key] for r in own]) for key in ("parameters", "fraction"))
            exponent, constant = np.polyfit(x, y, 1)
            found[name] = (float(exponent), float(np.exp(constant)))
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    rows = rungs(record)
    header = ["width", "parameters", "steps", "optimizer", "best rate", "last loss"]
    cells = [
        [
            r["width"],
            f"{r['parameters']:,}",
            r["steps"],
            r["optimizer"],
            f"{r['rate']:g}",
            f"{r['loss']:.4f}",
            "–" if r["fraction"] is None else f"{r['fraction']:.1%}",
        ]
        for r in rows
    ]
    lines = ["# The lead over AdamW, by size", ""]
    lines += [markdown_table([*header, "steps to AdamW's last loss"], cells), ""]
    for name, (exponent, _) in trends(rows).items():
        lines.append(f"- {name}: fraction of AdamW's steps ∝ parameters^{exponent:+.3f}")
    return "\n".join(lines) + "\n"


def plot(record: Mapping[str, Any]) -> bytes:
    """Fractions of AdamW's steps and last losses, against the number of parameters."""
    from matplotlib.figure import Figure

    rows = rungs(record)
    slopes = trends(rows)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in CONTENDERS:
        own, color = [r for r in rows if r["optimizer"] == name], COLORS[name]
        sizes = [r["parameters"] for r in own]
        right.plot(sizes, [r["loss"] for r in own], "o-", color=color, ms=4, label=name)
        if name != BASELINE:
            fractions = [math.nan if r["fraction"] is None else r["fraction"] for r in own]
            left.plot(sizes, fractions, "o", color=color, ms=5, label=name)
        if name in slopes:
            exponent, factor = slopes[name]
            left.plot(sizes, [factor * size**exponent for size in sizes], "--", color=color)
    left.axhline(1.0, color=COLORS[BASELINE], lw=1)
    left.set(xscale="log", ylim=(0, 1.05), ylabel="fraction of AdamW's steps to its last loss")
    right.set(xscale="log", ylabel="last validation loss (nats per byte)")
    sizes = sorted({r["parameters"] for r in rows})
    for axes in (left, right):
        axes.set_xlabel("parameters")
        axes.set_xticks(sizes, [f"{size / 1e6:.2g} M" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    note(figure, "one seed, rates tuned at every width; dashed: power laws fitted to the points")
    return png(figure)


def main() -> int:
    """Make the runs that are missing, and write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "ladder.json"
    record: dict[str, Any] = {"commands": [], "runs": {}}
    if path.exists():
        record = json.loads(path.read_text())
    if not given.report:
        record["commands"] = sorted({*record["commands"], command_of("ladder.py")})
        record["environment"] = describe_environment("cpu")
        record["protocol"] = asdict(protocol_of(WIDTHS[0])) | {"steps": "4 times the width"}
        for name in given.contenders.split(","):
            rate = CONTENDERS[name]
            for width in map(int, given.widths.split(",")):
                rate = tuned(record, path, name, width, rate)
    write_atomically(path, json.dumps(record) + "\n")
    write_report(path, record, table, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
