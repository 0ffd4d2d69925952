"""What scripts of one experiment share: the command line, the record and its files."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically

# Okabe and Ito's palette. An optimizer has one colour in all pictures, here and in the comparison.
ADAM, QUOTIENT_ADAM, SGD, QUOTIENT_SGD, FLOW = "#000000", "#D55E00", "#E69F00", "#56B4E9", "#0072B2"
BANDS = "lines: means over the seeds; bands: from the lowest to the highest seed"


def note(figure: Any, text: str) -> None:
    """A line below all panels: what bands and marks are."""
    figure.supxlabel(text, fontsize=8, color="0.35")


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def run_experiment(
    script: str,
    description: str,
    folder: Path,
    measure: Callable[[], Mapping[str, Any]],
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any]], bytes],
    *,
    indent: int | None = 1,
) -> None:
    """Measure on one thread and write ``<script's name>.{json,md,png}``, with dashes.

    Parameters
    ----------
    script : str
        File name, for the command in the record.
    description : str
        For ``--help``.
    folder : Path
        Where the files go unless ``--out`` says otherwise.
    measure : callable
        Makes the rest of the record.
    table, plot : callable
        Markdown and picture of a record.
    indent : int, optional
        Of the JSON; None for long curves.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=folder)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    record = {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "environment": describe_environment("cpu"),
        **measure(),
    }
    name = Path(script).stem.replace("_", "-")
    for suffix, content in (
        ("json", json.dumps(record, indent=indent) + "\n"),
        ("md", table(record)),
        ("png", plot(record)),
    ):
        write_atomically(arguments.out / f"{name}.{suffix}", content)
    print(table(record))
