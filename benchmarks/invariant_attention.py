"""Ordinary attention against `InvariantAttention` on the reference setting of `gpt`.

Four arms: ordinary attention and its fixed-rank points with QuotientAdam, ordinary attention and
its affine chart with AdamW. Task, protocol, initial function and batches of a seed are those of
`quotientopt compare`. The arms with AdamW have their best learning rate of a grid on seed 0,
extended while the best lies on its edge; those with QuotientAdam, whose steps do not depend on the
gauge, the best one of `results/gpt-stdlib-600`. Writes everything measured as JSON and a table.

    python benchmarks/invariant_attention.py
    python benchmarks/invariant_attention.py --float64-path
    python benchmarks/invariant_attention.py --add "gauge of the chart, AdamW" 4e-3 2

The second command adds to the record how far the two arms with QuotientAdam are apart in float64,
the third one run of an arm at a rate and a seed. "gauge of the chart" is a control: ordinary
attention whose initial weights are those that the chart stands for.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from experiment import command_of, markdown_table, standard_error
from torch import nn

import quotientopt as qo
from quotientopt.compare.data import Task, load_task, prediction_loss
from quotientopt.compare.optimizers import FIRST_EDITION, OPTIMIZERS, Entry, Settings
from quotientopt.compare.protocol import Protocol, Run, Trial, best_run, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import build_model, train
from quotientopt.compare.tuning import search_rates
from quotientopt.nn import InvariantAttention
from quotientopt.symmetries import ResidualStream, SymmetryMap

PAIRS = {
    "fixed-rank": "ordinary, QuotientAdam",
    "chart": "ordinary, AdamW",
    "gauge of the chart": "ordinary, AdamW",
}
STRETCHES = (1, 5, 20, 100, 300)
RUN = ("arm", "lr", "seed", "final validation loss", "mean of the last 20 training losses")


def of_arm(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Runs at the arm's best rate, by seed."""
    runs = [run for run in record["runs"] if run["trial"]["optimizer"] == name]
    tuning = [run for run in runs if run["trial"]["seed"] == 0] or runs
    best = min(tuning, key=score)["trial"]["rate"]
    chosen = [run for run in runs if run["trial"]["rate"] == best]
    return sorted(chosen, key=lambda run: run["trial"]["seed"])


def score(run: dict[str, Any]) -> float:
    """Final validation loss, infinite if the run diverged."""
    return math.inf if run["final_loss"] is None else run["final_loss"]


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {standard_error(values):.4f}"


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    protocol, environment = record["protocol"], record["environment"]
    names = list(dict.fromkeys(run["trial"]["optimizer"] for run in record["runs"]))
    summary = []
    for name in names:
        runs = of_arm(record, name)
        other = PAIRS.get(name.split(", ")[0])
        difference = "–"
        if other in names:
            bases = {run["trial"]["seed"]: score(run) for run in of_arm(record, other)}
            seeds = [run["trial"]["seed"] for run in runs]
            difference = mean_and_error(
                [score(run) - bases[seed] for run, seed in zip(runs, seeds, strict=True)]
            )
        rate = f"{runs[0]['trial']['rate']:g}"
        summary.append(
            (
                name,
                rate + (" (edge)" if name in record["rates_on_the_edge"] else ""),
                mean_and_error([score(run) for run in runs]),
                difference,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['state_bytes'] / 1e6:.1f}",
            )
        )
    header = (
        "arm",
        "best lr",
        "final validation loss",
        "less that of ordinary attention",
        "parameters",
        "state MB",
    )
    everything = [
        (
            run["trial"]["optimizer"],
            f"{run['trial']['rate']:g}",
            run["trial"]["seed"],
            f"{score(run):.4f}",
            f"{sum(run['training_losses'][-20:]) / max(len(run['training_losses'][-20:]), 1):.4f}",
        )
        for run in record["runs"]
    ]
    conditions = [
        (trial, f"{found['qk']:.3g}", f"{found['vo']:.3g}")
        for trial, found in record["final_chart_conditions"].items()
    ]
    return "\n".join(
        [
            "# Ordinary and invariant attention",
            "",
            f"`{record['command']}`. `{protocol['model']}` ({protocol['layers']} layers, width "
            f"{protocol['width']}), text `{protocol['data']}`, {protocol['steps']} steps of "
            f"{protocol['batch']} × {protocol['context']} tokens, warm-up "
            f"{Protocol(**protocol).warmup} steps, cosine to {protocol['final_fraction']:.0%}, "
            f"weight decay {protocol['weight_decay']:g}, β₂ of AdamW {record['adamw_beta2']:g}. "
            "Losses in nats per byte on fixed validation batches; means over seeds ± standard "
            "error of the mean; differences are paired by seed. Runs of one seed start from the "
            "same function.",
            "",
            markdown_table(header, summary),
            "",
            "## All runs",
            "",
            markdown_table(RUN, everything),
            "",
            "## Paths",
            "",
            "Largest difference of the training losses from those of ordinary attention at the "
            "same rate, seed 0, over the first steps.",
            "",
            markdown_table(("arm", "lr", *map(str, STRETCHES)), paths(record)),
            "",
            *float64_lines(record),
            "## Charts after training",
            "",
            "Largest condition number ‖[I, F]‖₂ over layers and heads.",
            "",
            markdown_table(("run", "QK", "VO"), conditions),
            "",
            "## Environment",
            "",
            f"{environment['processor']}, one thread, {environment['platform']}, Python "
            f"{environment['python']}, torch {environment['torch']}, quotientopt "
            f"{environment['quotientopt']}; {record['cpu_seconds']:.0f} CPU seconds in all.",
            "",
        ]
    )


