"""Ablations of QuotientAdam's options under the protocol of ``quotientopt compare``.

Trains the reference model with each variant on the same weights and batches, over learning rates
and seeds, and writes JSON with everything measured, rewritten after every run.

    python benchmarks/ablation.py parts --rates 8e-3 --seeds 3
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quotientopt import QuotientAdam
from quotientopt.compare.data import load_corpus
from quotientopt.compare.environment import describe_environment
from quotientopt.compare.optimizers import BETAS, OPTIMIZERS, Entry
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.train import train
from quotientopt.compare.trial import Trial

VARIANTS: dict[str, dict[str, Mapping[str, Any]]] = {
    "parts": {
        "default": {},
        "without Nesterov": {"nesterov": False},
        "without polar": {"polar": False},
        "without both": {"nesterov": False, "polar": False},
    },
    "head-frame": {
        str(kind): {"head_frame": kind} for kind in ("balanced", "orthonormal", "svd", None)
    },
    "residual-frame": {
        str(kind): {"residual_frame": kind} for kind in ("per_matrix", "shared", None)
    },
    "refresh": {f"every {k}": {"refresh_every": k} for k in (5, 10, 20)},
    "betas": {str(betas): {"betas": betas} for betas in ((0.9, 0.95), (0.9, 0.98), (0.95, 0.95))},
}
RESULTS = Path(__file__).parent / "results"


def run(
    variant: str, options: Mapping[str, Any], rate: float, seed: int, protocol: Protocol
) -> dict[str, Any]:
    """Train one variant once."""
    torch.set_num_threads(protocol.threads)
    options = {"betas": BETAS, "weight_decay": protocol.weight_decay} | dict(options)

    def build(model, rate, settings, protocol):
        return [QuotientAdam(model, lr=rate, **options)]

    OPTIMIZERS[variant] = Entry(variant, build, {})
    corpus = load_corpus(protocol.data, protocol.context)
    return asdict(train(Trial(variant, rate, {}, seed), protocol, corpus))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean final loss and its standard error per variant and learning rate."""
    rows = []
    keys = sorted({(r["trial"]["optimizer"], r["trial"]["rate"]) for r in runs})
    for variant, rate in keys:
        own = [r for r in runs if (r["trial"]["optimizer"], r["trial"]["rate"]) == (variant, rate)]
        losses = [r["final_loss"] for r in own if r["final_loss"] is not None]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
        rows.append(
            {
                "variant": variant,
                "rate": rate,
                "runs": len(own),
                "diverged": len(own) - len(losses),
                "final_loss": statistics.fmean(losses) if losses else None,
                "standard_error": error,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=sorted(VARIANTS))
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rates", default="8e-3")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    protocol = Protocol(
        model=arguments.model,
        data=arguments.data,
        steps=arguments.steps,
        threads=max(1, (os.cpu_count() or 1) // arguments.jobs),
    )
    rates = [float(rate) for rate in arguments.rates.split(",")]
    target = RESULTS / f"ablation-{arguments.question}-{arguments.model}.json"
    RESULTS.mkdir(exist_ok=True)
    runs: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        work = functools.partial(pool.submit, run)
        variants = VARIANTS[arguments.question].items()
        pending = [
            work(name, options, rate, seed, protocol)
            for seed, rate, (name, options) in itertools.product(
                range(arguments.seeds), rates, variants
            )
        ]
        for done in as_completed(pending):
            runs.append(done.result())
            record = {
                "question": arguments.question,
                "variants": VARIANTS[arguments.question],
                "protocol": asdict(protocol),
                "environment": describe_environment(protocol.device),
                "summary": summarise(runs),
                "runs": sorted(runs, key=lambda r: str(r["trial"])),
            }
            partial = target.with_suffix(".tmp")
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, target)
            trial, loss = runs[-1]["trial"], runs[-1]["final_loss"]
            print(f"{trial['optimizer']} lr={trial['rate']:g} seed={trial['seed']}: {loss}")
    for row in summarise(runs):
        print(row)


if __name__ == "__main__":
    main()
