"""The optimizers that can be compared, with their settings and where their tuning starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quotientopt._system import install_command
from quotientopt.compare.protocol import Protocol, UsageError, require

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
    decays : tuple of float
        Weight decays to try at the best of these, other than the protocol's.
    check : callable
        Raises `UsageError` if the optimizer is not available here.
    """

    name: str
    build: Build
    centres: Mapping[str, float]
    settings_grid: tuple[Settings, ...] = ({},)
    decays: tuple[float, ...] = (0.03, 0.3)
    check: Callable[[], None] = lambda: None


def decay_of(settings: Settings, protocol: Protocol) -> float:
    """Weight decay of a trial: its own, where it is being tuned, else the protocol's."""
    return settings.get("weight_decay", protocol.weight_decay)


def _adamw(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    betas = (BETAS[0], settings["beta2"])
    decay = decay_of(settings, protocol)
    return [_fused_adamw(list(model.parameters()), rate, betas, decay)]


def _fused_adamw(
    parameters: list[nn.Parameter], rate: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)


def split_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices that Muon and its kin train, and all other parameters.

    The former are those inside the blocks and the linear map of patches, whose gradients are dense.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and name.startswith(("blocks.", "patches."))
        (matrices if inner else others).append(parameter)
    return matrices, others


MakeForMatrices = Callable[[nn.Module, list[nn.Parameter], float, float], torch.optim.Optimizer]


def _beside_adamw(make: MakeForMatrices) -> Build:
    """``make(model, matrices, rate, weight decay)`` on the matrices, AdamW on the others."""

    def build(
        model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        matrices, others = split_matrices(model)
        decay = decay_of(settings, protocol)
        optimizer = make(model, matrices, rate, decay)
        return [optimizer, _fused_adamw(others, settings["adamw_rate"], BETAS, decay)]

    return build


def _muon(
    model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices, lr=rate, weight_decay=decay)


def _check_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"muon needs torch 2.9 or later, this is torch {torch.__version__}")


def _dressed_muon(
    model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    from quotientopt import dress_
    from quotientopt.compare.baselines import Muon

    dress_(model, "balanced")
    return Muon(matrices, rate, decay)


def _compositional_muon(
    model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    from quotientopt import find_symmetries
    from quotientopt.compare.compositional_muon import CompositionalMuon

    heads = find_symmetries(model).heads
    return CompositionalMuon(matrices, heads, rate, weight_decay=decay)


def _muon2(
    model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    from quotientopt.compare.baselines import Muon2

    return Muon2(matrices, rate, decay)


def _soap_muon(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from quotientopt.compare.baselines import SOAPMuon

    options: dict[str, Any] = {"young": bool(settings.get("young", False))}
    if settings.get("every") == FRESH_BASES["every"]:
        options |= FRESH_BASES

    def make(
        model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
    ) -> torch.optim.Optimizer:
        return SOAPMuon(matrices, rate, decay, betas=BETAS, **options)

    return _beside_adamw(make)(model, rate, settings, protocol)


def _normuon(
    model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
) -> torch.optim.Optimizer:
    from pytorch_optimizer import NorMuon

    group = {"params": matrices, "use_muon": True, "lr": rate, "weight_decay": decay}
    normuon: Any = NorMuon([group])
    return normuon


def _adamuon(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from quotientopt.compare.baselines import AdaMuon

    def make(
        model: nn.Module, matrices: list[nn.Parameter], rate: float, decay: float
    ) -> torch.optim.Optimizer:
        return AdaMuon(matrices, rate, decay, signs=bool(settings["signs"]))

    return _beside_adamw(make)(model, rate, settings, protocol)


def _soap(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    soap: Any = SOAP(
        model.parameters(),
        lr=rate,
        weight_decay=decay_of(settings, protocol),
        precondition_frequency=10,
    )
    return [soap]


def _kl_soap(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    import heavyball

    # Compiling takes minutes and, on matrices of this size, gains nothing.
    heavyball.utils.compile_mode = None
    kl_soap: Any = heavyball.KLSOAP(
        model.parameters(),
        lr=rate,
        betas=(0.95, 0.95),
        weight_decay=decay_of(settings, protocol),
        precondition_frequency=10,
        merge_dims=False,
    )
    return [kl_soap]


def _check_kl_soap() -> None:
    try:
        importlib.import_module("heavyball")
    except ImportError as error:
        raise UsageError(
            f"kl-soap: heavyball is not installed: {install_command('heavyball')}"
        ) from error


def _quotient_adam(**options: Any) -> Build:
    """QuotientAdam with some of its parts left out."""

    def build(
        model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        from quotientopt import QuotientAdam

        decay = decay_of(settings, protocol)
        own = dict(options)
        if "embedding_scale" in settings:
            own["embedding_scale"] = settings["embedding_scale"]
        return [QuotientAdam(model, lr=rate, betas=BETAS, weight_decay=decay, **own)]

    return build


def _geoopt_adam(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    from quotientopt import find_symmetries
    from quotientopt.compare.geoopt_pairs import PairsRiemannianAdam

    heads, decay = find_symmetries(model).heads, decay_of(settings, protocol)
    pairs = PairsRiemannianAdam(heads, rate, betas=BETAS, weight_decay=decay)
    covered = {id(parameter) for parameter in pairs.parameters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in covered]
    return [pairs, _fused_adamw(others, settings["adamw_rate"], BETAS, decay)]


def _check_geoopt() -> None:
    try:
        importlib.import_module("quotientopt.geoopt")
    except ModuleNotFoundError as error:
        package = error.name or "geoopt"
        raise UsageError(
            f"geoopt-adam: {package} is not installed: {install_command(package)}"
        ) from error


# AdamW's learning rate beside Muon and its kin.
ADAMW_RATES: tuple[Settings, ...] = (
    {"adamw_rate": 8e-3},
    {"adamw_rate": 4e-3},
    {"adamw_rate": 1.6e-2},
)

# Of SOAP-Muon: bases twice as often as by default, from covariances of all gradients of late.
FRESH_BASES = {"every": 5, "covariance_every": 1, "covariance_beta": 0.8}

# The same of QuotientAdam, relative to its other matrices: the default first.
EMBEDDING_SCALES: tuple[Settings, ...] = (
    {"embedding_scale": 2.0},
    {"embedding_scale": 1.0},
    {"embedding_scale": 0.5},
)

QUOTIENT_RATES = {"gpt": 4e-3, "llama": 2e-3, "vit": 4e-3}

# Defaults of QuotientAdam in version 0.1.0, with which earlier records were made.
FIRST_EDITION = {
    "row_frame": "per_head",
    "polar": "step",
    "update_scale": 1.0,
    "embedding_frame": "per_matrix",
}

OPTIMIZERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "adamw",
            _adamw,
            {"gpt": 4e-3, "llama": 4e-3, "vit": 4e-3},
            ({"beta2": 0.95}, {"beta2": 0.98}, {"beta2": 0.99}),
        ),
        Entry("quotient-adam", _quotient_adam(), QUOTIENT_RATES, EMBEDDING_SCALES),
        Entry(
            "quotient-adam-leading",
            _quotient_adam(hidden_frame="leading", embedding_frame="fixed_but_head"),
            QUOTIENT_RATES,
            EMBEDDING_SCALES,
        ),
        Entry(
            "quotient-adam-fresh",
            _quotient_adam(refresh_every=5),
            QUOTIENT_RATES,
            EMBEDDING_SCALES,
        ),
        Entry(
            "quotient-adam-full",
            _quotient_adam(
                hidden_frame="per_matrix", embedding_frame="fixed_but_head", refresh_every=5
            ),
            QUOTIENT_RATES,
            EMBEDDING_SCALES,
        ),
        Entry(
            "quotient-adam-hidden",
            _quotient_adam(hidden_frame="per_matrix"),
            QUOTIENT_RATES,
            EMBEDDING_SCALES,
        ),
        Entry(
            "quotient-adam-small",
            _quotient_adam(second_moment="factored", head_frame="svd"),
            QUOTIENT_RATES,
            EMBEDDING_SCALES,
        ),
        Entry(
            "quotient-adam-stream-only",
            _quotient_adam(head_frame=None),
            QUOTIENT_RATES,
        ),
        Entry(
            "quotient-adam-heads-only",
            _quotient_adam(residual_frame=None),
            QUOTIENT_RATES,
        ),
        Entry(
            "quotient-adam-no-polar",
            _quotient_adam(polar=False),
            QUOTIENT_RATES,
        ),
        Entry(
            "quotient-adam-0.1",
            _quotient_adam(**FIRST_EDITION),
            {"gpt": 8e-3, "llama": 8e-3, "vit": 8e-3},
        ),
        Entry(
            "soap",
            _soap,
            {"gpt": 1.2e-2, "llama": 8e-3, "vit": 8e-3},
            check=lambda: require("pytorch_optimizer"),
        ),
        Entry("kl-soap", _kl_soap, {"gpt": 8e-3, "llama": 8e-3, "vit": 8e-3}, check=_check_kl_soap),
        Entry(
            "soap-muon",
            _soap_muon,
            {"gpt": 8e-3, "llama": 8e-3, "vit": 1.6e-2},
            (
                *(*ADAMW_RATES, {"adamw_rate": 3.2e-2}),
                *({"adamw_rate": rate, "every": 5} for rate in (1.6e-2, 3.2e-2)),
                {"adamw_rate": 1.6e-2, "young": 1},
            ),
        ),
        Entry(
            "muon",
            _beside_adamw(_muon),
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ADAMW_RATES,
            check=_check_muon,
        ),
        Entry(
            "muon2",
            _beside_adamw(_muon2),
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ADAMW_RATES,
        ),
        Entry(
            "normuon",
            _beside_adamw(_normuon),
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ADAMW_RATES,
            check=lambda: require("pytorch_optimizer"),
        ),
        Entry(
            "adamuon",
            _adamuon,
            {"gpt": 1.6e-2, "llama": 1.6e-2, "vit": 1.6e-2},
            (
                *({**settings, "signs": 0} for settings in ADAMW_RATES),
                {"adamw_rate": 8e-3, "signs": 1},
            ),
        ),
        Entry(
            "compositional-muon",
            _beside_adamw(_compositional_muon),
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ADAMW_RATES,
        ),
        Entry(
            "dressed-muon",
            _beside_adamw(_dressed_muon),
            {"gpt": 4e-2, "llama": 4e-2, "vit": 2e-2},
            ADAMW_RATES,
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
