"""compare.json: everything measured, rewritten atomically after every run."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quotientopt._files import write_atomically
from quotientopt.compare.errors import UsageError
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.summary import summarize
from quotientopt.compare.trial import Run, Timing, Trial

SCHEMA = 1
FILE_NAME = "compare.json"


@dataclass
class Record:
    """What a comparison has measured so far.

    Attributes
    ----------
    command : str
    protocol : Protocol
    environment : dict
    runs : list of Run
    timings : dict of str to Timing
        Cost of a step of each optimizer with nothing else running; empty until measured, and
        where runs were made one at a time, which makes their own timings good.
    earlier_commands : list of str
        Those that made the runs taken over by `resume`.
    """

    command: str
    protocol: Protocol
    environment: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)
    earlier_commands: list[str] = field(default_factory=list)

    def find(self, trial: Trial) -> Run | None:
        """The run of `trial`, if it was made."""
        return next((run for run in self.runs if run.trial == trial), None)

    def save(self, folder: Path) -> None:
        """Write compare.json in `folder`; a reader finds the old file or the new one, whole."""
        document = {
            "schema": SCHEMA,
            "command": self.command,
            "earlier_commands": self.earlier_commands,
            "protocol": asdict(self.protocol),
            "environment": self.environment,
            "summary": [asdict(row) for row in summarize(self.runs, self.timings)],
            "timings": {name: asdict(timing) for name, timing in self.timings.items()},
            "runs": [run.as_dict() for run in self.runs],
        }
        write_atomically(folder / FILE_NAME, json.dumps(document, indent=1, allow_nan=False))

    def resume(self, folder: Path, redo: Collection[str] = ()) -> None:
        """Take over the runs of an earlier comparison in `folder`, if there is one.

        Parameters
        ----------
        folder : Path
        redo : collection of str
            Optimizers whose runs are left out.

        Raises
        ------
        UsageError
            If the file there cannot be read or was made with another protocol.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            schema = document["schema"]
            protocol = document["protocol"]
            runs = [Run.from_dict(run) for run in document["runs"]] if schema == SCHEMA else []
            commands = [*document.get("earlier_commands", []), document["command"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"cannot resume from {path}: {type(error).__name__} {error}"
            ) from error
        if schema != SCHEMA:
            raise UsageError(f"cannot resume from {path}: its schema is {schema}, not {SCHEMA}")
        wanted = asdict(self.protocol)
        differences = [
            f"{name}={protocol.get(name)!r}, not {wanted.get(name)!r}"
            for name in wanted | protocol
            if protocol.get(name) != wanted.get(name)
        ]
        if differences:
            raise UsageError(
                f"cannot resume from {path}: it was made with {'; '.join(differences)}"
            )
        self.runs = [run for run in runs if run.trial.optimizer not in redo]
        # Each once: the same command may have gone on several times.
        self.earlier_commands = [c for c in dict.fromkeys(commands) if c != self.command]


def runs_in(folder: Path) -> int | None:
    """How many runs the comparison in `folder` has; None without one.

    Raises
    ------
    UsageError
        If the files of a comparison are there and are none.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if {"schema", "protocol"} <= document.keys():
            return len(document["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UsageError(f"{path} is no record of a comparison: move it, or choose another --out")


def prepare_folder(folder: Path) -> None:
    """Make sure files can be written in `folder`, before anything is trained.

    Raises
    ------
    UsageError
        If they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe."):
            pass
    except OSError as error:
        raise UsageError(f"cannot write in {str(folder)!r}: {error.strerror or error}") from error
