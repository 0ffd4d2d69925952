"""What `step_time.py` measures, and how.

In reading order: `Setting`, what is measured; the model and one training iteration of it;
`CONTENDERS`, the optimizers; seconds of steps and of iterations; memory, and how often the host
waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from quotientopt import QuotientAdam
from quotientopt.compare.baselines import Muon2, SOAPMuon
from quotientopt.compare.optimizers import BETAS
from quotientopt.compare.protocol import require
from quotientopt.models import reference_model

PERIOD = 10
# Steps after which QuotientAdam makes frames every `PERIOD` steps.
GROWN = 8 * PERIOD
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


def build_model(name: str) -> nn.Module:
    """The reference GPT, or Hugging Face's GPT-2 with random weights where it is installed."""
    shape = SHAPES[name]
    if name == "gpt2-small" and find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model: nn.Module = GPT2LMHeadModel(config)
        return model
    return reference_model("gpt", 0, **shape._asdict())


def make_batches(setting: Setting) -> list[Tensor]:
    """Micro-batches of random tokens with their targets, on the device."""
    shape = SHAPES[setting.model]
    count = setting.tokens // (setting.sequences * shape.context)
    size = (count, setting.sequences, shape.context + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, size, generator=generator)
    return list(tokens.to(setting.device).unbind())


def accumulate(model: Callable[[Tensor], Any], batches: Sequence[Tensor], setting: Setting) -> None:
    """Forward and backward pass over all micro-batches."""
    for batch in batches:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.autocast):
            outputs = model(batch[:, :-1])
            logits = getattr(outputs, "logits", outputs)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss / len(batches)).backward()


def set_gradients(model: nn.Module, scale: float = 1e-3) -> None:
    """Fixed random gradients."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter).mul_(scale)


# Small, so that hundreds of steps along one gradient leave the weights where they are.
RATE = 1e-5
WEIGHT_DECAY = 0.1


def adamw(model: nn.Module, **options: Any) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, **options)
    ]


def muon(model: nn.Module) -> list[Optimizer]:
    """torch's Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise SkippedError(f"needs torch 2.9 or later, this is torch {torch.__version__}")
    return beside_adamw(model, torch.optim.Muon)


