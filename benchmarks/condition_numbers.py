"""Who starts at condition 1000? The balancing element of every pair in weights as people have them.

For a pair (A, B) the balancing element is the symmetric g for which g⁻¹A and gB have one Gram
matrix, g² BBᵀ g² = AAᵀ: what separates the pair from its balanced gauge. Its condition number says
how far that is; a multiple of the identity counts for nothing here and is given apart, as the
ratio of sizes ‖A‖_F/‖B‖_F.

Trained checkpoints are measured as they are, fine-tuned, merged, pruned, rounded, and smoothed for
quantisation; adapters as they are initialised and after a short training.

    python benchmarks/condition_numbers.py

needs `pip install --no-deps -r tests/data-packages.txt` and peft. Takes five minutes.
"""

from __future__ import annotations

import copy
import itertools
import math
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from canonical_forms import MODELS, load
from experiment import png, run_experiment
from torch import Tensor, nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.groups import RotaryCommutant
from quotientopt.models import reference_model
from quotientopt.sections import balanced_element, rotary_balanced_element
from quotientopt.symmetries import HeadSymmetry

RESULTS = Path(__file__).parent / "results" / "condition-numbers"
ALBERT, MINILM, SMOLLM2 = MODELS
STEPS, BATCH, TOKENS, CLASSES = 60, 16, 64, 8
RANK = 8
ADAPTED = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]

Pairs = dict[str, list[tuple[float, float]]]


def gram(blocks: tuple[Tensor, ...]) -> Tensor:
    """Σ X Xᵀ over the blocks of a factor, in float64."""
    return torch.stack([x.double() @ x.double().mT for x in blocks]).sum(0)


def of_symmetry(symmetry: HeadSymmetry) -> list[tuple[float, float]]:
    """Condition of the balancing element and ratio of sizes, head by head.

    Infinite where a factor, or a plane that rotary positions turn, has vanished.
    """
    A, B = gram(symmetry.left), gram(symmetry.right)
    found = []
    for a, b in zip(A, B, strict=True):
        try:
            if isinstance(symmetry.group, RotaryCommutant):
                g, _ = rotary_balanced_element(symmetry.group, a, b)
            else:
                g, _ = balanced_element(a, b)
        except ValueError:
            found.append((math.inf, (a.trace() / b.trace()).sqrt().item()))
        else:
            found += measured(g, a, b)
    return found


def measured(g: Tensor, A: Tensor, B: Tensor) -> list[tuple[float, float]]:
    """Condition number of g and √(tr A / tr B), one entry per head."""
    values = torch.linalg.svdvals(g)
    trace_a, trace_b = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (A, B))
    condition = (values[..., 0] / values[..., -1]).flatten().tolist()
    return list(zip(condition, (trace_a / trace_b).sqrt().flatten().tolist(), strict=True))


def of_model(model: nn.Module) -> Pairs:
    """All heads of a model, by circuit: "qk" and "vo"."""
    found: Pairs = defaultdict(list)
    with torch.no_grad():
        for symmetry in qo.find_symmetries(model).heads:
            found[symmetry.name.rpartition(".")[2]] += of_symmetry(symmetry)
    return found


# ---- what people do to checkpoints ----


@torch.no_grad()
def pruned_(model: nn.Module, share: float) -> nn.Module:
    """Zero the smallest entries of every matrix of a head pair."""
    for parameter in pair_matrices(model):
        cut = parameter.abs().flatten().kthvalue(int(share * parameter.numel())).values
        parameter.mul_(parameter.abs() > cut)
    return model


@torch.no_grad()
def two_of_four_(model: nn.Module) -> nn.Module:
    """Zero the two smallest of every four entries along a row."""
    for parameter in pair_matrices(model):
        fours = parameter.unflatten(-1, (-1, 4))
        order = fours.abs().argsort(-1)
        parameter.copy_(fours.scatter(-1, order[..., :2], 0.0).flatten(-2))
    return model


