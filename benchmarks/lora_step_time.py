"""Time of an optimizer's step on the LoRA pairs of SmolLM2-135M, on fixed random gradients.

120 pairs: queries (576 → 576), keys and values (576 → 192) and outputs (576 → 576) of 30 layers.
The optimizers step in turn, a period of ten steps each, so that frames that are made every ten
steps are part of every period and all suffer alike from other work on the machine. QuotientAdam
makes coordinates less and less often: its first steps, in which it makes them every time, are timed
beside the steps after the first hundred. Processor times of a single thread are compared, which
other work disturbs least; wall times are recorded beside them.

    python benchmarks/lora_step_time.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batched_heads import settle_allocator, spread
from torch import Tensor, nn
from torch.optim import Optimizer

from quotientopt import HeadSymmetry, QuotientAdam, SymmetryMap
from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.groups import GL
from quotientopt.symmetries import Block

RESULTS = Path(__file__).parent / "results"
LAYERS = 30
SHAPES = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
PERIOD = 10
# From then on all steps cost the same.
WARMUP = 10 * PERIOD


def build_pairs(rank: int, dtype: torch.dtype) -> tuple[list[nn.Parameter], SymmetryMap]:
    """A, B, A, B, … with gradients, and their symmetries."""
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> nn.Parameter:
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        parameter = nn.Parameter(value.to(dtype))
        parameter.grad = (1e-3 * torch.randn(shape, generator=generator)).to(dtype)
        return parameter

    parameters, pairs = [], []
    for layer in range(LAYERS):
        for part, (width, out) in SHAPES.items():
            A, B = factor(rank, width), factor(out, rank)
            parameters += [A, B]
            left, right = (
                Block.of(view.unsqueeze(0), parameter, f"{layer}.{part}.lora_{letter}")
                for view, parameter, letter in ((B.detach().mT, B, "B"), (A.detach(), A, "A"))
            )
            pairs.append(HeadSymmetry([left], [right], GL(rank), f"{layer}.{part}.lora.default"))
    return parameters, SymmetryMap(pairs)


def build_optimizers(rank: int, dtype: torch.dtype) -> dict[str, Optimizer]:
    """Every optimizer on factors of its own, all alike."""
    from pytorch_optimizer import LoRARite

    def fresh() -> list[nn.Parameter]:
        return build_pairs(rank, dtype)[0]

    framed, symmetries = build_pairs(rank, dtype)
    orthogonalised, others = build_pairs(rank, dtype)
    rite: Any = LoRARite
    return {
        "AdamW (foreach)": torch.optim.AdamW(fresh(), lr=1e-4, foreach=True),
        "AdamW (fused)": torch.optim.AdamW(fresh(), lr=1e-4, fused=True),
        "QuotientAdam": QuotientAdam(framed, lr=1e-4, symmetries=symmetries),
        "QuotientAdam, lora_polar=True": QuotientAdam(
            orthogonalised, lr=1e-4, symmetries=others, lora_polar=True
        ),
        "LoRA-RITE (pytorch_optimizer)": rite(fresh(), lr=1e-4),
    }


def period_of(optimizer: Optimizer) -> Callable[[], None]:
    def period() -> None:
        for _ in range(PERIOD):
            optimizer.step()

    return period


def measure(optimizers: dict[str, Optimizer], repeats: int) -> list[dict[str, Any]]:
    """Wall and processor time of a step, over periods taken in turn."""
    wall: dict[str, list[float]] = {name: [] for name in optimizers}
    processor: dict[str, list[float]] = {name: [] for name in optimizers}
    periods = {name: period_of(optimizer) for name, optimizer in optimizers.items()}
    for name, period in periods.items():
        for _ in range(WARMUP // PERIOD if isinstance(optimizers[name], QuotientAdam) else 1):
            period()
    gc.disable()
    for _ in range(repeats):
        for name, period in periods.items():
            start, cpu = time.perf_counter(), time.process_time()
            period()
            wall[name].append((time.perf_counter() - start) / PERIOD)
            processor[name].append((time.process_time() - cpu) / PERIOD)
    gc.enable()
    return [
        {
            "optimizer": name,
            "state_bytes": state_bytes(optimizer),
            "milliseconds": spread(wall[name]),
            "processor_milliseconds": spread(processor[name]),
        }
        for name, optimizer in optimizers.items()
    ]


def measure_early(rank: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """The same for the second period of ten steps of new QuotientAdams."""
    wall, processor = [], []
    for _ in range(repeats):
        parameters, symmetries = build_pairs(rank, dtype)
        optimizer = QuotientAdam(parameters, lr=1e-4, symmetries=symmetries)
        period = period_of(optimizer)
        period()
        start, cpu = time.perf_counter(), time.process_time()
        period()
        wall.append((time.perf_counter() - start) / PERIOD)
        processor.append((time.process_time() - cpu) / PERIOD)
    return {
        "optimizer": "QuotientAdam, steps 11 to 20",
        "state_bytes": state_bytes(optimizer),
        "milliseconds": spread(wall),
        "processor_milliseconds": spread(processor),
    }


def state_bytes(optimizer: Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Medians of processor time over AdamW's."""
    times = {row["optimizer"]: row["processor_milliseconds"]["median"] for row in rows}
    for row in rows:
        row["over_adamw_foreach"] = round(times[row["optimizer"]] / times["AdamW (foreach)"], 2)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: processor milliseconds, median and quartiles."""
    lines = ["| rank | | ms per step | over AdamW (foreach) | state, MB |", "|---|---|---|---|---|"]
    for row in results:
        times = row["processor_milliseconds"]
        span = f"{times['first_quartile']:.1f} … {times['third_quartile']:.1f}"
        lines.append(
            f"| {row['rank']} | {row['optimizer']} | {times['median']:.1f} ({span}) | "
            f"{row['over_adamw_foreach']:.2f} | {row['state_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12, help=f"timed periods of {PERIOD} steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "lora-step-time.json")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {arguments.repeats}")
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    record: dict[str, Any] = {
        "pairs": LAYERS * len(SHAPES),
        "shapes": SHAPES,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "steps_per_repeat": PERIOD,
        "steps_before": WARMUP,
        "load_average": [round(os.getloadavg()[0], 2)],
        "environment": describe_environment("cpu"),
        "results": [],
    }
    for rank in arguments.ranks:
        dtype = getattr(torch, arguments.dtype)
        rows = measure(build_optimizers(rank, dtype), arguments.repeats)
        rows.append(measure_early(rank, dtype, arguments.repeats))
        add_ratios(rows)
        record["results"] += [{"rank": rank} | row for row in rows]
    record["load_average"].append(round(os.getloadavg()[0], 2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))


if __name__ == "__main__":
    main()
