"""What is measured."""

from dataclasses import dataclass
from typing import NamedTuple

PERIOD = 10
TOKENS = 32768


class SkippedError(Exception):
    """An optimizer cannot do what is asked for; the message says why."""


class Shape(NamedTuple):
    """Size of a model."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


SHAPES = {
    "gpt": Shape(4, 128, 4, 256, 128),
    "gpt-256": Shape(4, 256, 8, 256, 128),
    "gpt-512": Shape(4, 512, 16, 256, 128),
    "gpt2-small": Shape(12, 768, 12, 50257, 1024),
}
# Sequences per micro-batch, and tokens of the iterations that are timed.
SIZES = {
    ("gpt", "cpu"): (16, 2048),
    ("gpt-256", "cpu"): (16, 2048),
    ("gpt-512", "cpu"): (16, 2048),
    ("gpt2-small", "cpu"): (1, 1024),
    ("gpt", "cuda"): (256, TOKENS),
    ("gpt-256", "cuda"): (256, TOKENS),
    ("gpt-512", "cuda"): (256, TOKENS),
    ("gpt2-small", "cuda"): (8, TOKENS),
}


@dataclass(frozen=True)
class Setting:
    """What is measured; rows of another setting stay in the record.

    Attributes
    ----------
    model, device, dtype : str
        The dtype is that of parameters and gradients.
    autocast : bool
        Forward pass in bfloat16 with float32 parameters.
    compiled : tuple of str
        ``"model"`` and ``"step"``: what torch.compile is applied to.
    capturable, syncs : bool
    threads, warmup, repeats : int
        CPU threads; steps before the first timed one; timed periods of ten steps.
    iterations, sequences, tokens : int
        Real iterations; sequences per micro-batch; tokens of one iteration.
    """

    model: str
    device: str
    dtype: str
    autocast: bool
    compiled: tuple[str, ...]
    capturable: bool
    syncs: bool
    threads: int
    warmup: int
    repeats: int
    iterations: int
    sequences: int
    tokens: int
