"""One file per question: everything measured, rewritten atomically after every run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.summary import summarise
from ablations.variants import QUESTIONS, VARIANTS
from quotientopt.compare.protocol import Protocol, Run, Trial, UsageError
from quotientopt.compare.record import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Conditions:
    """What two runs must share to be compared.

    Attributes
    ----------
    protocol : Protocol
    code : str
        See :func:`ablations.fingerprint.code_digest`.
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
