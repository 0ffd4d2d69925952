"""The optimizers that are measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from quotientopt import QuotientAdam
from quotientopt.compare.baselines import Muon2, SOAPMuon
from quotientopt.compare.optimizers import BETAS
from quotientopt.compare.protocol import require
from step_timing.setting import PERIOD, Setting, SkippedError

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
