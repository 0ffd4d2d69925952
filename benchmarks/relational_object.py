"""The relational object of a trained model: an ordinary model, its canonical and relational form.

A tiny GPT is trained on the text of Python's standard library and moved to another gauge of its
heads and another frame of its residual stream. Compared are both as they are, their canonical forms
(``dress_`` with the residual stream) and their relational forms; drawn is the relational object of
one layer, all inner products of its rows, and which inner products the trained model uses.

    python benchmarks/relational_object.py
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from experiment import png, run_experiment
from reduced_training import BATCH, MODEL, batches, prediction_loss
from torch import Tensor, nn

import quotientopt as qo
from quotientopt.compare.data import load_corpus
from quotientopt.compare.optimizers import FIRST_EDITION
from quotientopt.models import reference_model
from quotientopt.nn import relational_form

RESULTS = Path(__file__).parent / "results" / "relational-object"
STEPS, RATE, SEED, LAYER = 300, 8e-3, 0, 1
PARTS = ("attention.query", "attention.key", "attention.value", "attention.output")
MLP = ("mlp.up", "mlp.down")
SHORT = {
    "tokens": "tokens",
    "positions": "positions",
    "attention.query": "query",
    "attention.key": "key",
    "attention.value": "value",
    "attention.output": "output",
    "mlp.up": "up",
    "mlp.down": "down",
    "head": "head",
}


def trained(text: bytes) -> nn.Module:
    """A GPT after some hundred steps of QuotientAdam, in float64."""
    model = reference_model("gpt", SEED, **MODEL)
    optimizer = qo.QuotientAdam(
        model, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, **FIRST_EDITION
    )
    for index, sequences in enumerate(batches(text, SEED, STEPS)):
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1, (index + 1) / 20) * (1 - 0.9 * index / STEPS)
        )
        optimizer.zero_grad()
        prediction_loss(model, sequences).backward()
        optimizer.step()
    return model.double()


def label(name: str) -> str:
    """A short name with the number of the layer."""
    if not name.startswith("blocks."):
        return SHORT[name]
    _, layer, part = name.split(".", 2)
    return f"{SHORT[part]} {layer}"


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """Vectors of one layer in the stream, by part: of the MLP the first ones."""
    block = model.blocks[LAYER]  # type: ignore[index]
    attention, mlp = block.attention, block.mlp
    matrices = (attention.query, attention.key, attention.value, attention.output, mlp.up, mlp.down)
    turned = ("attention.output", "mlp.down")
    found = zip((*PARTS, *MLP), matrices, strict=True)
    rows = {n: (m.weight.mT if n in turned else m.weight).detach() for n, m in found}
    return {name: part[: MODEL["width"]] for name, part in rows.items()}


def cosines(rows: dict[str, Tensor]) -> Tensor:
    """Inner products of unit vectors."""
    stacked = torch.cat(list(rows.values()))
    unit = stacked / torch.linalg.vector_norm(stacked, dim=-1, keepdim=True)
    return unit @ unit.mT


def deviation(one: Tensor, two: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((one - two).abs().max() / two.abs().max()).item()


def parameters(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def measure() -> dict[str, Any]:
    """Train, move, compare."""
    corpus = load_corpus("stdlib", MODEL["context"])
    model = trained(corpus.training)
    ids = torch.cat(batches(corpus.validation, 7, 1))[:, :-1]
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    generator = torch.Generator().manual_seed(1)
    symmetries.act_(symmetries.random_element(cond=10.0, generator=generator))
    canonical = [copy.deepcopy(one) for one in (model, twin)]
    for one in canonical:
        qo.dress_(one, residual=True)
    forms = [relational_form(one) for one in canonical]
    states = [torch.cat([t.flatten() for t in form.state_dict().values()]) for form in forms]
    with torch.no_grad():
        logits = model(ids)
        functions = {
            "its twin": deviation(twin(ids), logits),
            "canonical form": deviation(canonical[0](ids), logits),
            "relational form": deviation(forms[0](ids), logits),
        }
        loss = prediction_loss(model, torch.cat(batches(corpus.validation, 1234, 8))).item()
    numbers = {
        "ordinary": deviation(parameters(twin), parameters(model)),
        "canonical": deviation(parameters(canonical[1]), parameters(canonical[0])),
        "relational": deviation(states[1], states[0]),
    }
    used = forms[0].contributions(ids)
    width = reference_model("gpt", SEED, **MODEL).blocks[0].attention.head_width  # type: ignore
    keys = ("attention.query", "attention.key")
    pictures = {
        kind: [[rows_of(one)[key][:width].tolist() for key in keys] for one in pair]
        for kind, pair in (("ordinary", (model, twin)), ("canonical", canonical))
    }
    pictures["relational"] = [
        [cosines({key: rows_of(one)[key][:width] for key in keys}).tolist()] for one in canonical
    ]
    return {
        "settings": {"model": MODEL, "steps": STEPS, "batch": BATCH, "seed": SEED, "layer": LAYER},
        "corpus": corpus.digest,
        "loss": loss,
        "functions": functions,
        "numbers": numbers,
        "cost": forms[0].cost(),
        "used": [[label(a), label(b), value.item()] for (a, b), value in used.items()],
        "sizes": {name: len(rows) for name, rows in rows_of(canonical[0]).items()},
        "gram": [[round(x, 2) for x in row] for row in cosines(rows_of(canonical[0])).tolist()],
        "pictures": json.loads(json.dumps(pictures), parse_float=lambda x: round(float(x), 3)),
    }


def table(record: dict[str, Any]) -> str:
    """What is equal, as Markdown."""
    functions, numbers, cost = record["functions"], record["numbers"], record["cost"]
    size = record["settings"]["model"]
    lines = [
        "# An ordinary model, its canonical form and its relational form",
        "",
        f"`{record['command']}`, {record['environment']['processor']}, torch "
        f"{record['environment']['torch']}, float64. A GPT of {size['layers']} layers and width "
        f"{size['width']} after {STEPS} steps (validation loss {record['loss']:.2f} nats), and a "
        "twin in another gauge of every head (condition 10) and another frame of the stream. "
        "Largest differences over the largest entry.",
        "",
        "| | logits, from those of the model | all numbers, of the twin from the model's |",
        "|---|---|---|",
        f"| ordinary | {functions['its twin']:.0e} | {numbers['ordinary']:.1e} |",
        f"| canonical form | {functions['canonical form']:.0e} | {numbers['canonical']:.0e} |",
        f"| relational form | {functions['relational form']:.0e} | {numbers['relational']:.0e} |",
        "",
        f"Numbers kept: {cost['parameters']} parameters, {cost['kept']} inner products; "
        f"multiplications per token {cost['per token, original']} and {cost['per token']}.",
    ]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Three pictures: side by side, the relational object of a layer, what is used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    panels = top.subplots(2, 5, width_ratios=(1, 1, 1, 1, 0.62))
    for row, owner in enumerate(("model", "twin")):
        for column, (kind, part) in enumerate(
            (
                ("ordinary", 0),
                ("ordinary", 1),
                ("canonical", 0),
                ("canonical", 1),
                ("relational", 0),
            )
        ):
            axes = panels[row][column]
            picture = torch.tensor(record["pictures"][kind][row][part]).numpy()
            limit = 1.0 if kind == "relational" else abs(picture).max()
            axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(owner)
            if row == 0:
                name = f"{kind}: {('query', 'key')[part]}"
                axes.set_title("inner products" if kind == "relational" else name, fontsize=10)
    top.suptitle("One head in two gauges", fontsize=12)
    left, right = bottom.subplots(1, 2)
    image = left.imshow(torch.tensor(record["gram"]).numpy(), cmap="RdBu_r", vmin=-0.6, vmax=0.6)
    edges = [0]
    for size in record["sizes"].values():
        edges.append(edges[-1] + size)
    for edge in edges[1:-1]:
        left.axhline(edge - 0.5, color="black", lw=0.5)
        left.axvline(edge - 0.5, color="black", lw=0.5)
    centres = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    names = [SHORT[name] for name in record["sizes"]]
    left.set_xticks(centres, names, rotation=60, fontsize=8)
    left.set_yticks(centres, names, fontsize=8)
    left.set_title(f"The relational object of layer {LAYER}: cosines of its rows", fontsize=11)
    bottom.colorbar(image, ax=left, shrink=0.75)
    sources = list(dict.fromkeys(a for a, _, _ in record["used"]))
    readers = [b for b in dict.fromkeys(b for _, b, _ in record["used"]) if b not in sources]
    shares = torch.full((len(sources), len(readers)), torch.nan)
    for a, b, value in record["used"]:
        if b in readers:
            shares[sources.index(a), readers.index(b)] = value**2
    shares = shares / shares.nansum(dim=0)
    image = right.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for i in range(len(sources)):
        for j in range(len(readers)):
            if not shares[i, j].isnan():
                color = "white" if shares[i, j] < 0.6 else "black"
                right.text(
                    j, i, f"{shares[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color
                )
    right.set_xticks(range(len(readers)), readers, rotation=60, fontsize=8)
    right.set_yticks(range(len(sources)), sources, fontsize=8)
    right.set(xlabel="read by", ylabel="written by")
    right.set_title("Which inner products it uses: shares of ⟨x, w⟩²", fontsize=11)
    return png(figure)


def main() -> None:
    """Command line."""
    run_experiment(
        "relational_object.py",
        "An ordinary model, its canonical form and its relational form.",
        RESULTS,
        measure,
        table,
        plot,
        indent=None,
    )


if __name__ == "__main__":
    main()