def beside_adamw(model: nn.Module, make: Callable[..., Optimizer]) -> list[Optimizer]:
    """An optimizer for the matrices inside the blocks, AdamW for the rest."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and name.startswith(("blocks.", "transformer.h."))
        (inner if inside else outer).append(parameter)
    rest = torch.optim.AdamW(outer, lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    return [make(inner, lr=RATE, weight_decay=WEIGHT_DECAY), rest]


def soap(model: nn.Module) -> list[Optimizer]:
    require("pytorch_optimizer")
    from pytorch_optimizer import SOAP

    own: Any = SOAP(
        model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, precondition_frequency=PERIOD
    )
    return [own]


def quotient_adam(model: nn.Module, **options: Any) -> list[Optimizer]:
    own = QuotientAdam(
        model, lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, refresh_every=PERIOD, **options
    )
    return [own]


@dataclass(frozen=True)
class Contender:
    """An optimizer that is measured.

    Attributes
    ----------
    build : callable
        Takes the model and, where ``capturable`` is there, that option.
    refreshes : bool
        Whether one step in ten does more than the others.
    capturable, compilable : bool
        Whether it has the option, and whether torch.compile makes one piece of its step.
    """

    build: Callable[..., list[Optimizer]]
    refreshes: bool = False
    capturable: bool = False
    compilable: bool = False


def _quotient(**options: Any) -> Contender:
    build = functools.partial(quotient_adam, **options)
    return Contender(build, refreshes=True, capturable=True)


CONTENDERS = {
    "adamw-fused": Contender(functools.partial(adamw, fused=True), capturable=True),
    "adamw-foreach": Contender(
        functools.partial(adamw, foreach=True), capturable=True, compilable=True
    ),
    "muon": Contender(muon, compilable=True),
    "muon2": Contender(functools.partial(beside_adamw, make=Muon2)),
    "soap": Contender(soap, refreshes=True),
    "soap-muon": Contender(functools.partial(beside_adamw, make=SOAPMuon), refreshes=True),
    "quotient-adam-heads": _quotient(residual_frame=None),
    "quotient-adam": _quotient(),
    "quotient-adam-without-polar": _quotient(polar=False),
}


def build_optimizers(name: str, model: nn.Module, setting: Setting) -> list[Optimizer]:
    """The optimizers of a contender, or the reason why it cannot take part."""
    contender = CONTENDERS[name]
    if setting.capturable and not contender.capturable:
        raise SkippedError("has no option capturable")
    if "step" in setting.compiled and not contender.compilable:
        raise SkippedError("torch.compile does not make one piece of its step")
    try:
        return contender.build(model, **({"capturable": True} if setting.capturable else {}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise SkippedError(str(error)) from error


def time_laps(acts: Sequence[Callable[[], object]], count: int, device: str) -> list[list[float]]:
    """Seconds of each act, `count` times in turn: shape (count, len(acts)).

    On CUDA the times are those between events on the stream, and the host waits at the ends only.
    """
    in_turn = list(acts) * count
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(in_turn) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for act, event in zip(in_turn, events[1:], strict=True):
            act()
            event.record()
        torch.cuda.synchronize()
        laps = [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(events)]
    else:
        stamps = [time.perf_counter()]
        for act in in_turn:
            act()
            stamps.append(time.perf_counter())
        laps = [second - first for first, second in itertools.pairwise(stamps)]
    return [laps[i : i + len(acts)] for i in range(0, len(laps), len(acts))]


def grow_(optimizers: Iterable[Optimizer]) -> None:
    """Count `GROWN` steps more, where an optimizer makes frames more often while it is young."""
    for optimizer in optimizers:
        if isinstance(optimizer, QuotientAdam):
            saved = optimizer.state_dict()
            for own in saved["state"].values():
                own["step"] = own["step"] + GROWN
            optimizer.load_state_dict(saved)


def summarise_periods(periods: Sequence[Sequence[float]], refreshes: bool) -> dict[str, Any]:
    """Seconds of a step from laps of shape (repeats, PERIOD).

    The median leaves out what is done once a period, the mean over whole periods holds it. The
    slowest place of a period, by its median over the repeats, is where bases and frames are made
    afresh.
    """
    means = [statistics.fmean(period) for period in periods]
    by_place = [statistics.median(place) for place in zip(*periods, strict=True)]
    return {
        "median": statistics.median(itertools.chain.from_iterable(periods)),
        "mean": statistics.fmean(means),
        "refresh": max(by_place) if refreshes else None,
        "spread of means": {
            "smallest": min(means),
            "largest": max(means),
            "standard deviation": statistics.stdev(means) if len(means) > 1 else None,
        },
        "periods": [list(period) for period in periods],
    }


def summarise_iterations(laps: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """Share of the optimizer in an iteration of 32k tokens, from laps (model, optimizer).

    With fewer tokens the seconds of the model are scaled up in proportion, and ``extrapolated``
    says so.
    """
    model = statistics.fmean(lap[0] for lap in laps)
    optimizer = statistics.fmean(lap[1] for lap in laps)
    scaled = model * TOKENS / tokens
    return {
        "iterations": len(laps),
        "measured tokens": tokens,
        "tokens": TOKENS,
        "extrapolated": tokens != TOKENS,
        "model seconds as measured": model,
        "model seconds": scaled,
        "optimizer seconds": optimizer,
        "share": optimizer / (optimizer + scaled),
    }


SYNCHRONISED = "called a synchronizing CUDA operation"


def used_bytes(device: str, *, peak: bool = False) -> int | None:
    """Allocated bytes on CUDA, resident ones of the process on Linux; now or at their peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return 1024 * int(sizes["VmHWM" if peak else "VmRSS"].split()[0])
    return None


def reset_peak(device: str) -> None:
    """Let the peak start from what is used now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def count_synchronisations(act: Callable[[], object]) -> int:
    """How often `act` makes the host wait for the device, as far as torch can tell."""
    with warnings.catch_warnings(record=True) as caught, sync_mode("warn"):
        warnings.simplefilter("always")
        act()
    return sum(SYNCHRONISED in str(warning.message) for warning in caught)


@contextlib.contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Set torch's synchronisation debug mode, and the default one afterwards."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_synchronisations(act: Callable[[], object], refreshes: bool) -> dict[str, Any]:
    """Counts over a period, then a period in which synchronising is an error.

    The step with the most synchronisations is taken for the one that makes frames afresh, and is
    left out of the second period. Nothing is left out where all counts are equal.
    """
    counts = [count_synchronisations(act) for _ in range(PERIOD)]
    refresh = counts.index(max(counts)) if refreshes and len(set(counts)) > 1 else None
    refused = 0
    for place in range(PERIOD):
        with sync_mode("default" if place == refresh else "error"):
            try:
                act()
            except RuntimeError as error:
                if SYNCHRONISED not in str(error):
                    raise
                refused += 1
    return {
        "per step": counts,
        "refresh step": refresh,
        "steps refused in error mode": refused,
        "steps in error mode": PERIOD - (refresh is not None),
    }
