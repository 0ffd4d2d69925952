"""What a comparison shows: live progress, then compare.md (tables) and compare.png (curves).

In reading order: `make_progress`, bars on a terminal and plain lines elsewhere; `markdown`, the
tables; `plot`, validation loss against steps and against training seconds.
"""

import io
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from quotientopt._system import write_atomically
from quotientopt.compare.data import IMAGES, MODEL_DEFAULTS
from quotientopt.compare.protocol import Run, Trial
from quotientopt.compare.record import BASELINE, Record, Row, best_runs, summarize, timed_curve


class Progress(Protocol):
    """Told of every step and every run."""

    def step(self, trial: Trial, step: int, loss: float) -> None:
        """A training step was done."""

    def finished(self, run: Run, known: int, left: int) -> None:
        """A run ended, the `known`-th; `left` more are known to follow."""

    def say(self, text: str) -> None:
        """Print a line."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def make_progress(steps: int) -> Progress:
    """Bars if standard output is a terminal and rich is installed, else plain lines."""
    if sys.stdout.isatty():
        try:
            return RichProgress(steps)
        except ImportError:
            pass
    return PlainProgress(steps)


class PlainProgress:
    """A line at each quarter of a run and at its end."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._left = RemainingTime(steps)

    def step(self, trial: Trial, step: int, loss: float) -> None:
        """Print a line at every quarter but the last."""
        self._left.step()
        quarter = max(1, self._steps // 4)
        if step % quarter == 0 and step < self._steps:
            self.say(f"{trial}  step {step}/{self._steps}  training loss {loss:.4f}")

    def finished(self, run: Run, known: int, left: int) -> None:
        """Print the result and how long the known rest takes."""
        self.say(f"[{known}/{known + left}] {result_line(run)}  {self._left.text(left)}")

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to restore."""


class RichProgress:
    """A bar per run under way, with loss and remaining time, above a bar for all runs."""

    def __init__(self, steps: int) -> None:
        from rich import progress

        self._steps = steps
        self._left = RemainingTime(steps)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeRemainingColumn(),
        )
        self._tasks: dict[str, Any] = {}
        self._all = self._bars.add_task("all known runs", total=None, note="")
        self._bars.start()

    def step(self, trial: Trial, step: int, loss: float) -> None:
        """Move the run's bar."""
        self._left.step()
        name = str(trial)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=self._steps, note="")
        self._bars.update(self._tasks[name], completed=step, note=f"loss {loss:.4f}")

    def finished(self, run: Run, known: int, left: int) -> None:
        """Replace the run's bar by a line."""
        name = str(run.trial)
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        note = self._left.text(left)
        self._bars.update(self._all, completed=known, total=known + left, note=note)
        self.say(result_line(run))

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, highlight=False)

    def close(self) -> None:
        """Remove the bars."""
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)
        self._bars.stop()


