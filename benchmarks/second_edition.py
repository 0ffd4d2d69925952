"""Loss and time of QuotientAdam's first and second edition, what lies between them, and SOAP-Muon.

The protocol of ``quotientopt compare``, at given learning rates, weight decays and seeds; results
are written as they come. Beside the final loss stands that of averaged weights: an exponential
average with decay 0.95 over the last two fifths of the steps, by ``torch.optim.swa_utils``.

    python benchmarks/second_edition.py --layers 2 --steps 200
    python benchmarks/second_edition.py --decays 0.1 0.2 --variants "the default: …" SOAP-Muon
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from experiment import standard_error
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quotientopt import QuotientAdam
from quotientopt.compare.data import load_task
from quotientopt.compare.optimizers import BETAS, FIRST_EDITION, OPTIMIZERS, Entry
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import Training, state_bytes

# Beside AdamW at 8e-3 for embeddings and head, as its entry in the comparison starts.
SOAP_MUON, SOAP_MUON_ENTRY = "SOAP-Muon", OPTIMIZERS["soap-muon"]
AS_ALL = {"embedding_frame": "per_matrix"}
VARIANTS: dict[str, dict[str, Any]] = {
    "first edition": FIRST_EDITION,
    "full polar, frames per head": {"row_frame": "per_head", **AS_ALL},
    "full polar, frames per matrix": AS_ALL,
    "full polar, no head frames": {"head_frame": None, **AS_ALL},
    "embeddings in fixed frames at half the size": {"embedding_scale": 0.5},
    "the default: embeddings in fixed frames at twice the size": {},
    "the default, products in bfloat16": {"precision": "fast"},
    "the default, frames of hidden units": {"hidden_frame": "per_matrix"},
    SOAP_MUON: {},
}
AVERAGE, AVERAGED = 0.95, 0.4
RESULTS = Path(__file__).parent / "results" / "second-edition"


def run(name: str, rate: float, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Train one variant once."""
    decay = protocol.weight_decay

    def build(model: nn.Module, lr: float, *_: Any) -> list[torch.optim.Optimizer]:
        if name == SOAP_MUON:
            settings = dict(SOAP_MUON_ENTRY.settings_grid[0])
            return SOAP_MUON_ENTRY.build(model, lr, settings, protocol)
        options = {"update_scale": 1.0, **VARIANTS[name]}
        return [QuotientAdam(model, lr=lr, betas=BETAS, weight_decay=decay, **options)]

    OPTIMIZERS[name] = Entry(name, build, {})
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    training = Training(Trial(name, rate, seed=seed), protocol, task)
    held_out = list(task.validation_batches(protocol))
    averaged = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    seconds = []
    for step in range(protocol.steps):
        seconds.append(training.step().optimizer_seconds)
        if step >= (1 - AVERAGED) * protocol.steps:
            averaged.update_parameters(training.model)
    loss = training.validate(held_out)
    training.model.load_state_dict(averaged.module.state_dict())
    return {
        "variant": name,
        "rate": rate,
        "decay": decay,
        "seed": seed,
        "loss": loss,
        "averaged_loss": training.validate(held_out),
        "optimizer_ms": 1000 * statistics.fmean(seconds),
        "optimizer_ms_median": 1000 * statistics.median(seconds),
        "state_bytes": state_bytes(training.optimizers),
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
    parser.add_argument("--decays", type=float, nargs="+", default=[0.1])
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
    done = {key_of(row) for row in record["runs"]}
    wanted = list(itertools.product(range(given.seeds), given.rates, given.decays, given.variants))
    for seed, rate, decay, name in wanted:
        if (name, rate, decay, seed) not in done:
            own = replace(protocol, weight_decay=decay)
            record["runs"].append(run(name, rate, seed, own))
            print(record["runs"][-1], flush=True)
            write_atomically(path, json.dumps(record, indent=1))
    for name, rate, decay in itertools.product(given.variants, given.rates, given.decays):
        rows = [r for r in record["runs"] if key_of(r)[:3] == (name, rate, decay)]
        summary = f"{name:40} lr {rate:g}, decay {decay:g}:"
        for key in ("loss", "averaged_loss"):
            losses = [row[key] for row in rows if row.get(key) is not None]
            if losses:
                summary += f" {statistics.mean(losses):.4f} ± {standard_error(losses) or 0:.4f}"
        print(f"{summary}, {statistics.median(r['optimizer_ms'] for r in rows):.1f} ms")
    return 0


def key_of(row: dict[str, Any]) -> tuple[str, float, float, int]:
    """Variant, rate, decay and seed of a run."""
    return row["variant"], row["rate"], row.get("decay", 0.1), row["seed"]


if __name__ == "__main__":
    sys.exit(main())
