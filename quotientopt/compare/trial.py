"""One training run: what is asked for (`Trial`) and what came out of it (`Run`)."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trial:
    """An optimizer at one learning rate, with one set of settings, from one seed."""

    optimizer: str
    rate: float
    settings: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        settings = "".join(f" {name}={value:g}" for name, value in self.settings.items())
        return f"{self.optimizer} lr={self.rate:g}{settings} seed={self.seed}"


@dataclass(frozen=True)
class Seconds:
    """Seconds per step: the median, and the mean, which includes what happens every few steps."""

    median: float
    mean: float


@dataclass(frozen=True)
class Timing:
    """Cost of a step, in optimizer (without zero_grad) and in forward and backward pass."""

    optimizer: Seconds
    model: Seconds

    @property
    def step(self) -> float:
        """Mean seconds of a whole step."""
        return self.optimizer.mean + self.model.mean

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Timing":
        """Inverse of `dataclasses.asdict`."""
        return cls(Seconds(**values["optimizer"]), Seconds(**values["model"]))


@dataclass(frozen=True)
class Run:
    """Everything measured in one run.

    Attributes
    ----------
    trial : Trial
    status : {"finished", "diverged"}
        Diverged: a loss was not finite, or the optimizer's linear algebra failed on one.
    final_loss : float or None
        Validation loss after the last step; None if diverged.
    curve : list of [step, seconds, loss]
        Validation losses; the seconds are those spent training, without the evaluations.
    training_losses : list of float
        One per step, up to the first that is not finite.
    timing : Timing
    state_bytes : int
        Size of the optimizer's state.
    parameters : int
    hyperparameters : dict
        What each torch optimizer was built with.
    final_accuracy : float or None
        Fraction of all validation images classified rightly after the last step; None for texts.
    """

    trial: Trial
    status: str
    final_loss: float | None
    curve: list[list[float]]
    training_losses: list[float]
    timing: Timing
    state_bytes: int
    parameters: int
    hyperparameters: dict[str, dict[str, Any]]
    final_accuracy: float | None = None

    @property
    def score(self) -> float:
        """Final validation loss, infinite if the run diverged."""
        return math.inf if self.final_loss is None else self.final_loss

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Run":
        """Inverse of `as_dict`."""
        parts = {"trial": Trial(**values["trial"]), "timing": Timing.from_dict(values["timing"])}
        return cls(**(values | parts))


def best_run(runs: list[Run], optimizer: str) -> Run | None:
    """The best of an optimizer's tuning runs (those of seed 0); None before the first."""
    tuning = [run for run in runs if run.trial.optimizer == optimizer and run.trial.seed == 0]
    return min(tuning, key=lambda run: run.score, default=None)
