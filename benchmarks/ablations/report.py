"""README.md and ablation.png: all questions as tables and as one plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiment import png

from ablations.record import Record
from ablations.summary import Row, summarise
from ablations.variants import QUESTIONS
from quotientopt.compare.data import MODEL_DEFAULTS
from quotientopt.compare.protocol import UsageError
from quotientopt.compare.record import write_atomically

TABLE, PLOT = "README.md", "ablation.png"
NONE = "–"
DEFAULT_COLOR, OTHER_COLOR = "#D55E00", "#0072B2"


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write table and plot of all questions that have runs.

    Raises
    ------
    UsageError
        If there are none, or they were made under different protocols.
    """
    records = [record for record in records if record.runs]
    if not records:
        raise UsageError(f"no runs in {folder}")
    for record in records[1:]:
        if record.conditions.protocol != records[0].conditions.protocol:
            raise UsageError(
                f"{records[0].question} and {record.question} were made under different "
                "protocols; report them from different folders (--out)"
            )
    tables = {record.question: summarise(record.question, record.runs) for record in records}
    write_atomically(folder / TABLE, markdown(records, tables))
    write_atomically(folder / PLOT, plot(records, tables))
    return [folder / TABLE, folder / PLOT]


def markdown(records: Sequence[Record], tables: dict[str, list[Row]]) -> str:
    """All questions as tables."""
    parts = ["# Ablations of QuotientAdam", _setting(records[0]), f"![Final losses]({PLOT})"]
    for record in records:
        parts += [f"## {QUESTIONS[record.question].title}", _table_of(tables[record.question])]
    parts += ["## Reading the tables", _remarks(records, tables)]
    parts += ["## Environment", _table(("", ""), records[0].environment.items())]
    commands = dict.fromkeys(command for record in records for command in record.commands)
    parts += ["## Commands", "```\n" + "\n".join(commands) + "\n```\n"]
    return "\n\n".join(parts)


def _setting(record: Record) -> str:
    protocol = record.conditions.protocol
    kind = MODEL_DEFAULTS[protocol.model].kind
    return (
        f"Model `{protocol.model}` ({protocol.layers} layers, width {protocol.width}), "
        f"{kind.name} `{Path(protocol.data).name}`, {protocol.steps} steps of "
        f"{kind.step.format(**vars(protocol))}, otherwise as in `quotientopt compare`. "
        f"Losses are in nats per {kind.unit} after the last step."
    )


def _table_of(rows: Sequence[Row]) -> str:
    header = (
        "",
        "learning rate (tried)",
        "seeds",
        "final validation loss",
        "minus default's",
        "optimizer ms per step",
    )
    return _table(header, map(_cells, rows))


def _cells(row: Row) -> tuple[str, ...]:
    rates = f"{row.rate:g}"
    if len(row.rates) > 1:
        rates += f" ({', '.join(f'{rate:g}' for rate in row.rates)})"
    loss = "diverged" if row.loss is None else _with_error(row.loss, row.standard_error, "")
    if row.loss is not None and row.diverged:
        loss += f" ({row.diverged} diverged)"
    difference = NONE
    if row.difference is not None:
        difference = _with_error(row.difference, row.difference_error, "+")
    return (
        f"**{row.label}** (default)" if row.default else row.label,
        rates,
        str(row.seeds),
        loss,
        difference,
        NONE if row.milliseconds is None else f"{row.milliseconds:.1f}",
    )


def _with_error(value: float, error: float | None, sign: str) -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _remarks(records: Sequence[Record], tables: dict[str, list[Row]]) -> str:
    seeds = {row.seeds for rows in tables.values() for row in rows}
    remarks = [
        "Each variant runs at the learning rate given, or, of several, at the one that was best "
        "on seed 0."
    ]
    if seeds != {1}:
        remarks.append(
            "Losses are means over seeds ± standard error. Seeds share weights and batches with "
            "the default's, so the differences, taken seed by seed, are sharper than the losses."
        )
    if 1 in seeds:
        remarks.append("With one seed, small differences mean nothing.")
    remarks.append(
        "Times are means of runs side by side on a shared machine; none are given where the "
        "variant is a patch, whose time is not that of a proper implementation."
    )
    codes = {tuple(record.codes) for record in records}
    if len(codes) > 1 or any(len(code) > 1 for code in codes):
        remarks.append(
            "The runs were not all made with the same code: the files tell the versions."
        )
    return "\n".join(f"- {remark}" for remark in remarks)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def plot(records: Sequence[Record], tables: dict[str, list[Row]]) -> bytes:
    """A dot per variant with its standard error, grouped by question, as a PNG."""
    from matplotlib.figure import Figure

    lines = sum(len(rows) + 2 for rows in tables.values())
    figure = Figure(figsize=(9, 0.9 + 0.23 * lines), layout="constrained")
    axes = figure.subplots()
    ticks: list[tuple[float, str]] = []
    height = 0.0
    for question, rows in tables.items():
        title = QUESTIONS[question].title
        axes.text(0.01, height, title, weight="bold", va="center", transform=_across(axes))
        start, height = height, height + 1
        for row in rows:
            ticks.append((height, row.label))
            _dot(axes, row, height)
            height += 1
        default = next((row.loss for row in rows if row.default), None)
        if default is not None:
            axes.vlines(default, start + 0.5, height - 0.5, color=DEFAULT_COLOR, ls=":", lw=1)
        height += 1
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(height - 1, -1)
    axes.grid(axis="x", alpha=0.25)
    protocol = records[0].conditions.protocol
    kind = MODEL_DEFAULTS[protocol.model].kind
    axes.set_xlabel(f"final validation loss (nats per {kind.unit})")
    figure.suptitle(
        f"{protocol.model} on {Path(protocol.data).name}, {protocol.steps} steps; "
        "mean ± standard error, default filled"
    )
    return png(figure)


def _across(axes: Any) -> Any:
    """Coordinates for titles: a fraction of the width, and a line."""
    return axes.get_yaxis_transform()


def _dot(axes: Any, row: Row, height: float) -> None:
    color = DEFAULT_COLOR if row.default else OTHER_COLOR
    if row.loss is None:
        axes.text(0.5, height, "diverged", color=color, va="center", transform=_across(axes))
        return
    axes.errorbar(
        row.loss,
        height,
        xerr=row.standard_error,
        fmt="o",
        color=color,
        markerfacecolor=color if row.default else "white",
        capsize=3,
    )
