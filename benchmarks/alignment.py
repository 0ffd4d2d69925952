"""What alignment does to the loss barrier between two trained models.

Pairs of small GPTs: *twins* (one model, and the same in another gauge, its heads in another order
and its residual stream rotated), *siblings* (one start, other batches) and *strangers* (other
starts, other batches). The second of each pair is moved by `align_` towards the first in stages,
and the validation loss is measured on the straight line between both. Its barrier is the largest
excess over the line between the losses at the ends. Writes everything measured as JSON, a table and
a plot.

    python benchmarks/alignment.py
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from experiment import BANDS, note, png, run_experiment
from torch import Tensor, nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.canonical import align_, distance, dress_
from quotientopt.canonical.moving import HeadOrder, attentions, reorder_
from quotientopt.compare.data import load_corpus
from quotientopt.models import reference_model

RESULTS = Path(__file__).parent / "results" / "alignment-gpt"
SEEDS = (0, 1, 2)
SHAPE = {"layers": 2, "width": 64, "heads": 4, "context": 32}
STEPS, BATCH, RATE, WEIGHT_DECAY = 150, 32, 4e-3, 0.1
POINTS, VALIDATION, CONDITION = 11, (2, 128), 10.0

Move = Callable[[nn.Module, nn.Module], Any]
STAGES: dict[str, Move] = {
    "as trained": lambda model, reference: None,
    "gauge": lambda model, reference: align_(model, reference, permute_heads=False, residual=False),
    "gauge, head order": lambda model, reference: align_(model, reference, residual=False),
    "gauge, head order, residual stream": align_,
}

STYLES = (("#000000", ":"), ("#0072B2", "-."), ("#009E73", "--"), ("#D55E00", "-"))


def sequences(data: Tensor, seed: int, size: int) -> Iterator[Tensor]:
    """Random sequences of bytes with one more at the end."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(SHAPE["context"] + 1)
    while True:
        starts = torch.randint(len(data) - len(window), (size, 1), generator=generator)
        yield data[starts + window].long()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next byte, nats."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(start: int, batches: int, data: Tensor) -> nn.Module:
    """A GPT from the weights of seed `start` after training on the batches of seed `batches`."""
    model = reference_model("gpt", start, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _, tokens in zip(range(STEPS), sequences(data, batches, BATCH), strict=False):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        schedule.step()
    return model


def twin_of(model: nn.Module, seed: int) -> nn.Module:
    """The same function: another gauge, other places of the heads, a rotated residual stream."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    symmetries = qo.find_symmetries(twin)
    symmetries.act_(symmetries.random_element(CONDITION, generator=generator))
    for pair in attentions(symmetries.heads).values():
        heads = torch.randperm(pair[0].heads, generator=generator)
        order = HeadOrder(heads, torch.zeros(len(heads), 1, dtype=torch.long))
        for symmetry in pair:
            reorder_(symmetry, order)
    return twin


@torch.no_grad()
def losses_between(one: nn.Module, two: nn.Module, batches: list[Tensor]) -> list[float]:
    """Validation losses at even distances on the straight line between two models."""
    between, losses = copy.deepcopy(one), []
    for step in range(POINTS):
        share = step / (POINTS - 1)
        for target, start, end in zip(
            between.parameters(), one.parameters(), two.parameters(), strict=True
        ):
            target.copy_(torch.lerp(start, end, share))
        losses.append(statistics.fmean(loss_of(between, tokens).item() for tokens in batches))
    return losses


def barrier(losses: list[float]) -> float:
    """Largest excess over the line between the ends."""
    last = len(losses) - 1
    return max(
        loss - (losses[0] * (last - i) + losses[-1] * i) / last for i, loss in enumerate(losses)
    )


def weights_apart(one: nn.Module, two: nn.Module) -> float:
    """Plain distance of all weights, over the root mean square of both norms."""
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    apart = sum((p - q).square().sum().item() for p, q in pairs)
    return (2 * apart / sum((p.square() + q.square()).sum().item() for p, q in pairs)) ** 0.5


def measure() -> list[dict[str, Any]]:
    """One row for each seed, kind of pair and stage."""
    corpus = load_corpus("stdlib", SHAPE["context"])
    data, held_out = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8)
        for part in (corpus.training, corpus.validation)
    )
    count, size = VALIDATION
    validation = [
        tokens for _, tokens in zip(range(count), sequences(held_out, 0, size), strict=False)
    ]
    rows = []
    for seed in SEEDS:
        first = trained(seed, seed, data)
        # The gauge that interpolation sees is the reference's: a balanced one.
        dress_(first, "balanced")
        others = {
            "twins": twin_of(first, seed),
            "siblings": trained(seed, 100 + seed, data),
            "strangers": trained(100 + seed, 100 + seed, data),
        }
        for kind, other in others.items():
            for stage, move in STAGES.items():
                moved = copy.deepcopy(other)
                move(moved, first)
                losses = losses_between(first, moved, validation)
                rows.append(
                    {
                        "seed": seed,
                        "pair": kind,
                        "stage": stage,
                        "barrier": barrier(losses),
                        "weights_apart": weights_apart(first, moved),
                        "invariants_apart": distance(first, moved, relative=True)["total"],
                        "losses": losses,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def spread(rows: list[dict[str, Any]], key: str) -> str:
    """Mean ± standard deviation over seeds."""
    values = [row[key] for row in rows]
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def chosen(record: dict[str, Any], pair: str, stage: str) -> list[dict[str, Any]]:
    """Rows of all seeds."""
    return [row for row in record["rows"] if (row["pair"], row["stage"]) == (pair, stage)]


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    settings, environment = record["settings"], record["environment"]
    lines = [
        "# Alignment and the loss barrier",
        "",
        f"`{record['command']}`, {environment['processor']}, torch {environment['torch']}, one "
        f"thread; seeds {', '.join(map(str, record['seeds']))}, mean ± standard deviation. `gpt` "
        f"({settings['layers']} layers, width {settings['width']}, {settings['heads']} heads) on "
        f"the standard library's sources, {settings['steps']} steps of AdamW. Barrier: largest "
        "excess of the validation loss (nats per byte) on the straight line between two models "
        "over the line between their losses. Weights apart: plain distance over the root mean "
        "square of both norms; invariants apart: `distance(relative=True)`, which sees the order "
        "of heads but no gauge.",
        "",
        "| pair | aligned by | barrier | weights apart | invariants apart |",
        "|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys(row["pair"] for row in record["rows"]):
        for stage in STAGES:
            rows = chosen(record, pair, stage)
            lines.append(
                f"| {pair} | {stage} | {spread(rows, 'barrier')} "
                f"| {spread(rows, 'weights_apart')} | {spread(rows, 'invariants_apart')} |"
            )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Losses between the models, mean and range over seeds, as PNG."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(row["pair"] for row in record["rows"]))
    figure = Figure(figsize=(4.2 * len(pairs), 3.8), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for stage, (color, style) in zip(STAGES, STYLES, strict=True):
        for axes, pair in zip(panels, pairs, strict=True):
            curves = list(zip(*(row["losses"] for row in chosen(record, pair, stage)), strict=True))
            share = [i / (len(curves) - 1) for i in range(len(curves))]
            means = [statistics.fmean(values) for values in curves]
            axes.plot(share, means, style, color=color, label=stage)
            low, high = [min(values) for values in curves], [max(values) for values in curves]
            axes.fill_between(share, low, high, color=color, alpha=0.12, linewidth=0)
    for axes, pair in zip(panels, pairs, strict=True):
        axes.set_title(pair)
        axes.set_xlabel("share of the second model")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss (nats per byte)")
    panels[len(panels) // 2].legend(frameon=False, fontsize=9)
    note(figure, BANDS)
    return png(figure)


def make_record() -> dict[str, Any]:
    """Settings and measurements."""
    return {
        "seeds": SEEDS,
        "settings": {
            **SHAPE,
            "steps": STEPS,
            "batch": BATCH,
            "rate": RATE,
            "weight_decay": WEIGHT_DECAY,
            "validation_sequences": VALIDATION[0] * VALIDATION[1],
            "condition_of_twins": CONDITION,
        },
        "rows": measure(),
    }


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    run_experiment("alignment.py", description, RESULTS, make_record, table, plot)


if __name__ == "__main__":
    main()
