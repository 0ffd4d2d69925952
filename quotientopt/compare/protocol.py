"""The set-up every optimizer of a comparison shares."""

import math
from dataclasses import dataclass


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