def paths(record: dict[str, Any]) -> list[tuple[object, ...]]:
    """How far training losses of two arms at one rate are apart, over the first steps of seed 0."""
    found: list[tuple[object, ...]] = []
    runs = [run for run in record["runs"] if run["trial"]["seed"] == 0]
    for name in dict.fromkeys(run["trial"]["optimizer"] for run in runs):
        other = PAIRS.get(name.split(", ")[0])
        for run in (run for run in runs if run["trial"]["optimizer"] == name):
            rate = run["trial"]["rate"]
            base = [
                r for r in runs if (r["trial"]["optimizer"], r["trial"]["rate"]) == (other, rate)
            ]
            if not base:
                continue
            losses = zip(run["training_losses"], base[0]["training_losses"], strict=False)
            apart = [abs(one - two) for one, two in losses]
            found.append((name, f"{rate:g}", *(f"{max(apart[:n]):.1e}" for n in STRETCHES)))
    return found


def float64_lines(record: dict[str, Any]) -> list[str]:
    """What was measured in float64, if it was."""
    path = record.get("float64_path")
    if path is None:
        return []
    return [
        f"In float64 the fixed-rank points and ordinary attention under QuotientAdam at "
        f"{path['rate']:g} are apart by at most {max(path['differences']):.1e} over the first "
        f"{path['steps']} steps of seed {path['seed']}.",
        "",
    ]


RESULTS = Path(__file__).parent / "results" / "invariant-attention"
BETAS, BETA2 = (0.9, 0.95), 0.99
CONTROL = "gauge of the chart, AdamW"
GRIDS = {"AdamW": (2e-3, 4e-3, 8e-3), "QuotientAdam": (1.6e-2,)}
EXTENSION_LIMIT = 1
SCRIPT, FILE_NAME = "invariant_attention.py", "invariant-attention.json"
SETTINGS: Settings = {}


def swap_attention(model: nn.Module, parametrization: str) -> None:
    """Put an InvariantAttention of the same function in the place of every attention."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention = InvariantAttention.from_attention(
            block.attention, parametrization=parametrization
        )


def symmetries_of(model: nn.Module, stream: ResidualStream) -> SymmetryMap:
    """Head symmetries of the model, and the stream of the model it was, by parameter names."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name] for name in stream.axes}
    residual = ResidualStream(stream.dimension, stream.axes, own)
    return SymmetryMap(qo.find_symmetries(model).heads, residual)