@torch.no_grad()
def rounded_(model: nn.Module, bits: int = 4, group: int = 32) -> nn.Module:
    """Round to nearest in groups along a row, symmetric."""
    top = 2 ** (bits - 1) - 1
    for parameter in pair_matrices(model):
        groups = parameter.unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True) / top
        parameter.copy_(((groups / scale).round() * scale).flatten(-2))
    return model


def pair_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Matrices that head pairs live in."""
    blocks = (b for s in qo.find_symmetries(model).heads for b in s.blocks)
    found = {id(b.parameter): b.parameter for b in blocks if b.parameter.ndim == 2}
    return list(found.values())


def smoothed_(model: nn.Module, alpha: float, inputs: dict[str, Tensor]) -> nn.Module:
    """Scale values down and output columns up as SmoothQuant and AWQ do, channel by channel.

    s_j = max|x_j|^α / max|W_O[:, j]|^{1-α}, x the input of the output projection on a text: a
    diagonal element of GL(r). Query heads that share a value take its largest s.
    """
    symmetries = [s for s in qo.find_symmetries(model).heads if s.name.endswith("vo")]
    largest = largest_inputs(model, [s.left_blocks[0].parameter for s in symmetries], inputs)
    for symmetry in symmetries:
        scales = []
        for block in symmetry.left_blocks:
            if block.parameter.ndim == 1:
                continue
            x = largest[id(block.parameter)].expand_as(block.parameter)
            activation, weight = block.view(x.contiguous())[..., 0], block.view().abs().amax(-1)
            scales.append(activation**alpha / weight.clamp_min(1e-5) ** (1 - alpha))
        s = torch.stack(scales).amax(0).clamp_min(1e-5).double()
        symmetry.act_(torch.diag_embed(1 / s))
    return model


@torch.no_grad()
def largest_inputs(
    model: nn.Module, weights: list[Tensor], inputs: dict[str, Tensor]
) -> dict[int, Tensor]:
    """Largest absolute input of the linear layers that hold `weights`, channel by channel."""
    wanted, found, hooks = {id(w) for w in weights}, {}, []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and id(weight) in wanted:

            def keep(module: nn.Module, given: tuple[Tensor, ...], _: Any) -> None:
                seen = given[0].abs().flatten(0, -2).amax(0)
                key = id(module.weight)
                found[key] = torch.maximum(found[key], seen) if key in found else seen

            hooks.append(module.register_forward_hook(keep))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def merged(one: nn.Module, other: nn.Module, base: nn.Module, weight: float) -> nn.Module:
    """base + weight · Σ (fine-tuned − base): the mean of two at ½, task arithmetic at 1."""
    result = copy.deepcopy(base)
    with torch.no_grad():
        places = (m.parameters() for m in (result, one, other, base))
        for target, first, second, start in zip(*places, strict=True):
            target.copy_(start + weight * (first + second - 2 * start))
    return result


# ---- a little training ----


def chunks(seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of source text with the package of the standard library it is from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = ("asyncio", "email", "idlelib", "lib2to3", "multiprocessing", "unittest", "xml")
    texts = [
        [p.read_text(encoding="utf-8", errors="replace") for p in sorted(root.glob(f"{f}/*.py"))]
        for f in (*folders[: CLASSES - 1], "json")
    ]
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(max(1, high), (), generator=generator))

    while True:
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        words = []
        for label in labels.tolist():
            own = [t for t in texts[label] if t]
            text = own[draw(len(own))]
            start = draw(len(text) - 400)
            words.append(text[start : start + 400])
        yield words, labels


def trained(model: nn.Module, tokenizer: Any, seed: int, lr: float, steps: int = STEPS) -> None:
    """Train by AdamW to tell packages apart, from the mean of the last hidden states."""
    torch.manual_seed(seed)
    head = nn.Linear(model.config.hidden_size, CLASSES)
    parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.eval()  # without dropout
    for words, labels in itertools.islice(chunks(seed), steps):
        loss = functional.cross_entropy(
            head(model(**encoded(tokenizer, words)).last_hidden_state.mean(1)), labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def encoded(tokenizer: Any, words: list[str]) -> dict[str, Tensor]:
    """Tokens of texts, cut and filled up to one length."""
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    return dict(tokenizer(words, return_tensors="pt", **options))


def tokenizer_of(name: str) -> Any:
    """The tokenizer that comes with a checkpoint."""
    import transformers

    _, package, path, gguf, _ = MODELS[name]
    folder = metadata.distribution(package).locate_file(path)
    options = {"gguf_file": gguf} if gguf else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


# ---- adapters ----


def of_adapters(model: nn.Module) -> Pairs:
    """Low-rank pairs of a PEFT model, ΔW ∝ BA with A (r, in) and B (out, r)."""
    found: Pairs = defaultdict(list)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "lora_A", None):
                A, B = (x["default"].weight.detach() for x in (module.lora_A, module.lora_B))
                found["low-rank pairs"] += of_factors(B.mT, A)
    return found


def of_factors(left: Tensor, right: Tensor) -> list[tuple[float, float]]:
    """One pair; infinite where a factor is rank-deficient, as B = 0 is."""
    A, B = gram((left,)), gram((right,))
    if torch.linalg.matrix_rank(left) < len(left) or torch.linalg.matrix_rank(right) < len(right):
        return [(math.inf, (A.trace() / B.trace()).sqrt().item())]
    return measured(balanced_element(A, B)[0], A, B)


def adapter(model: nn.Module, kind: bool | str) -> nn.Module:
    """The model with adapters initialised as PEFT does."""
    import peft

    torch.manual_seed(0)
    options = {"r": RANK, "lora_alpha": RANK, "target_modules": ADAPTED}
    config = peft.LoraConfig(init_lora_weights=kind, **options)
    return peft.get_peft_model(copy.deepcopy(model), config)


def one_sided(model: nn.Module) -> Pairs:
    """Cut W = U Σ Vᵀ to rank r with all of Σ on one side: (U, Σ Vᵀ)."""
    found: Pairs = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(name.endswith(part) for part in ADAPTED):
            U, sigma, Vh = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
            right = sigma[:RANK, None] * Vh[:RANK]
            found["low-rank pairs"] += of_factors(U[:, :RANK].mT, right)
    return found


# ---- the table ----


def cases() -> Iterator[tuple[str, str, Pairs]]:
    """Model, what was done to it, and its pairs."""
    for name in ("gpt", "llama"):
        yield f"{name}, width 128", "before training", of_model(reference_model(name))
    for name in (ALBERT, MINILM, SMOLLM2):
        print(name, flush=True)
        model = load(name)
        yield name, "as published", of_model(model)
        yield name, "half of the entries pruned", of_model(pruned_(copy.deepcopy(model), 0.5))
        yield name, "80 % of the entries pruned", of_model(pruned_(copy.deepcopy(model), 0.8))
        yield name, "pruned 2 : 4", of_model(two_of_four_(copy.deepcopy(model)))
        yield name, "rounded to 4 bits", of_model(rounded_(copy.deepcopy(model)))
        if name == ALBERT:
            ids = torch.randint(5, model.config.vocab_size, (8, 32))
            inputs = {"input_ids": ids}
        else:
            tokenizer = tokenizer_of(name)
            inputs = encoded(tokenizer, next(chunks(0))[0])
        for alpha in (0.5, 0.8):
            smooth = smoothed_(copy.deepcopy(model), alpha, inputs)
            yield name, f"smoothed for quantisation, α = {alpha}", of_model(smooth)
        orthonormal = copy.deepcopy(model)
        qo.dress_(orthonormal, "orthonormal")
        yield name, "heads refactored, one factor orthonormal", of_model(orthonormal)
        if name == MINILM:
            yield from training_cases(name, model, tokenizer)


def training_cases(name: str, model: nn.Module, tokenizer: Any) -> Iterator[tuple[str, str, Pairs]]:
    """Fine-tuned, merged, adapted."""
    tuned = []
    for seed, lr in ((1, 1e-4), (2, 1e-4), (1, 1e-3)):
        tuned.append(copy.deepcopy(model))
        trained(tuned[-1], tokenizer, seed, lr)
    yield name, f"fine-tuned, AdamW 1e-4, {STEPS} steps", of_model(tuned[0])
    yield name, f"fine-tuned, AdamW 1e-3, {STEPS} steps", of_model(tuned[2])
    yield name, "mean of two fine-tunings", of_model(merged(*tuned[:2], model, 0.5))
    yield name, "sum of two task vectors", of_model(merged(*tuned[:2], model, 1.0))
    yield name, f"adapters of rank {RANK}, PiSSA", of_adapters(adapter(model, "pissa"))
    yield name, f"adapters of rank {RANK}, OLoRA", of_adapters(adapter(model, "olora"))
    yield name, f"adapters of rank {RANK}, SVD with Σ on one side", one_sided(model)
    for steps in (5, STEPS):
        lora = adapter(model, True)
        trained(lora, tokenizer, 1, 1e-3, steps)
        yield name, f"adapters of rank {RANK}, LoRA after {steps} steps of AdamW", of_adapters(lora)


def finite(value: Tensor) -> float | None:
    """A number for JSON, which knows no infinity: None there."""
    return value.item() if bool(value.isfinite()) else None


def row(model: str, start: str, circuit: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Quantiles over the heads."""
    conditions = torch.tensor([c for c, _ in pairs], dtype=torch.float64)
    sizes = torch.tensor([s for _, s in pairs], dtype=torch.float64)
    return {
        "model": model,
        "start": start,
        "circuit": circuit,
        "pairs": len(pairs),
        "condition": {
            "median": finite(conditions.median()),
            "90 %": finite(conditions.sort().values[int(0.9 * (len(pairs) - 1))]),
            "largest": finite(conditions.max()),
        },
        "above": {str(x): (conditions > x).double().mean().item() for x in (10, 100, 1000)},
        "size_ratio": {"least": sizes.min().item(), "most": sizes.max().item()},
    }


