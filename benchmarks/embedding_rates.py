"""How the best rate of embeddings and head goes with the width of a GPT, that of matrices fixed.

QuotientAdam updates embeddings, positions and head at a multiple of its other matrices' rate. Here
that multiple is varied at widths 128, 256 and 512, with the protocol of ``quotientopt compare`` in
short form; SOAP-Muon beside AdamW, whose rates are apart, is the control of the widest.

    python benchmarks/embedding_rates.py --jobs 2

Runs in the record are not repeated; ``--report`` makes table and picture of what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from experiment import QUOTIENT_ADAM, command_of, markdown_table, note, png, write_report

from quotientopt.compare.data import load_task
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import train
from quotientopt.optim.update import embedding_width_factor

RESULTS = Path(__file__).parent / "results" / "embedding-rates"
# Width, layers and steps.
SHAPES = ((128, 4, 200), (256, 4, 200), (512, 2, 150))
RATES = (1e-3, 2e-3)
# Rates of embeddings over those of the other matrices.
RATIOS = (2.0, 1.0, 0.5, 0.25)
# SOAP-Muon at the rate of QuotientAdam's matrices, four times 2e-3, and AdamW's beside it.
CONTROLS = ((512, 8e-3, 1.6e-2), (512, 8e-3, 4e-3))


def trials() -> list[tuple[str, int, float, float]]:
    """Optimizer, width, rate and what is set for embeddings, the wide ones first."""
    own = [("quotient-adam", w, rate, x) for w, _, _ in SHAPES for rate in RATES for x in RATIOS]
    controls = [("soap-muon", *control) for control in CONTROLS]
    return sorted(own + controls, key=lambda trial: -trial[1])


def key_of(trial: tuple[str, int, float, float]) -> str:
    """Of a trial in the record."""
    return "/".join(map(str, trial))


def run_trial(trial: tuple[str, int, float, float]) -> tuple[str, dict[str, Any]]:
    """One run on one thread: its key in the record, and what it found."""
    torch.set_num_threads(1)
    name, width, rate, own = trial
    layers, steps = next((layers, steps) for w, layers, steps in SHAPES if w == width)
    protocol = Protocol(width=width, layers=layers, steps=steps)
    settings = {"adamw_rate": own}
    if name == "quotient-adam":
        settings = {"embedding_scale": own / embedding_width_factor(width)}
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    run = train(Trial(name, rate, settings), protocol, task)
    found = {"layers": layers, "steps": steps, "settings": settings, "loss": run.final_loss}
    found["optimizer ms"] = 1e3 * run.timing.optimizer.mean
    return key_of(trial), found | {"parameters": run.parameters}


def table(record: dict[str, Any]) -> str:
    """Last losses by width, rate and ratio, as Markdown."""
    runs = record["runs"]

    def loss(*trial: Any) -> str:
        found = runs.get(key_of(trial))
        return f"{found['loss']:.3f}" if found else "–"

    rows = [
        (width, f"{rate:g}", *(loss("quotient-adam", width, rate, x) for x in RATIOS))
        for width, _, _ in SHAPES
        for rate in RATES
    ]
    header = ["width", "lr", *(f"embeddings at {x:g}" for x in RATIOS)]
    lines = ["# Rates of embeddings, by width", "", markdown_table(header, rows), ""]
    lines += [
        f"SOAP-Muon, width {width}, rate {rate:g}, AdamW's {own:g}: "
        f"{loss('soap-muon', width, rate, own)}"
        for width, rate, own in CONTROLS
    ]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Last losses above the lowest of a width, against the embeddings' rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (width, layers, steps) in zip(
        figure.subplots(1, len(SHAPES), squeeze=False)[0], SHAPES, strict=True
    ):
        for rate, style in zip(RATES, ("o--", "o-"), strict=True):
            own = [
                (x, record["runs"].get(key_of(("quotient-adam", width, rate, x)))) for x in RATIOS
            ]
            points = [(4 * rate * x, found["loss"]) for x, found in own if found]
            axes.plot(
                *zip(*points, strict=True), style, color=QUOTIENT_ADAM, ms=4, label=f"lr {rate:g}"
            )
        axes.axvline(8 * RATES[1] * embedding_width_factor(width), color="0.6", lw=1)
        axes.set(xscale="log", xlabel="rate of embeddings and head")
        axes.set_title(f"width {width}, {layers} layers, {steps} steps", fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("last validation loss (nats per byte)")
    figure.axes[0].legend(frameon=False)
    note(figure, "one seed; grey: the default at the higher rate")
    return png(figure)


def main() -> int:
    """Make the runs that are missing, and write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "embedding-rates.json"
    record: dict[str, Any] = {"runs": {}}
    if path.exists():
        record = json.loads(path.read_text())
    if not given.report:
        record |= {
            "command": command_of("embedding_rates.py"),
            "environment": describe_environment("cpu"),
        }
        missing = [trial for trial in trials() if key_of(trial) not in record["runs"]]
        context = multiprocessing.get_context("spawn")
        with context.Pool(given.jobs) as pool:
            for key, found in pool.imap_unordered(run_trial, missing):
                record["runs"][key] = found
                print(key, found["loss"], flush=True)
                write_atomically(path, json.dumps(record, indent=1) + "\n")
    write_report(path, record, table, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
