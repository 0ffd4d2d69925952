"""compare.md: the comparison as tables."""

from collections.abc import Iterable, Sequence

from quotientopt.compare.defaults import MODEL_DEFAULTS
from quotientopt.compare.record import Record
from quotientopt.compare.summary import BASELINE, Row, summarize
from quotientopt.compare.task import IMAGES
from quotientopt.compare.trial import Run

FILE_NAME = "compare.md"
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
