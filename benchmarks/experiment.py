"""What the scripts share: their command in a record, tables and pictures, and one frame for most.

In reading order: `command_of`; `markdown_table` and `standard_error`; colours and what pictures are
made with; `run_experiment`, the command line, the record and its files.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically

# Okabe and Ito's palette. An optimizer has one colour in all pictures, here and in the comparison.
ADAM, QUOTIENT_ADAM, SGD, QUOTIENT_SGD, FLOW = "#000000", "#D55E00", "#E69F00", "#56B4E9", "#0072B2"
BANDS = "lines: means over the seeds; bands: from the lowest to the highest seed"


def command_of(script: str, arguments: Sequence[str] | None = None) -> str:
    """How a script was called, for its record; `arguments` are those of the process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{script}", *arguments])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def note(figure: Any, text: str) -> None:
    """A line below all panels: what bands and marks are."""
    figure.supxlabel(text, fontsize=8, color="0.35")


def mean_and_range(
    axes: Any, x: Sequence[float], curves: Iterable[Sequence[float]], style: str = "-", **line: Any
) -> None:
    """The mean of curves over seeds, and a band from the lowest to the highest."""
    points = list(zip(*curves, strict=True))
    axes.plot(x, [statistics.fmean(values) for values in points], style, **line)
    low, high = [min(values) for values in points], [max(values) for values in points]
    axes.fill_between(x, low, high, color=line["color"], alpha=0.15, linewidth=0)


def late_limits(curves: Sequence[Sequence[Sequence[float]]], part: int) -> tuple[float, float]:
    """Limits of losses that show the differences at the end, not the fall of the first steps.

    From the lowest to what every curve of (step, seconds, loss) has reached after one `part`-th.
    """
    lowest = min(point[2] for curve in curves for point in curve)
    highest = max(curve[len(curve) // part][2] for curve in curves)
    margin = 0.05 * max(highest - lowest, 0.1)
    return lowest - margin, highest + margin


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
        "command": command_of(script),
        "environment": describe_environment("cpu"),
        **measure(),
    }
    path = arguments.out / f"{Path(script).stem.replace('_', '-')}.json"
    write_atomically(path, json.dumps(record, indent=indent) + "\n")
    write_report(path, record, table, plot)


def write_report(
    path: Path,
    record: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any]], bytes],
) -> None:
    """Table and picture of a record beside its JSON, the table also on the terminal."""
    for suffix, content in (("md", table(record)), ("png", plot(record))):
        write_atomically(path.with_suffix(f".{suffix}"), content)
    print(table(record))
