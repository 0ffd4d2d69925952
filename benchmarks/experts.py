"""What frames are worth for experts that a model keeps in one parameter.

A small Mixtral of transformers (3 layers of width 64, 4 experts of 96 hidden units, 2 of them for
each token) on the standard library's sources, under AdamW, QuotientAdam, and QuotientAdam with
AdamW for the experts. Rates are tuned on seed 0, and the best one is run on the others.

    python benchmarks/experts.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from experiment import command_of, markdown_table, standard_error
from torch.nn import functional

import quotientopt as qo
from quotientopt.compare.data import Task, load_task
from quotientopt.compare.optimizers import BETAS
from quotientopt.compare.protocol import Protocol, describe_environment
from quotientopt.compare.record import write_atomically

RESULTS = Path(__file__).parent / "results" / "experts"
PROTOCOL = Protocol(model="mixtral", layers=3, width=64, steps=150, batch=8)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
APART = "QuotientAdam, experts by AdamW"
CONTENDERS = ("AdamW", APART, "QuotientAdam")
RATES = dict.fromkeys(CONTENDERS, (2e-3, 4e-3, 8e-3, 1.6e-2))


def task_of(protocol: Protocol) -> Task:
    """The text, as a GPT of `quotientopt compare` reads it."""
    return load_task(protocol.data, "gpt", protocol.batch, protocol.context)


def model_of(seed: int) -> torch.nn.Module:
    """The model with the weights of a seed."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=PROTOCOL.width,
        num_hidden_layers=PROTOCOL.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=PROTOCOL.context,
        **EXPERTS,
    )
    return MixtralForCausalLM(config)


def optimizer_of(name: str, model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """A contender; AdamW gets the experts where their stream is left out of the symmetries."""
    options: dict[str, Any] = {"lr": rate, "betas": BETAS, "weight_decay": PROTOCOL.weight_decay}
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), **options)
    found = qo.find_symmetries(model)
    stream = found.residual
    assert stream is not None
    if name == APART:
        parameters = {n: p for n, p in stream.parameters.items() if p.ndim < 3}
        axes = {n: axis for n, axis in stream.axes.items() if n in parameters}
        found = qo.SymmetryMap(found.heads, replace(stream, axes=axes, parameters=parameters))
    return qo.QuotientAdam(model, symmetries=found, **options)


def final_loss(name: str, rate: float, seed: int, steps: int) -> float:
    """Validation loss after a run, in nats per byte."""
    protocol = replace(PROTOCOL, steps=steps)
    task = task_of(protocol)
    model = model_of(seed)
    optimizer = optimizer_of(name, model, rate)

    def loss_of(batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())

    batches = task.training_batches(protocol, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * protocol.schedule(step)
        optimizer.zero_grad()
        loss_of(next(batches)).backward()
        optimizer.step()
    with torch.no_grad():
        return statistics.fmean(loss_of(b).item() for b in task.validation_batches(protocol))


def table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Last losses at the best rate, as Markdown."""
    rows = []
    for name, of_rates in runs.items():
        best = min(of_rates, key=lambda rate: of_rates[rate]["0"])
        edge = " (edge)" if float(best) in (RATES[name][0], RATES[name][-1]) else ""
        losses = list(of_rates[best].values())
        error = standard_error(losses)
        shown = f"{statistics.fmean(losses):.3f}" + (f" ± {error:.3f}" if error is not None else "")
        rows.append((name, f"{float(best):g}{edge}", len(losses), shown))
    header = ("optimizer", "best rate", "seeds", "last validation loss (nats per byte)")
    return f"# Experts in one parameter\n\n{markdown_table(header, rows)}\n"


def main() -> int:
    """Make all runs, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=PROTOCOL.steps)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    protocol = replace(PROTOCOL, steps=given.steps, data_digest=task_of(PROTOCOL).digest)
    record: dict[str, Any] = {
        "command": command_of("experts.py"),
        "environment": describe_environment("cpu") | {"transformers": version("transformers")},
        "protocol": asdict(protocol) | {"experts": EXPERTS},
        "runs": {name: {} for name in RATES},
    }
    for name, of_rates in record["runs"].items():
        for rate in RATES[name]:
            of_rates[str(rate)] = {"0": final_loss(name, rate, 0, given.steps)}
            print(name, rate, of_rates[str(rate)], flush=True)
        best = min(of_rates, key=lambda rate: of_rates[rate]["0"])
        for seed in range(1, given.seeds):
            of_rates[best][str(seed)] = final_loss(name, float(best), seed, given.steps)
        write_atomically(given.out / "experts.json", json.dumps(record, indent=1) + "\n")
    write_atomically(given.out / "experts.md", table(record["runs"]))
    print(table(record["runs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