class RemainingTime:
    """Estimate from the steps seen so far."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._begin = time.monotonic()
        self._done = 0

    def step(self) -> None:
        """Count a step."""
        self._done += 1

    def text(self, runs: int) -> str:
        """How long `runs` more runs take, at the rate so far."""
        elapsed = time.monotonic() - self._begin
        if runs == 0 or self._done == 0:
            return f"elapsed {elapsed:.0f} s"
        rest = runs * self._steps * elapsed / self._done
        return f"elapsed {elapsed:.0f} s, about {rest:.0f} s left"


def result_line(run: Run) -> str:
    """A run and what came out of it."""
    if run.final_loss is None:
        return f"{run.trial}: diverged after {len(run.training_losses)} steps"
    return f"{run.trial}: validation loss {run.final_loss:.4f}"


TABLE_NAME = "compare.md"
NONE = "–"


def markdown(record: Record) -> str:
    """The report on everything measured so far."""
    rows = summarize(record.runs, record.timings)
    return "\n\n".join(
        [
            "# Comparison of optimizers",
            _setup(record),
            "## Results",
            _results(rows) if rows else "No run was finished.",
            _remarks(rows, record),
            "## All runs",
            _runs(record.runs),
            "## Environment",
            _table(("", ""), record.environment.items()),
            "## Commands" if record.earlier_commands else "## Command",
            "```\n" + "\n".join([*record.earlier_commands, record.command]) + "\n```\n",
        ]
    )


def _setup(record: Record) -> str:
    protocol = record.protocol
    kind = MODEL_DEFAULTS[protocol.model].kind
    return (
        f"Model `{protocol.model}` ({protocol.layers} layers, width {protocol.width}), "
        f"{kind.name} `{protocol.data}`, {protocol.steps} steps of "
        f"{kind.step.format(**vars(protocol))}, warm-up {protocol.warmup} steps, cosine to "
        f"{protocol.final_fraction:.0%}, weight decay {protocol.weight_decay:g}, "
        f"{protocol.device} with {protocol.threads} thread(s) per run. Losses are in nats per "
        f"{kind.unit} on {protocol.validation_batches} fixed validation batches"
        + (", accuracies on all validation images." if kind == IMAGES else ".")
    )


def _results(rows: list[Row]) -> str:
    accuracy = ("final accuracy",) if _have_accuracy(rows) else ()
    header = (
        "optimizer",
        "best setting",
        "final validation loss",
        *accuracy,
        "steps to AdamW's loss",
        "seconds to AdamW's loss",
        "optimizer ms per step: mean (median)",
        "share of step",
        "state MB",
    )
    return _table(header, (_result(row, bool(accuracy)) for row in rows))


def _have_accuracy(rows: list[Row]) -> bool:
    return any(row.accuracy is not None for row in rows)


def _result(row: Row, with_accuracy: bool) -> tuple[str, ...]:
    seconds = row.timing.optimizer
    accuracy = NONE if row.accuracy is None else f"{row.accuracy:.2%}"
    return (
        row.optimizer,
        setting(row.rate, row.settings) + ("" if row.interior else " (edge)"),
        _loss(row),
        *((accuracy,) if with_accuracy else ()),
        _relative(row.steps_to_target, row.steps_fraction, 0),
        _relative(row.seconds_to_target, row.seconds_fraction, 1),
        f"{1e3 * seconds.mean:.2f} ({1e3 * seconds.median:.2f})",
        f"{row.share:.1%}",
        f"{row.state_bytes / 1e6:.1f}",
    )


def _loss(row: Row) -> str:
    text = "diverged" if row.loss is None else f"{row.loss:.4f}"
    if row.standard_error is not None:
        text += f" ± {row.standard_error:.4f}"
    if row.loss is not None and row.diverged:
        text += f" ({row.diverged} of {row.seeds} seeds diverged)"
    return text


def _relative(value: float | None, fraction: float | None, digits: int) -> str:
    if value is None or fraction is None:
        return NONE
    return f"{value:.{digits}f} ({fraction:.0%})"


def _remarks(rows: list[Row], record: Record) -> str:
    seeds = max((row.seeds for row in rows), default=0)
    remarks = [
        "Losses are means over seeds ± standard error of the mean."
        if seeds > 1
        else "One seed: small differences mean nothing.",
        "Steps and seconds to AdamW's loss: where the mean validation curve first reaches AdamW's "
        "final loss, in percent of AdamW's whole run; evaluations are not counted."
        if any(row.optimizer == BASELINE for row in rows)
        else "AdamW was not among the optimizers, so there is no loss to reach.",
        "Seconds come from steps timed with nothing else running."
        if record.timings
        else f"Seconds are the runs' own ({record.protocol.threads} thread(s) each).",
    ]
    if len({row.seeds for row in rows}) > 1:
        counts = ", ".join(f"{row.optimizer} {row.seeds}" for row in rows)
        remarks.append(
            f"Seeds: {counts}. Means over other seeds differ by more than their standard errors; "
            "compare seed by seed."
        )
    edge = [row.optimizer for row in rows if not row.interior]
    if edge:
        remarks.append(
            f"The best learning rate of {', '.join(edge)} lies on the edge of those tried; a "
            "better one may exist."
        )
    return "\n".join(f"- {remark}" for remark in remarks)


def _runs(runs: list[Run]) -> str:
    header = ("optimizer", "setting", "seed", "final validation loss", "training seconds")
    ordered = sorted(
        runs,
        key=lambda run: (
            run.trial.optimizer,
            sorted(run.trial.settings.items()),
            run.trial.seed,
            run.trial.rate,
        ),
    )
    return _table(
        header,
        (
            (
                run.trial.optimizer,
                setting(run.trial.rate, run.trial.settings),
                str(run.trial.seed),
                "diverged" if run.final_loss is None else f"{run.final_loss:.4f}",
                f"{run.curve[-1][1]:.1f}" if run.final_loss is not None else NONE,
            )
            for run in ordered
        ),
    )


def setting(rate: float, settings: dict[str, float]) -> str:
    """A learning rate and further settings in words."""
    parts = [f"lr {rate:g}", *(f"{name} {value:g}" for name, value in settings.items())]
    return ", ".join(parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


PLOT_NAME = "compare.png"
# Okabe and Ito's palette, distinguishable with colour-blindness; line styles tell apart in print.
COLORS = {
    "adamw": "#000000",
    "quotient-adam": "#D55E00",
    "soap": "#0072B2",
    "muon": "#009E73",
    "soap-muon": "#56B4E9",
    "quotient-adam-0.1": "#E69F00",
    "geoopt-adam": "#CC79A7",
    # Five of Tol's, which go with them.
    "quotient-adam-hidden": "#882255",
    "quotient-adam-leading": "#AA4499",
    "quotient-adam-small": "#999933",
    "quotient-adam-fresh": "#332288",
    "quotient-adam-full": "#117733",
}
STYLES: dict[str, str | tuple[int, tuple[int, ...]]] = {
    "adamw": "-",
    "quotient-adam": "-",
    "soap": "--",
    "muon": "-.",
    "soap-muon": "--",
    "quotient-adam-0.1": "-.",
    "geoopt-adam": (0, (1, 1)),
    "quotient-adam-leading": (0, (3, 1, 1, 1)),
    "quotient-adam-fresh": "--",
}
FEW = 8
LONG = 50  # characters of a label
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
    handles, labels = panels[0].get_legend_handles_labels()
    # Labels with three settings leave room for two in a line.
    columns = 3 if max(map(len, labels)) <= LONG else 2
    place: Any = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles, labels, fontsize=8, frameon=False, **place)
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
