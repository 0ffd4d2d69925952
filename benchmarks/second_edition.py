"""Loss and time of QuotientAdam's first and second edition, what lies between them, and SOAP-Muon.

The protocol of ``quotientopt compare``, at given learning rates and seeds; results are written as
they come.

    python benchmarks/second_edition.py --layers 2 --steps 200
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quotientopt import QuotientAdam
from quotientopt.compare.data import load_task
from quotientopt.compare.optimizers import BETAS, FIRST_EDITION, OPTIMIZERS, Entry
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.train import train

# Beside AdamW at 8e-3 for embeddings and head, as its entry in the comparison starts.
SOAP_MUON, SOAP_MUON_ENTRY = "SOAP-Muon", OPTIMIZERS["soap-muon"]
AS_ALL = {"embedding_frame": "per_matrix"}
VARIANTS: dict[str, dict[str, Any]] = {
    "first edition": FIRST_EDITION,
    "full polar, frames per head": {"row_frame": "per_head", **AS_ALL},
    "full polar, frames per matrix": AS_ALL,
    "full polar, no head frames": {"head_frame": None, **AS_ALL},
    "the default: embeddings in fixed frames": {},
    SOAP_MUON: {},
}
RESULTS = Path(__file__).parent / "results" / "second-edition"


def run(name: str, rate: float, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Train one variant once."""

    def build(model: nn.Module, lr: float, *_: Any) -> list[torch.optim.Optimizer]:
        decay = protocol.weight_decay
        if name == SOAP_MUON:
            settings = dict(SOAP_MUON_ENTRY.settings_grid[0])
            return SOAP_MUON_ENTRY.build(model, lr, settings, protocol)
        options = {"update_scale": 1.0, **VARIANTS[name]}
        return [QuotientAdam(model, lr=lr, betas=BETAS, weight_decay=decay, **options)]

    OPTIMIZERS[name] = Entry(name, build, {})
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    found = train(Trial(name, rate, seed=seed), protocol, task)
    return {
        "variant": name,
        "rate": rate,
        "seed": seed,
        "loss": found.final_loss,
        "optimizer_ms": 1000 * found.timing.optimizer.mean,
        "optimizer_ms_median": 1000 * found.timing.optimizer.median,
        "state_bytes": found.state_bytes,
    }


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and print means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.6e-2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    sizes = {"layers": given.layers, "steps": given.steps, "width": given.width}
    protocol = Protocol(model=given.model, data=given.data, batch=given.batch, **sizes)
    torch.set_num_threads(protocol.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.model}-{given.width}-{given.layers}-{given.steps}.json"
    record = {
        "protocol": asdict(protocol),
        "environment": describe_environment("cpu"),
        "runs": [],
    }
    if path.exists():
        record = json.loads(path.read_text())
    done = {(r["variant"], r["rate"], r["seed"]) for r in record["runs"]}
    for seed in range(given.seeds):
        for rate in given.rates:
            for name in given.variants:
                if (name, rate, seed) not in done:
                    record["runs"].append(run(name, rate, seed, protocol))
                    print(record["runs"][-1], flush=True)
                    partial = path.with_suffix(".part")
                    partial.write_text(json.dumps(record, indent=1))
                    partial.replace(path)
    for name in given.variants:
        for rate in given.rates:
            own = [r for r in record["runs"] if (r["variant"], r["rate"]) == (name, rate)]
            losses = [r["loss"] for r in own if r["loss"] is not None]
            error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
            mean = statistics.mean(losses) if losses else float("nan")
            times = statistics.median(r["optimizer_ms"] for r in own)
            print(f"{name:32} lr {rate:g}: {mean:.4f} ± {error:.4f}, {times:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
