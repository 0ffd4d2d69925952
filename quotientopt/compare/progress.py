"""Live progress: bars on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Protocol

from quotientopt.compare.trial import Run, Trial


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
