"""What was measured: its file, and the figures drawn from it.

In reading order: `Row` and `summarize`, an optimizer at its best setting; `Record`, compare.json,
rewritten atomically after every run.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quotientopt._system import write_atomically
from quotientopt.compare.protocol import Protocol, Run, Timing, Trial, UsageError, best_run
from quotientopt.compare.tuning import is_interior

BASELINE = "adamw"


@dataclass(frozen=True)
class Row:
    """An optimizer at its best setting.

    Attributes
    ----------
    optimizer : str
    rate : float
    settings : dict
    interior : bool
        Whether smaller and larger learning rates were tried with the same settings.
    seeds, diverged : int
        Runs at this setting, and how many of them diverged; the rest enter the means.
    loss, standard_error : float or None
        Final validation loss over seeds; the standard error needs two.
    accuracy : float or None
        Final accuracy over seeds, for images.
    curve : list of [step, seconds, loss]
        Mean over seeds.
    steps_to_target, seconds_to_target : float or None
        Where the mean curve first reaches AdamW's final loss; None if it does not.
    steps_fraction, seconds_fraction : float or None
        The same, relative to the whole of AdamW's runs.
    timing : Timing
    share : float
        The optimizer's share of a step.
    state_bytes : int
    """

    optimizer: str
    rate: float
    settings: dict[str, float]
    interior: bool
    seeds: int
    diverged: int
    loss: float | None
    standard_error: float | None
    accuracy: float | None
    curve: list[list[float]]
    steps_to_target: float | None
    seconds_to_target: float | None
    steps_fraction: float | None
    seconds_fraction: float | None
    timing: Timing
    share: float
    state_bytes: int


def crossing(curve: Sequence[Sequence[float]], target: float) -> tuple[float, float] | None:
    """Step and seconds at which a validation curve first reaches `target`.

    Parameters
    ----------
    curve : sequence of (step, seconds, loss)
    target : float

    Returns
    -------
    tuple of float, or None
        Linearly interpolated between the evaluations; the first evaluation if it is already
        there; None if none is, or a single one is below: nobody saw when it got there.
    """
    previous = None
    if len(curve) == 1 and curve[0][2] < target:
        return None
    for step, seconds, loss in curve:
        if loss <= target:
            if previous is None:
                return float(step), seconds
            fraction = (previous[2] - target) / (previous[2] - loss)
            return (
                previous[0] + fraction * (step - previous[0]),
                previous[1] + fraction * (seconds - previous[1]),
            )
        previous = (step, seconds, loss)
    return None


def best_runs(runs: list[Run], optimizer: str) -> list[Run]:
    """All seeds of an optimizer at the setting that was best on seed 0."""
    best = best_run(runs, optimizer)
    if best is None:
        return []
    setting = (optimizer, best.trial.rate, best.trial.settings)
    return [
        run for run in runs if (run.trial.optimizer, run.trial.rate, run.trial.settings) == setting
    ]


def timed_curve(run: Run, timing: Timing | None) -> list[list[float]]:
    """A run's curve, its seconds replaced by those of steps timed alone where there are any."""
    if timing is None:
        return run.curve
    return [[step, step * timing.step, loss] for step, _, loss in run.curve]


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Pointwise mean of curves evaluated at the same steps."""
    return [
        [statistics.fmean(column) for column in zip(*points, strict=True)]
        for points in zip(*curves, strict=True)
    ]


def optimizers_of(runs: list[Run]) -> list[str]:
    """Names of the optimizers that have tuning runs, in order of appearance."""
    return list(dict.fromkeys(run.trial.optimizer for run in runs if run.trial.seed == 0))


def summarize(runs: list[Run], timings: Mapping[str, Timing]) -> list[Row]:
    """One row per optimizer.

    Parameters
    ----------
    runs : list of Run
    timings : mapping of str to Timing
        Costs of a step timed alone, where there are any.
    """
    curves = {name: _curve(runs, name, timings.get(name)) for name in optimizers_of(runs)}
    baseline = curves.get(BASELINE)
    return [_row(runs, name, curve, baseline, timings.get(name)) for name, curve in curves.items()]


def _curve(runs: list[Run], name: str, timing: Timing | None) -> list[list[float]]:
    finished = [run for run in best_runs(runs, name) if run.status == "finished"]
    return mean_curve([timed_curve(run, timing) for run in finished])


def _row(
    runs: list[Run],
    name: str,
    curve: list[list[float]],
    baseline: list[list[float]] | None,
    timing: Timing | None,
) -> Row:
    best = best_runs(runs, name)
    trial = best[0].trial
    losses = [run.final_loss for run in best if run.final_loss is not None]
    accuracies = [run.final_accuracy for run in best if run.final_accuracy is not None]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    rates = [
        run.trial.rate
        for run in runs
        if (run.trial.optimizer, run.trial.settings) == (name, trial.settings)
    ]
    steps = seconds = steps_fraction = seconds_fraction = None
    if baseline:
        last_step, last_seconds, target = baseline[-1]
        reached = crossing(curve, target)
        if reached is not None:
            steps, seconds = reached
            steps_fraction, seconds_fraction = steps / last_step, seconds / last_seconds
    timing = timing or best[0].timing
    return Row(
        optimizer=name,
        rate=trial.rate,
        settings=trial.settings,
        interior=is_interior(trial.rate, rates),
        seeds=len(best),
        diverged=len(best) - len(losses),
        loss=statistics.fmean(losses) if losses else None,
        standard_error=error,
        accuracy=statistics.fmean(accuracies) if accuracies else None,
        curve=curve,
        steps_to_target=steps,
        seconds_to_target=seconds,
        steps_fraction=steps_fraction,
        seconds_fraction=seconds_fraction,
        timing=timing,
        share=timing.optimizer.mean / timing.step if timing.step else 0.0,
        state_bytes=best[0].state_bytes,
    )


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
    resumed : bool
        Whether there were any.
    """

    command: str
    protocol: Protocol
    environment: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)
    earlier_commands: list[str] = field(default_factory=list)
    resumed: bool = False

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
        self.resumed = bool(self.runs)
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