class Arms:
    """The arms as entries of the comparison; remembers the model it built last."""

    def __init__(self) -> None:
        self.model: nn.Module = nn.Module()
        builders = {
            "ordinary, AdamW": self._adamw,
            "chart, AdamW": self._chart,
            "ordinary, QuotientAdam": self._quotient_adam,
            "fixed-rank, QuotientAdam": self._fixed_rank,
        }
        self.names = tuple(builders)
        builders[CONTROL] = self._gauge_of_the_chart
        for name, build in builders.items():
            OPTIMIZERS[name] = Entry(name, build, {"gpt": 4e-3})

    def _adamw(
        self, model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        self.model = model
        return [
            torch.optim.AdamW(
                model.parameters(),
                lr=rate,
                betas=(BETAS[0], BETA2),
                weight_decay=protocol.weight_decay,
                fused=True,
            )
        ]

    def _chart(
        self, model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        swap_attention(model, "chart")
        return self._adamw(model, rate, settings, protocol)

    def _gauge_of_the_chart(
        self, model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        swap_attention(model, "chart")
        for block in model.blocks:  # type: ignore[union-attr]
            block.attention = block.attention.to_attention()
        return self._adamw(model, rate, settings, protocol)

    def _quotient_adam(
        self, model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        self.model = model
        decay = protocol.weight_decay
        options = {"betas": BETAS, "weight_decay": decay, **FIRST_EDITION}
        return [qo.QuotientAdam(model, lr=rate, **options)]

    def _fixed_rank(
        self, model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        self.model = model
        stream = qo.find_symmetries(model).residual
        assert stream is not None
        swap_attention(model, "fixed-rank")
        return [
            qo.QuotientAdam(
                model,
                lr=rate,
                betas=BETAS,
                weight_decay=protocol.weight_decay,
                symmetries=symmetries_of(model, stream),
                **FIRST_EDITION,
            )
        ]

    def chart_conditions(self) -> dict[str, float]:
        """Worst condition number of the charts of the last model's heads."""
        found: dict[str, float] = {}
        for module in self.model.modules():
            if isinstance(module, InvariantAttention) and module.parametrization == "chart":
                for name, values in module.chart_condition().items():
                    found[name] = max(found.get(name, 0.0), values.max().item())
        return found


class Measurement:
    """All runs of a protocol, written after each."""

    def __init__(self, protocol: Protocol, task: Task, seeds: int, out: Path) -> None:
        self.arms = Arms()
        self.protocol, self.task, self.seeds, self.out = protocol, task, seeds, out
        self.runs: list[Run] = []
        self.conditions: dict[str, dict[str, float]] = {}
        self.edges: list[str] = []

    def everything(self) -> None:
        """Tune every arm on seed 0, then run all at their best rates on the other seeds."""
        for name in self.arms.names:
            self._tune(name)
        for seed in range(1, self.seeds):
            for name in self.arms.names:
                best = best_run(self.runs, name)
                assert best is not None
                self.run(Trial(name, best.trial.rate, seed=seed))

    def _tune(self, name: str) -> None:
        rates = GRIDS[name.split(", ")[1]]
        search = search_rates(rates, extend=len(rates) > 1)
        pending, tried = next(search), list(rates)
        for _ in range(1 + EXTENSION_LIMIT):
            losses = [self.run(Trial(name, rate)).score for rate in pending]
            try:
                pending = search.send(losses)
                tried += pending
            except StopIteration as stop:
                if not stop.value.interior and len(tried) > 1:
                    self.edges.append(name)
                return
        self.edges.append(name)

    def run(self, trial: Trial) -> Run:
        """One run, recorded."""
        run = train(trial, self.protocol, self.task)
        self.runs.append(run)
        if conditions := self.arms.chart_conditions():
            self.conditions[str(trial)] = conditions
        print(f"{trial}: {run.final_loss} ({time.process_time():.0f} CPU seconds)", flush=True)
        self.save()
        return run

    def save(self) -> None:
        """Write JSON and table."""
        record = {
            "command": command_of(SCRIPT),
            "environment": describe_environment("cpu"),
            "protocol": asdict(self.protocol),
            "adamw_beta2": BETA2,
            "cpu_seconds": time.process_time(),
            "rates_on_the_edge": self.edges,
            "final_chart_conditions": self.conditions,
            "runs": [run.as_dict() for run in self.runs],
        }
        write(record, self.out)


def write(record: dict[str, Any], out: Path) -> None:
    """Write JSON and table."""
    write_atomically(out / FILE_NAME, json.dumps(record, indent=1, allow_nan=False))
    write_atomically(out / "invariant-attention.md", table(record))


def added_run(
    record: dict[str, Any], task: Task, name: str, rate: str, seed: str
) -> dict[str, Any]:
    """One more run of an arm."""
    Arms()
    trial = Trial(name, float(rate), seed=int(seed))
    run = train(trial, Protocol(**record["protocol"]), task)
    print(f"{trial}: {run.final_loss}", flush=True)
    return run.as_dict()


def float64_path(record: dict[str, Any], task: Task, steps: int) -> dict[str, Any]:
    """Differences of the training losses of the arms with QuotientAdam, in float64."""
    protocol, rate = Protocol(**record["protocol"]), GRIDS["QuotientAdam"][0]
    models, optimizers = [], []
    arms = Arms()
    for name in ("ordinary, QuotientAdam", "fixed-rank, QuotientAdam"):
        model = build_model(protocol, task, 0).double()
        models.append(model)
        optimizers += OPTIMIZERS[name].build(model, rate, SETTINGS, protocol)
    assert arms.model is models[1]
    apart = []
    for step, batch in zip(range(steps), task.training_batches(protocol, 0), strict=False):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * protocol.schedule(step)
            optimizer.zero_grad()
            loss = prediction_loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        apart.append(abs(losses[0] - losses[1]))
    return {"rate": rate, "seed": 0, "steps": steps, "differences": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--float64-path", type=int, nargs="?", const=25, metavar="STEPS")
    parser.add_argument("--add", nargs=3, metavar=("ARM", "RATE", "SEED"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    protocol = Protocol(steps=arguments.steps, layers=arguments.layers, width=arguments.width)
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    if arguments.float64_path is None and arguments.add is None:
        protocol = Protocol(**{**asdict(protocol), "data_digest": task.digest})
        Measurement(protocol, task, arguments.seeds, arguments.out).everything()
        return
    record = json.loads((arguments.out / FILE_NAME).read_text(encoding="utf-8"))
    if arguments.add is not None:
        run = added_run(record, task, *arguments.add)
        # Another process may have written in the meantime.
        record = json.loads((arguments.out / FILE_NAME).read_text(encoding="utf-8"))
        record["runs"].append(run)
    else:
        path = float64_path(record, task, arguments.float64_path)
        record = json.loads((arguments.out / FILE_NAME).read_text(encoding="utf-8"))
        record["float64_path"] = path
    record["cpu_seconds"] += time.process_time()
    record["later_commands"] = [*record.get("later_commands", []), command_of(SCRIPT)]
    write(record, arguments.out)


if __name__ == "__main__":
    main()
