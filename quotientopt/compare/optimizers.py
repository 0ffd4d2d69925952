"""The optimizers that can be compared, with their settings and where their tuning starts."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quotientopt.compare.errors import UsageError, require
from quotientopt.compare.protocol import Protocol

Settings = Mapping[str, float]
Build = Callable[[nn.Module, float, Settings, Protocol], list[torch.optim.Optimizer]]

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Entry:
    """An optimizer as the comparison sees it.

    Attributes
    ----------
    name : str
    build : callable
        ``build(model, rate, settings, protocol)`` returns the torch optimizers to step in turn.
    centres : mapping of str to float
        Per model, the learning rate around which tuning starts.
    settings_grid : tuple of mappings
        Further settings to tune; the learning rate is tuned for each of them.
    check : callable
        Raises `UsageError` if the optimizer is not available here.
    """

    name: str
    build: Build
    centres: Mapping[str, float]
    settings_grid: tuple[Settings, ...] = ({},)
    check: Callable[[], None] = lambda: None


def _adamw(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    betas = (BETAS[0], settings["beta2"])
    return [_fused_adamw(list(model.parameters()), rate, betas, protocol)]


def _fused_adamw(
    parameters: list[nn.Parameter], rate: float, betas: tuple[float, float], protocol: Protocol
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=rate, betas=betas, weight_decay=protocol.weight_decay, fused=True
    )


def _muon(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and name.startswith("blocks.")
        (matrices if inner else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=protocol.weight_decay)
    return [muon, _fused_adamw(others, settings["adamw_rate"], BETAS, protocol)]


def _check_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"muon needs torch 2.9 or later, this is torch {torch.__version__}")


def _soap(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    soap: Any = SOAP(
        model.parameters(),
        lr=rate,
        weight_decay=protocol.weight_decay,
        precondition_frequency=10,
    )
    return [soap]


def _quotient_adam(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from quotientopt import QuotientAdam

    return [QuotientAdam(model, lr=rate, betas=BETAS, weight_decay=protocol.weight_decay)]


def _geoopt_adam(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from quotientopt import find_symmetries
    from quotientopt.compare.geoopt_pairs import PairsRiemannianAdam

    heads = find_symmetries(model).heads
    pairs = PairsRiemannianAdam(heads, rate, betas=BETAS, weight_decay=protocol.weight_decay)
    covered = {id(parameter) for parameter in pairs.parameters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in covered]
    return [pairs, _fused_adamw(others, settings["adamw_rate"], BETAS, protocol)]


def _check_geoopt() -> None:
    try:
        importlib.import_module("quotientopt.geoopt")
    except ModuleNotFoundError as error:
        raise UsageError(
            f'geoopt-adam: {error.name} is not installed: pip install "quotientopt[geoopt]"'
        ) from error


OPTIMIZERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "adamw",
            _adamw,
            {"gpt": 4e-3, "llama": 4e-3, "vit": 4e-3},
            ({"beta2": 0.95}, {"beta2": 0.98}, {"beta2": 0.99}),
        ),
        Entry("quotient-adam", _quotient_adam, {"gpt": 8e-3, "llama": 8e-3, "vit": 8e-3}),
        Entry(
            "soap",
            _soap,
            {"gpt": 1.2e-2, "llama": 8e-3, "vit": 8e-3},
            check=lambda: require("pytorch_optimizer"),
        ),
        Entry(
            "muon",
            _muon,
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ({"adamw_rate": 8e-3}, {"adamw_rate": 4e-3}, {"adamw_rate": 1.6e-2}),
            check=_check_muon,
        ),
        Entry(
            "geoopt-adam",
            _geoopt_adam,
            {"gpt": 2e-2, "llama": 5e-3, "vit": 1e-1},
            ({"adamw_rate": 4e-3}, {"adamw_rate": 8e-3}, {"adamw_rate": 2e-3}),
            check=_check_geoopt,
        ),
    )
}


DEFAULT_OPTIMIZERS = "adamw,quotient-adam,soap,muon"


def find_optimizers(names: str) -> list[Entry]:
    """Entries for a comma-separated list of names, each available and named once.

    Raises
    ------
    UsageError
        For an unknown, repeated or unavailable optimizer, or none at all.
    """
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in OPTIMIZERS:
            raise UsageError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
        if wanted.count(name) > 1:
            raise UsageError(f"optimizer {name!r} is named twice")
    entries = [OPTIMIZERS[name] for name in wanted]
    for entry in entries:
        entry.check()
    return entries
