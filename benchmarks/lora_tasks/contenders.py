"""The optimizers of the adapters, as their packages make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_tasks.model import Adapted
from lora_tasks.protocol import LoraProtocol
from quotientopt.compare.protocol import require

Settings = Mapping[str, float]
LORAPLUS_RATIO = 16.0


@dataclass(frozen=True)
class Contender:
    """An optimizer of adapters.

    Attributes
    ----------
    name, label : str
        As in records and in reports.
    centre : float
        The learning rate around which tuning starts, at rank 8.
    build : callable
        ``build(encoder, rate, settings, protocol)`` returns the optimizer of a PEFT model.
    package : str
        It comes from.
    """

    name: str
    label: str
    centre: float
    build: Callable[[nn.Module, float, Settings, LoraProtocol], Optimizer]
    package: str


def pairs_of(encoder: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """A, (r, in), and B, (out, r), of every adapter."""
    for module in encoder.modules():
        for adapter, down in getattr(module, "lora_A", {}).items():
            yield down.weight, module.lora_B[adapter].weight


def optimizers_of(
    model: Adapted, contender: Contender, rate: float, settings: Settings, protocol: LoraProtocol
) -> list[Optimizer]:
    """The contender on the adapters, and AdamW on the head if that is trained."""
    made = [contender.build(model.encoder, rate, settings, protocol)]
    head = [p for p in model.head.parameters() if p.requires_grad]
    if head:
        made.append(torch.optim.AdamW(head, lr=protocol.head_rate, **_options(settings, protocol)))
    return made


def _options(settings: Settings, protocol: LoraProtocol) -> dict[str, Any]:
    betas = (settings.get("beta1", protocol.beta1), settings.get("beta2", protocol.beta2))
    return {"betas": betas, "weight_decay": protocol.weight_decay}


def _adamw(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    factors = [factor for pair in pairs_of(encoder) for factor in pair]
    return torch.optim.AdamW(factors, lr=rate, foreach=True, **_options(settings, protocol))


def _loraplus(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    options = _options(settings, protocol)
    return create_loraplus_optimizer(
        encoder,
        torch.optim.AdamW,
        lr=rate,
        loraplus_lr_ratio=LORAPLUS_RATIO,
        loraplus_weight_decay=options["weight_decay"],
        betas=options["betas"],
        foreach=True,
    )


def _riemannian(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(
        encoder,
        torch.optim.AdamW,
        lr=rate,
        foreach=True,
        **_options(settings, protocol),
    )


def _lora_rite(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    from pytorch_optimizer import LoRARite

    factors = [factor for pair in pairs_of(encoder) for factor in pair]
    optimizer: Any = LoRARite(factors, lr=rate, **_options(settings, protocol))
    return optimizer


def _muon(encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol) -> Optimizer:
    factors = [factor for pair in pairs_of(encoder) for factor in pair]
    return torch.optim.Muon(factors, lr=rate, weight_decay=protocol.weight_decay)


def _quotient_adam(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    from quotientopt import QuotientAdam
    from quotientopt.peft import create_quotient_optimizer

    switches = {name: bool(settings[name]) for name in ("polar", "nesterov") if name in settings}
    options = _options(settings, protocol) | switches
    return create_quotient_optimizer(encoder, QuotientAdam, lr=rate, **options)


def _quotient_adam_polar(
    encoder: nn.Module, rate: float, settings: Settings, protocol: LoraProtocol
) -> Optimizer:
    return _quotient_adam(encoder, rate, {"polar": 1.0} | dict(settings), protocol)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("adamw", "AdamW", 1e-3, _adamw, "torch"),
        Contender("loraplus", "LoRA+ (PEFT, ratio 16)", 1.25e-4, _loraplus, "peft"),
        Contender("riemannian", "riemannian (PEFT)", 1e-3, _riemannian, "peft"),
        Contender("lora-rite", "LoRA-RITE", 2.5e-4, _lora_rite, "pytorch_optimizer"),
        Contender("muon", "Muon", 5e-3, _muon, "torch"),
        Contender("quotient-adam", "QuotientAdam", 5e-4, _quotient_adam, "quotientopt"),
        Contender(
            "quotient-adam-polar",
            "QuotientAdam, lora_polar=True",
            5e-4,
            _quotient_adam_polar,
            "quotientopt",
        ),
    )
}


def available(contender: Contender) -> None:
    """Raise `UsageError` if the contender's package is not installed."""
    require(contender.package)