def measure() -> dict[str, Any]:
    """All rows."""
    rows = [
        row(model, start, circuit, pairs)
        for model, start, found in cases()
        for circuit, pairs in found.items()
    ]
    packages = ("transformers", "peft", *(MODELS[name][1] for name in MODELS))
    return {"versions": {p: metadata.version(p) for p in packages}, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """One line per start and circuit."""
    lines = [
        "# Condition numbers of the gauge",
        "",
        "| weights | what was done | pairs | condition: median | 90 % | largest | above 100 "
        "| sizes ‖A‖/‖B‖ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        c, s = r["condition"], r["size_ratio"]
        lines.append(
            f"| {r['model']} | {r['start']} | {r['pairs']} {r['circuit']} "
            + "".join("| ∞ " if x is None else f"| {x:.3g} " for x in c.values())
            + f"| {100 * r['above']['100']:.0f} % | {s['least']:.2g} … {s['most']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Median and largest condition of every row."""
    from matplotlib.figure import Figure

    rows = record["rows"][::-1]
    figure = Figure(figsize=(9, 0.17 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for key, marker in (("median", "o"), ("90 %", "."), ("largest", "|")):
        places = [i for i, r in enumerate(rows) if r["condition"][key] is not None]
        axes.scatter([rows[i]["condition"][key] for i in places], places, marker=marker, label=key)
    for place, r in enumerate(rows):
        if None in r["condition"].values():
            axes.annotate("∞", (0.99, place), xycoords=("axes fraction", "data"), ha="right")
    short = {ALBERT: "ALBERT", MINILM: "MiniLM", SMOLLM2: "SmolLM2"}
    labels = [f"{short.get(r['model'], r['model'])}, {r['start']} ({r['circuit']})" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_xlabel("condition number of the balancing element")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return png(figure)


if __name__ == "__main__":
    run_experiment("condition_numbers.py", __doc__.splitlines()[0], RESULTS, measure, table, plot)
