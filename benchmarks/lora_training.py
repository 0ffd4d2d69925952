"""One training run of `lora.py`.

In reading order: `Adapted`, an encoder with adapters and the head that reads it; `CONTENDERS`, the
optimizers of the adapters, as their packages make them; `Training` and `train`.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lora_tasks import CLASSES, IGNORED, REPLIES, Batch, LoraProtocol, Task
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from quotientopt._system import progress
from quotientopt.compare.protocol import Run, Seconds, Timing, Trial, require
from quotientopt.compare.train import DivergedError, state_bytes
from quotientopt.optim import StepRefusedError


class Adapted(nn.Module):
    """A frozen encoder with LoRA adapters, and a head.

    Attributes
    ----------
    encoder : PeftModel
    head : Linear
        Trained on the mean of the hidden states; for replies the model's own, frozen.
    """

    def __init__(self, task: Task, protocol: LoraProtocol, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        self.kind = task.kind
        self.autocast = protocol.autocast
        config = LoraConfig(
            r=protocol.rank,
            lora_alpha=protocol.alpha,
            lora_dropout=0.0,
            target_modules=list(task.matrices),
        )
        torch.manual_seed(seed)
        self.encoder = get_peft_model(copy.deepcopy(task.encoder), config)
        self.head = task.output
        if self.head is None:
            self.head = nn.Linear(self.encoder.config.hidden_size, task.outputs)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs of the head and their targets, one row each."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            states = self.encoder(input_ids=batch.tokens, attention_mask=batch.mask)
            hidden = states.last_hidden_state
            if self.kind == REPLIES:
                wanted = batch.targets != IGNORED
                return self.head(hidden[wanted]).float(), batch.targets[wanted]
        there = batch.mask.unsqueeze(-1).float()
        return self.head((hidden.float() * there).sum(1) / there.sum(1)), batch.targets

    def losses(self, batch: Batch) -> Tensor:
        """Loss of every prediction in `batch`."""
        outputs, targets = self.predictions(batch)
        if self.kind in (CLASSES, REPLIES):
            return functional.cross_entropy(outputs, targets, reduction="none")
        return (outputs.squeeze(-1) - targets).square()


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


class Step(NamedTuple):
    """Loss of a training step and where its processor seconds went.

    Those of this process, so that they mean something on a machine that does other work.
    """

    loss: float
    model_seconds: float
    optimizer_seconds: float


class Training:
    """Adapters in training: factors and batches depend on the seed, not on the optimizer."""

    def __init__(self, trial: Trial, protocol: LoraProtocol, task: Task) -> None:
        self.protocol = protocol
        self.model = Adapted(task, protocol, trial.seed)
        contender = CONTENDERS[trial.optimizer]
        self.optimizers = optimizers_of(self.model, contender, trial.rate, trial.settings, protocol)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.batches = task.training_batches(protocol, trial.seed)
        self.steps = 0

    def step(self) -> Step:
        """Train on the next batch."""
        fraction = self.protocol.schedule(self.steps)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            optimizer.zero_grad()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
        batch = next(self.batches)
        start = time.process_time()
        loss = self.model.losses(batch).mean()
        loss.backward()
        if not math.isfinite(value := loss.item()):
            raise DivergedError(f"the loss of step {self.steps + 1} is {value}")
        middle = time.process_time()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.process_time()
        self.steps += 1
        return Step(value, middle - start, end - middle)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss of all predictions in `batches`."""
        return torch.cat([self.model.losses(batch) for batch in batches]).mean().item()

    @torch.no_grad()
    def accuracy(self, batches: Iterable[Batch]) -> float | None:
        """Fraction of classes predicted rightly; None where there are none."""
        if self.model.kind != CLASSES:
            return None
        pairs = [self.model.predictions(batch) for batch in batches]
        right = torch.cat([outputs.argmax(-1) == targets for outputs, targets in pairs])
        return right.double().mean().item()


def train(trial: Trial, protocol: LoraProtocol, task: Task) -> Run:
    """Train once from the seed of `trial` and measure.

    Returns
    -------
    Run
        Diverged if a loss is not finite or the optimizer refuses a step; training stops there.
    """
    training = Training(trial, protocol, task)
    held_out = task.validation_batches(protocol)
    steps: list[Step] = []
    curve: list[list[float]] = []
    seconds, finite = 0.0, True
    for _ in progress(range(protocol.steps), str(trial)):
        try:
            step = training.step()
        except (DivergedError, StepRefusedError, torch.linalg.LinAlgError):
            finite = False
            break
        steps.append(step)
        seconds += step.model_seconds + step.optimizer_seconds
        if protocol.evaluates_after(training.steps - 1):
            loss = training.validate(held_out)
            finite = math.isfinite(loss)
            if not finite:
                break
            curve.append([training.steps, seconds, loss])
    trained = [p for p in training.model.parameters() if p.requires_grad]
    return Run(
        trial=trial,
        status="finished" if finite else "diverged",
        final_loss=curve[-1][2] if finite else None,
        final_accuracy=training.accuracy(held_out) if finite else None,
        curve=curve,
        training_losses=[step.loss for step in steps],
        timing=timing(steps),
        state_bytes=state_bytes(training.optimizers),
        parameters=sum(parameter.numel() for parameter in trained),
        hyperparameters=hyperparameters(training.optimizers),
    )


def hyperparameters(optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Any]]:
    """What the optimizers, that of the head last, were built with, as far as JSON can hold it."""
    found: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        found[f"{name} (head)" if name in found else name] = plain(optimizer.defaults)
    return found


def timing(steps: list[Step]) -> Timing:
    """Seconds of a step; the first, which allocates state, is left out."""
    counted = steps[1:]
    if not counted:
        return Timing(Seconds(0.0, 0.0), Seconds(0.0, 0.0))
    columns = ([s.optimizer_seconds for s in counted], [s.model_seconds for s in counted])
    return Timing(*(Seconds(statistics.median(c), statistics.fmean(c)) for c in columns))


def plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Those defaults of an optimizer that JSON can hold."""
    kept = {
        n: v for n, v in defaults.items() if isinstance(v, bool | int | float | str | list | tuple)
    }
    return {n: list(v) if isinstance(v, tuple) else v for n, v in kept.items()}
