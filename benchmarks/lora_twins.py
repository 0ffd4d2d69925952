"""LoRA factors and their twins (B g⁻¹, g A): how far optimizers let the two curves part.

A small GPT of random weights gets LoRA adapters on queries, keys, values and outputs; they learn a
noisy pattern of tokens. Every optimizer trains it twice, from the same adapters in two gauges, and
the largest difference between the two loss curves is recorded: in float64 with condition number
1000, from random and from zero B, and in float32 with B scaled up and A down by 1000.

    python benchmarks/lora_twins.py
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt import find_symmetries
from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.models import reference_model
from quotientopt.peft import create_quotient_optimizer

RESULTS = Path(__file__).parent / "results"
SHAPE = {"layers": 2, "width": 32, "heads": 4, "vocabulary": 32, "context": 16}
RANK, STEPS, BATCH, COND, SCALE = 4, 30, 8, 1000.0, 1e3
RATE = 3e-3
SETTINGS: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.999), "weight_decay": 1e-2}


def adapted(start: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> nn.Module:
    """A small GPT with adapters; B is zero, or random (``start`` is "zero" or "random")."""
    settings = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["query", "key", "value", "output"],
    }
    torch.manual_seed(seed)
    config = peft.LoraConfig(**(settings | options))
    model = peft.get_peft_model(reference_model("gpt", seed, **SHAPE), config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    if start == "random":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(0.02 * noise)
    return model


def batches(steps: int, seed: int = 1) -> Iterable[Tensor]:
    """Token sequences that go on in equal strides."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, context = SHAPE["vocabulary"], SHAPE["context"]
    for _ in range(steps):
        start = torch.randint(vocabulary, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
        yield (start + stride * torch.arange(context + 1)) % vocabulary


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> Tensor:
    """Losses of some steps, in float64."""
    losses = []
    for tokens in batches(steps, seed):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def twin_of(model: nn.Module, cond: float = COND, seed: int = 2) -> nn.Module:
    """A copy with every pair (B, A) moved to (B g⁻¹, g A)."""
    twin = copy.deepcopy(model)
    symmetries = find_symmetries(twin)
    generator = torch.Generator().manual_seed(seed)
    symmetries.act_(symmetries.random_element(cond=cond, generator=generator))
    return twin


def rescaled(model: nn.Module, scale: float = SCALE) -> nn.Module:
    """A copy with every B scaled up and every A down."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_A" in name:
            parameter.data.div_(scale)
        if "lora_B" in name:
            parameter.data.mul_(scale)
    return twin


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(trained(model), **SETTINGS)


def quotient_adam(model: nn.Module) -> Any:
    return create_quotient_optimizer(model, **SETTINGS)


def lora_rite(model: nn.Module) -> Any:
    """As shipped: A, B, A, B, …, as its documentation asks, and its own defaults."""
    from pytorch_optimizer import LoRARite

    return LoRARite(trained(model), **SETTINGS)


def riemannian(model: nn.Module) -> Any:
    """PEFT's preconditioner, then AdamW."""
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, **SETTINGS)


OPTIMIZERS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "quotient-adam": ("QuotientAdam", quotient_adam),
    "adamw": ("AdamW", adamw),
    "lora-rite": ("LoRA-RITE (pytorch_optimizer)", lora_rite),
    "riemannian": ("riemannian (PEFT)", riemannian),
}


def starts() -> dict[str, tuple[nn.Module, nn.Module]]:
    """A model and its twin, by what the two differ in."""
    wide = {start: adapted(start, torch.float64) for start in ("random", "zero")}
    narrow = adapted("random", torch.float32)
    return {
        "random B, cond(g) = 1000, float64": (wide["random"], twin_of(wide["random"])),
        "B = 0, cond(g) = 1000, float64": (wide["zero"], twin_of(wide["zero"])),
        "B times 1000, A over 1000, float32": (narrow, rescaled(narrow)),
    }


def twin_table(steps: int = STEPS) -> list[dict[str, Any]]:
    """One row per optimizer and start: largest difference of the two curves, and the curves."""
    rows = []
    for start, pair in starts().items():
        for name, (label, make) in OPTIMIZERS.items():
            curves = []
            for model in map(copy.deepcopy, pair):
                curves.append(train(model, make(model), steps))
            rows.append(
                {
                    "optimizer": name,
                    "label": label,
                    "start": start,
                    "largest_difference": (curves[0] - curves[1]).abs().max().item(),
                    "losses": [curve.tolist() for curve in curves],
                }
            )
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    columns = list(dict.fromkeys(row["start"] for row in rows))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for label in dict.fromkeys(row["label"] for row in rows):
        own = {row["start"]: row["largest_difference"] for row in rows if row["label"] == label}
        lines.append(f"| {label} | " + " | ".join(f"{own[c]:.1e}" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "lora-twins.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = twin_table()
    record = {
        "model": SHAPE,
        "rank": RANK,
        "steps": STEPS,
        "settings": SETTINGS,
        "environment": describe_environment("cpu") | {"peft": peft.__version__},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, json.dumps(record, indent=1) + "\n")
    print(as_text(rows))


if __name__ == "__main__":
    main()
