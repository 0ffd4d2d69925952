"""What is asked for and what comes out, before anything is trained.

In reading order: `UsageError` and `RunFailedError`, what a user is told in one line; `Protocol`,
the set-up every optimizer of a comparison shares; `Trial` and `Run`, one training run and what was
measured in it; `describe_environment`, what it ran on.
"""

import importlib
import importlib.metadata
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quotientopt._system import install_command
from quotientopt._version import __version__


class UsageError(ValueError):
    """A request that cannot be carried out; its message is one line that says why."""


class RunFailedError(RuntimeError):
    """A run that could not be finished, for reasons outside the request; one line that says why."""


def require(package: str) -> None:
    """Refuse if the optional `package` cannot be imported, naming the command that installs it."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{package} is not installed: {install_command(package)}") from error


@dataclass(frozen=True)
class Protocol:
    """What is trained, on what, for how long.

    Attributes
    ----------
    model, data : str
        Names of the reference model and of the data.
    data_digest : str
        Hash of the data, since the standard library varies with the Python version.
    device : str
    threads : int
        CPU threads of one run.
    steps, batch, context : int
        Steps, sequences (or images) per step and tokens (or patches) of each.
    layers, width : int
        Size of the model.
    longest_warmup : int
        Steps of linear warm-up; a tenth of short runs.
    final_fraction : float
        Where the cosine decay of the learning rate ends, relative to its peak.
    weight_decay : float
        Decoupled, on all parameters.
    evaluate_every, validation_batches : int
        Steps between validations, and batches of each.
    """

    model: str = "gpt"
    data: str = "stdlib"
    data_digest: str = ""
    device: str = "cpu"
    threads: int = 1
    steps: int = 600
    batch: int = 16
    context: int = 128
    layers: int = 4
    width: int = 128
    longest_warmup: int = 50
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    evaluate_every: int = 25
    validation_batches: int = 12

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return max(1, min(self.longest_warmup, self.steps // 10))

    def schedule(self, step: int) -> float:
        """Fraction of the peak learning rate at `step`, counted from 0: warm-up, then cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step + 1 - self.warmup) / max(1, self.steps - self.warmup))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation loss is taken after `step`, counted from 0."""
        return (step + 1) % self.evaluate_every == 0 or step + 1 == self.steps


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


PACKAGES = ("torch", "pytorch_optimizer", "geoopt", "numpy", "matplotlib")


def describe_environment(device: str) -> dict[str, Any]:
    """Processor, cores, device and versions."""
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "quotientopt": __version__,
        **versions,
    }


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
