"""Records of `ablation.py`, one file per question, and the report on all of them.

In reading order: `code_digest`, a fingerprint of the code that a result depends on; `Record`,
everything measured, rewritten atomically after every run; `write_report`, README.md and
ablation.png.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ablation_variants import QUESTIONS, VARIANTS, Row, summarise
from experiment import markdown_table, png

import quotientopt
from quotientopt.compare.data import MODEL_DEFAULTS
from quotientopt.compare.protocol import Protocol, Run, Trial, UsageError
from quotientopt.compare.record import write_atomically
from quotientopt.compare.tuning import is_interior

PACKAGE = "quotientopt"
# What is trained and by what; the patches are beside this file.
ROOTS = ("quotientopt.optim.quotient_adam", "quotientopt.models")
OWN = ("ablation_patches.py",)


def code_digest() -> str:
    """Short hash of the optimizer, the models, all they import, and the patches.

    Comments, docstrings and layout do not count.
    """
    here = Path(__file__).parent
    files = [*modules_behind(ROOTS).values(), *(here / name for name in OWN)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(_bare(path).encode())
    return digest.hexdigest()[:16]


def modules_behind(names: Iterable[str]) -> dict[str, Path]:
    """Modules of quotientopt and all of its modules that they import, with their files."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found or name == PACKAGE:
            continue
        found[name] = path
        waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return found


def _file_of(name: str) -> Path | None:
    """The file of a module of quotientopt; None for everything else."""
    first, *parts = name.split(".")
    if first != PACKAGE:
        return None
    path = Path(quotientopt.__file__).parent.joinpath(*parts)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _bare(path: Path) -> str:
    """The code in `path` without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


SCHEMA = 1


@dataclass(frozen=True)
class Conditions:
    """What two runs must share to be compared.

    Attributes
    ----------
    protocol : Protocol
    code : str
        See :func:`ablation_records.code_digest`.
    """

    protocol: Protocol
    code: str

    def differences(self, other: Conditions) -> list[str]:
        """What `other` has instead, one phrase each."""
        mine, theirs = (asdict(c.protocol) | {"code": c.code} for c in (self, other))
        return [
            f"{name}={theirs[name]!r}, not {mine[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass
class Record:
    """What is known about a question.

    Attributes
    ----------
    question : str
    conditions : Conditions
    environment : dict
    runs : list of Run
        Without the losses of every training step.
    commands : list of str
        Those that made the runs.
    codes : list of str
        Of the runs; several if they were kept across a change of the code.
    """

    question: str
    conditions: Conditions
    environment: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def find(self, trial: Trial) -> Run | None:
        """The run of `trial`, if it was made."""
        return next((run for run in self.runs if run.trial == trial), None)

    def add(self, run: Run) -> None:
        """Take a run of one of the question's variants, unless it is there already."""
        if self.asks_about(run) and self.find(run.trial) is None:
            self.runs.append(replace(run, training_losses=[]))

    def asks_about(self, run: Run) -> bool:
        """Whether `run` is of one of the question's variants."""
        names = {variant.name for variant in QUESTIONS[self.question].variants.values()}
        return run.trial.optimizer in names

    def save(self, folder: Path) -> None:
        """Write ``<question>.json``; a reader finds the old file or the new one, whole."""
        question = QUESTIONS[self.question]
        document = {
            "schema": SCHEMA,
            "question": self.question,
            "title": question.title,
            "commands": self.commands,
            "protocol": asdict(self.conditions.protocol),
            "code": self.codes,
            "environment": self.environment,
            "variants": {
                label: {"name": variant.name} | variant.describe()
                for label, variant in question.variants.items()
            },
            "summary": [asdict(row) for row in summarise(self.question, self.runs)],
            "runs": [run.as_dict() for run in self.runs],
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        write_atomically(path_of(folder, self.question), text)


def path_of(folder: Path, question: str) -> Path:
    """Where a question's record is kept."""
    return folder / f"{question}.json"


def load(folder: Path, question: str) -> Record | None:
    """The record of a question, None if there is none.

    Raises
    ------
    UsageError
        If the file cannot be read, or its variants are no longer what they were.
    """
    path = path_of(folder, question)
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema, codes = document["schema"], list(document["code"])
        described = {v["name"]: v for v in document["variants"].values()}
        record = Record(
            question,
            Conditions(Protocol(**document["protocol"]), codes[-1]),
            document["environment"],
            [Run.from_dict(run) for run in document["runs"]],
            list(document["commands"]),
            codes,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"cannot read {path}: {type(error).__name__} {error}") from error
    if schema != SCHEMA:
        raise UsageError(f"cannot read {path}: its schema is {schema}, not {SCHEMA}")
    for name in {run.trial.optimizer for run in record.runs}:
        now = {"name": name} | VARIANTS[name].describe() if name in VARIANTS else None
        if json.loads(json.dumps(now)) != described.get(name):
            raise UsageError(
                f"{path} holds runs of {name!r}, which has changed since; --redo makes them anew"
            )
    return record


def load_all(folder: Path, questions: Iterable[str] = tuple(QUESTIONS)) -> list[Record]:
    """The records of those `questions` that have one."""
    found = (load(folder, question) for question in questions)
    return [record for record in found if record is not None]


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
    parts += ["## Environment", markdown_table(("", ""), records[0].environment.items())]
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
    return markdown_table(header, map(_cells, rows))


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
    edges = [
        f"{QUESTIONS[question].title}: {row.label}"
        for question, rows in tables.items()
        for row in rows
        if len(row.rates) > 1 and not is_interior(row.rate, row.rates)
    ]
    if edges:
        remarks.append(
            f"The best rate lies on the edge of those tried, and a better one may exist: "
            f"{'; '.join(edges)}."
        )
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
