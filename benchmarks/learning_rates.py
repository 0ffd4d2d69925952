"""The learning rate that someone brings from AdamW: what becomes of it under QuotientAdam.

Small models of several widths, depths and kinds are trained over a grid of learning rates by AdamW
and by QuotientAdam, and the ratio of the best rates is taken, with the sizes of updates on the
way, with the options of version 0.1.0. *Laws* multiply the updates of framed matrices (all matrices
of these models) by a factor, their decay staying lr · wd; they, and *today*, the present defaults,
are judged by the loss at AdamW's best rate, at twice it and at 1e-3.

    python benchmarks/learning_rates.py                            # every cell, ends with tables
    python benchmarks/learning_rates.py --cells gpt-64-4 --contenders "law 4"
    python benchmarks/learning_rates.py --report                   # tables and plot of the record

Runs in the record are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from experiment import ADAM, QUOTIENT_ADAM, command_of, png, standard_error
from torch import Tensor, nn

from quotientopt import QuotientAdam, find_symmetries
from quotientopt.compare.data import Task, load_task
from quotientopt.compare.optimizers import BETAS, FIRST_EDITION, OPTIMIZERS, Entry, Settings
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import Training, train

RESULTS = Path(__file__).parent / "results" / "learning-rates"
DATA = {"gpt": "stdlib", "llama": "stdlib", "vit": "mnist-5k"}
GPT = ("gpt-64-4", "gpt-128-4", "gpt-256-4", "gpt-64-2", "gpt-64-8")
CELLS = (*GPT, "llama-64-4", "llama-128-4", "vit-64-4", "vit-128-4")
DEFAULT_RATE = 1e-3
RATES = tuple(DEFAULT_RATE * 2**k for k in range(6))
SUBJECT, BASELINE = "quotient-adam", "adamw"
ADAMW = OPTIMIZERS["adamw"]
PROBED = (20, 50, 100, 150)
LEGEND = (
    ("o-", ADAM, "AdamW"),
    ("o-", QUOTIENT_ADAM, "QuotientAdam 0.1.0"),
    ("s:", QUOTIENT_ADAM, "QuotientAdam"),
)


@dataclass(frozen=True)
class Law:
    """What updates of framed matrices are multiplied by.

    Attributes
    ----------
    words : str
        The formula, for tables.
    factor : callable
        ``factor(kind, width)``, the kind as in `kind_of`, the width that of the residual stream,
        on which every matrix has an axis.
    """

    words: str
    factor: Callable[[str, int], float]


def _constant(value: float) -> Law:
    return Law(f"{value:g}", lambda kind, width: value)


def _with_kind(kinds: Sequence[str], times: float) -> Law:
    """Four, and `times` four for some kinds of matrices."""
    return Law(
        f"4, for {' and '.join(kinds)} {4 * times:g}",
        lambda kind, width: 4 * times if kind in kinds else 4.0,
    )


# Matrices whose factors are tried by themselves; those of a pair share theirs.
NAMES = "embedding", "positions", "query key", "value output", "up", "down", "head"
KINDS = tuple(tuple(names.split()) for names in NAMES)
LAWS = {
    "law 4": _constant(4.0),
    "law root": Law("√d / 2", lambda kind, width: width**0.5 / 2),
}
PARTS = {
    f"law 4, {'+'.join(kinds)} x {times:g}": _with_kind(kinds, times)
    for kinds in KINDS
    for times in (0.5, 2.0)
}


def kind_of(name: str) -> str:
    """What a matrix is, from its name: "query", "up", "embedding", …"""
    return name.removesuffix(".weight").rpartition(".")[2]


def protocol_of(cell: str, steps: int) -> Protocol:
    """Protocol of a cell ``model-width-layers``: small batches, a whole schedule."""
    model, width, layers = cell.split("-")
    images = model == "vit"
    return Protocol(
        model=model,
        data=DATA[model],
        steps=steps,
        batch=32 if images else 8,
        context=49 if images else 64,
        width=int(width),
        layers=int(layers),
        validation_batches=25,
    )


def build_adamw(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    """AdamW with the betas of QuotientAdam, so that nothing but the update differs."""
    return ADAMW.build(model, rate, {"beta2": BETAS[1]}, protocol)


def build_law(law: Law) -> Callable[..., list[torch.optim.Optimizer]]:
    """QuotientAdam under a law: one param group per factor, lr · weight decay being the same."""

    def build(
        model: nn.Module, rate: float, settings: Settings, protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        groups: dict[float, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            framed = parameter.ndim == 2
            factor = law.factor(kind_of(name), protocol.width) if framed else 1.0
            groups[factor].append((name, parameter))
        options = [
            {"params": own, "lr": rate * c, "weight_decay": protocol.weight_decay / c}
            for c, own in groups.items()
        ]
        return [
            QuotientAdam(options, betas=BETAS, symmetries=find_symmetries(model), **FIRST_EDITION)
        ]

    return build


def build_today(
    model: nn.Module, rate: float, settings: Settings, protocol: Protocol
) -> list[torch.optim.Optimizer]:
    """QuotientAdam as someone has it who changes one line."""
    return [QuotientAdam(model, lr=rate, betas=BETAS, weight_decay=protocol.weight_decay)]


TODAY = "today"
JUDGED = (*LAWS, TODAY)
CONTENDERS: dict[str, Entry] = {
    TODAY: Entry(TODAY, build_today, {}),
    BASELINE: Entry(BASELINE, build_adamw, {}),
    SUBJECT: Entry(SUBJECT, build_law(_constant(1.0)), {}),
    **{name: Entry(name, build_law(law), {}) for name, law in (LAWS | PARTS).items()},
}


# Puts the contenders in place of the comparison's entries while in its context.
Contenders = functools.partial(mock.patch.dict, OPTIMIZERS, CONTENDERS)


def update_sizes(trial: Trial, protocol: Protocol, task: Task) -> dict[str, dict[str, float]]:
    """Sizes of updates over lr along a training, without decay, by kind of matrix.

    Returns
    -------
    dict
        Kind to ``rms``, ‖U‖_F/√(nm), and ``spread``, ‖U‖₂ √min(n, m) / ‖U‖_F, one for a multiple
        of a polar factor; medians over layers and steps.
    """
    training = Training(trial, protocol, task)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step in range(1, max(PROBED) + 1):
        if step not in PROBED:
            training.step()
            continue
        named = {n: p for n, p in training.model.named_parameters() if p.ndim == 2}
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        training.step()
        groups = [group for o in training.optimizers for group in o.param_groups]
        options = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        for name, parameter in named.items():
            lr, decay = options[id(parameter)]
            update = (before[name] * (1 - lr * decay) - parameter.detach()) / lr
            found[kind_of(name)].append(_size(update))
    return {
        kind: {
            "rms": torch.tensor([rms for rms, _ in sizes]).median().item(),
            "spread": torch.tensor([spread for _, spread in sizes]).median().item(),
        }
        for kind, sizes in found.items()
    }


def _size(update: Tensor) -> tuple[float, float]:
    frobenius = torch.linalg.matrix_norm(update.double()).item()
    spectral = torch.linalg.matrix_norm(update.double(), 2).item()
    spread = spectral * math.sqrt(min(update.shape)) / frobenius if frobenius else math.nan
    return frobenius / math.sqrt(update.numel()), spread


def best_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """Vertex of the parabola through the best rate and its neighbours, and if it is interior."""
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < place < len(rates) - 1:
        return rates[place], False
    left, middle, right = (losses[rates[place + k]] for k in (-1, 0, 1))
    if not math.isfinite(left + right):
        return rates[place], True
    step = math.log2(rates[place + 1] / rates[place])
    return rates[place] * 2 ** (step * (left - right) / (2 * (left - 2 * middle + right))), True


class Record:
    """``learning-rates.json``: cells with their losses, rewritten after every run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "learning-rates.json"
        self.content: dict[str, Any] = {"cells": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def cell(self, name: str, steps: int) -> dict[str, Any]:
        """Losses of a cell, by contender and rate."""
        protocol = protocol_of(name, steps)
        fresh = {
            "protocol": {k: getattr(protocol, k) for k in ("steps", "batch", "context", "data")},
            "losses": {},
            "sizes": {},
        }
        cell = self.content["cells"].setdefault(name, fresh)
        if cell["protocol"] != fresh["protocol"]:
            sys.exit(f"{self.path}: {name} was made with {cell['protocol']}; give another --out")
        return cell

    def save(self) -> None:
        """Write the record, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")


def losses_of(cell: dict[str, Any], name: str) -> dict[float, float]:
    """Final losses of a contender by rate; a run that diverged counts as infinite."""
    found = {k: v for k, v in cell["losses"].get(name, {}).items() if "seed" not in k}
    return {float(k): math.inf if v is None else v for k, v in found.items()}


def measure(record: Record, name: str, contenders: Sequence[str], steps: int) -> None:
    """Make the runs of a cell that are missing.

    AdamW and QuotientAdam: the whole grid, and on where the optimum is on its edge. Others: 1e-3,
    AdamW's best rate and twice it. Parts of a law: AdamW's best rate, three seeds.
    """
    protocol, cell = protocol_of(name, steps), record.cell(name, steps)
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)

    def run(contender: str, rate: float, seed: int = 0) -> None:
        known = cell["losses"].setdefault(contender, {})
        key = f"{rate:g}" if seed == 0 else f"{rate:g} seed {seed}"
        if key not in known:
            known[key] = train(Trial(contender, rate, seed=seed), protocol, task).final_loss
            record.save()
            print(name, contender, key, known[key], flush=True)

    for contender in contenders:
        if contender in (BASELINE, SUBJECT):
            pending = list(RATES)
            while pending:
                for rate in pending:
                    run(contender, rate)
                rates = losses_of(cell, contender)
                best = min(rates, key=rates.__getitem__)
                edges = {max(rates): best * 2, min(rates): best / 2}
                pending = [edges[best]] if best in edges else []
            if contender not in cell["sizes"]:
                cell["sizes"][contender] = update_sizes(Trial(contender, best), protocol, task)
                record.save()
            continue
        losses = losses_of(cell, BASELINE)
        best = min(losses, key=losses.__getitem__)
        if contender in PARTS:
            for seed in range(3):
                run("law 4", best, seed)
                run(contender, best, seed)
        else:
            for rate in sorted({DEFAULT_RATE, best, 2 * best}):
                run(contender, rate)


def ratios(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Per cell: best rates, their ratio, and the ratio of the updates' spectral norms."""
    rows = []
    for name, cell in content["cells"].items():
        both = [losses_of(cell, contender) for contender in (BASELINE, SUBJECT)]
        if not all(both):
            continue
        (adamw, inside), (ours, ours_inside) = (best_rate(losses) for losses in both)
        norms = None
        if {BASELINE, SUBJECT} <= cell["sizes"].keys():
            sizes = [cell["sizes"][contender] for contender in (BASELINE, SUBJECT)]
            found = [[s["rms"] * s["spread"] for s in kinds.values()] for kinds in sizes]
            norms = statistics.geometric_mean(x / y for x, y in zip(*found, strict=True))
        rows.append(
            {
                "cell": name,
                "width": int(name.split("-")[1]),
                "adamw": adamw,
                "quotient_adam": ours,
                "interior": inside and ours_inside,
                "ratio": ours / adamw,
                "spectral_ratio": norms,
            }
        )
    return rows


def at(cell: dict[str, Any], contender: str, rate: float) -> float | None:
    """Loss of a run, None if it was not made."""
    return losses_of(cell, contender).get(float(f"{rate:g}"))


def bars(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Per cell and contender: losses at 1e-3, at AdamW's best rate of the grid and at twice it."""
    rows = []
    for name, cell in content["cells"].items():
        losses = losses_of(cell, BASELINE)
        best = min(losses, key=losses.__getitem__)
        for contender in (BASELINE, SUBJECT, *JUDGED):
            found = [at(cell, contender, rate) for rate in (DEFAULT_RATE, best, 2 * best)]
            if None not in found:
                rows.append({"cell": name, "contender": contender, "best": best, "losses": found})
    return rows


def parts(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What another factor for some matrices changes, seed by seed at AdamW's best rate."""
    rows = []
    for name, cell in content["cells"].items():
        losses = losses_of(cell, BASELINE)
        best = min(losses, key=losses.__getitem__)
        keys = [f"{best:g}", *(f"{best:g} seed {seed}" for seed in (1, 2))]
        for contender in PARTS:
            found = cell["losses"].get(contender, {})
            if all(key in found for key in keys):
                changes = [found[key] - cell["losses"]["law 4"][key] for key in keys]
                label, mean = contender.removeprefix("law 4, "), statistics.fmean(changes)
                error = standard_error(changes)
                rows.append({"cell": name, "part": label, "change": mean, "standard_error": error})
    return rows


def table(content: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# The learning rate brought from AdamW",
        "",
        "| model-width-layers | best rate: AdamW | QuotientAdam | ratio | of spectral norms |",
        "|---|---|---|---|---|",
    ]
    for r in ratios(content):
        lines.append(
            f"| {r['cell']} | {r['adamw']:.2g} | {r['quotient_adam']:.2g}"
            f"{'' if r['interior'] else ' (edge)'} | {r['ratio']:.1f} | "
            + ("– |" if r["spectral_ratio"] is None else f"{r['spectral_ratio']:.1f} |")
        )
    head = "| model-width-layers | updates times | at 1e-3 | at AdamW's best rate | at twice it |"
    lines += ["", head, "|---|---|---|---|---|"]
    for r in bars(content):
        words = "(AdamW)" if r["contender"] == BASELINE else "1"
        words = LAWS[r["contender"]].words if r["contender"] in LAWS else words
        words = "today's defaults" if r["contender"] == TODAY else words
        cells = " | ".join(f"{loss:.3f}" for loss in r["losses"])
        lines.append(f"| {r['cell']} ({r['best']:g}) | {words} | {cells} |")
    lines += ["", "| factor 4, but | loss less that of 4 everywhere |", "|---|---|"]
    lines += [
        f"| {r['part']} ({r['cell']}) | {r['change']:+.3f} ± {r['standard_error']:.3f} |"
        for r in parts(content)
    ]
    return "\n".join(lines) + "\n"


def plot(content: dict[str, Any]) -> bytes:
    """Losses against rates, cell by cell."""
    from matplotlib.figure import Figure

    # Two points are data, which the table has; a curve begins at three.
    cells = content["cells"].items()
    both = (BASELINE, SUBJECT)
    names = [n for n, cell in cells if all(len(losses_of(cell, c)) >= 3 for c in both)]
    columns, height = 3, math.ceil((len(names) + 1) / 3)  # the last place is for the legend
    figure = Figure(figsize=(3.2 * columns, 2.7 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    for axes, name in zip(grid, names, strict=False):
        cell = content["cells"][name]
        for contender, color in ((BASELINE, ADAM), (SUBJECT, QUOTIENT_ADAM)):
            losses = losses_of(cell, contender)
            axes.plot(sorted(losses), [losses[r] for r in sorted(losses)], "o-", color=color, ms=3)
        today = losses_of(cell, TODAY)
        points = sorted(today), [today[rate] for rate in sorted(today)]
        axes.plot(*points, "s:", color=QUOTIENT_ADAM, mfc="none", ms=5)
        finite = [x for x in losses_of(cell, BASELINE).values() if math.isfinite(x)]
        lowest = min([*losses_of(cell, SUBJECT).values(), *today.values()])
        highest = sorted(finite)[: max(3, len(finite) - 1)][-1]
        axes.set_ylim(lowest - 0.03 * (min(finite) - lowest + 0.3), highest)
        axes.set_xlim(4e-4, 8e-2)
        axes.set(xscale="log", title=name, xlabel="learning rate")
        axes.grid(alpha=0.3)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    handles = [grid[0].plot([], [], style, color=c)[0] for style, c, _ in LEGEND]
    labels = [label for _, _, label in LEGEND]
    grid[-1].legend(handles, labels, loc="center", frameon=False)
    figure.supylabel("validation loss (nats per byte; vit: per image)")
    return png(figure)


def main() -> None:
    """Measure what is missing, and write JSON, tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cells", default=",".join(CELLS), help="model-width-layers, comma-separated")
    add("--contenders", default=",".join((BASELINE, SUBJECT, *JUDGED)), help="comma-separated")
    add("--parts", action="store_true", help="also other factors for some matrices, three seeds")
    add("--steps", type=int, default=200)
    add("--report", action="store_true", help="measure nothing")
    add("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cells, contenders = arguments.cells.split(","), arguments.contenders.split(",")
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        parser.error(f"unknown contender {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
    torch.set_num_threads(1)
    record = Record(arguments.out)
    if not arguments.report:
        command = command_of("learning_rates.py")
        record.content["environment"] = describe_environment("cpu")
        if command not in record.content.setdefault("commands", []):
            record.content["commands"].append(command)
        with Contenders():
            for name in cells:
                own = contenders + (list(PARTS) if arguments.parts else [])
                measure(record, name, own, arguments.steps)
    record.content["ratios"] = ratios(record.content)
    record.save()
    for suffix, written in (("md", table(record.content)), ("png", plot(record.content))):
        write_atomically(record.path.with_suffix(f".{suffix}"), written)
    print(table(record.content))


if __name__ == "__main__":
    main()
