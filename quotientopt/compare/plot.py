"""compare.png: validation loss against steps and against training seconds."""

import io
from pathlib import Path
from typing import Any

from quotientopt._files import write_atomically
from quotientopt.compare.defaults import MODEL_DEFAULTS
from quotientopt.compare.record import Record
from quotientopt.compare.report import setting
from quotientopt.compare.summary import BASELINE, Row, best_runs, summarize, timed_curve

FILE_NAME = "compare.png"
# Okabe and Ito's palette, distinguishable with colour-blindness; line styles tell apart in print.
COLORS = {
    "adamw": "#000000",
    "quotient-adam": "#D55E00",
    "soap": "#0072B2",
    "muon": "#009E73",
    "geoopt-adam": "#CC79A7",
}
STYLES: dict[str, str | tuple[int, tuple[int, int]]] = {
    "adamw": "-",
    "quotient-adam": "-",
    "soap": "--",
    "muon": "-.",
    "geoopt-adam": (0, (1, 1)),
}
FEW = 8
PANELS = ((0, "steps"), (1, "training seconds (without evaluations)"))


def plot(record: Record, path: Path) -> None:
    """Draw one line per optimizer at its best setting; nothing if no run finished."""
    rows = [row for row in summarize(record.runs, record.timings) if row.curve]
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (column, unit) in zip(panels, PANELS, strict=True):
        for row in rows:
            _line(axes, record, row, column)
        for row in rows:
            if row.optimizer == BASELINE:
                target = row.curve[-1][2]
                label = "AdamW's final loss"
                axes.axhline(target, color="0.4", linestyle=":", linewidth=1.3, label=label)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    protocol = record.protocol
    kind = MODEL_DEFAULTS[protocol.model].kind
    panels[0].set_ylabel(f"validation loss (nats per {kind.unit})")
    panels[0].set_ylim(*_limits(rows))
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    title = f"{protocol.model} on {Path(protocol.data).name}, each at its best setting"
    if any(row.seeds > 1 for row in rows):
        title += "; lines: means over seeds, bands: their range"
    figure.suptitle(title, fontsize=11)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())


def _line(axes: Any, record: Record, row: Row, column: int) -> None:
    name = row.optimizer
    color = COLORS.get(name, f"C{sum(name.encode()) % 10}")
    x = [point[column] for point in row.curve]
    label = f"{name} ({setting(row.rate, row.settings)}): {row.curve[-1][2]:.3f}"
    mean = [point[2] for point in row.curve]
    marker = "o" if len(x) <= FEW else None  # a single evaluation has no line
    style = STYLES.get(name, ":")
    axes.plot(x, mean, linestyle=style, color=color, label=label, marker=marker, markersize=4)
    curves = [
        timed_curve(run, record.timings.get(name))
        for run in best_runs(record.runs, name)
        if run.status == "finished"
    ]
    if len(curves) > 1:
        losses = [[point[2] for point in points] for points in zip(*curves, strict=True)]
        low, high = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _limits(rows: list[Row]) -> tuple[float, float]:
    """Limits that show the differences at the end rather than the fall of the first steps."""
    lowest = min(point[2] for row in rows for point in row.curve)
    # What every curve has reached after a sixth of the steps.
    highest = max(row.curve[len(row.curve) // 6][2] for row in rows)
    margin = 0.05 * max(highest - lowest, 0.1)
    return lowest - margin, highest + margin
