"""The three schemes of the relational paper side by side, with Adam and QuotientAdam.

One tiny GPT on the text of Python's standard library. All but the attention is trained by AdamW in
every run, attention by

- ordinary parameters, AdamW;
- dressed representatives: Adam in the frame of the SVD section, the parameters themselves moved
  there (``dress_``) every ten steps, the optimizer's state with them;
- invariant parameters: the affine chart, exactly r(n + m − r) numbers per pair, AdamW;
- projected flow, discretised: QuotientSGD with momentum, Riemannian gradients and horizontal
  transport;
- QuotientAdam as it comes.

Measured are validation loss, the drift of the Noether charges, parameters and gauge directions,
numbers of optimizer state and time per step. Rates are tuned on a further seed.

    python benchmarks/reduced_training.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from experiment import ADAM, QUOTIENT_ADAM, QUOTIENT_SGD, note, png, run_experiment, standard_error
from torch import Tensor, nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.compare.data import load_corpus
from quotientopt.models import reference_model
from quotientopt.nn import InvariantAttention

RESULTS = Path(__file__).parent / "results" / "reduced-training"
MODEL = {"layers": 2, "width": 48, "heads": 4, "context": 48}
BATCH, STEPS, WARMUP, EVERY, REST_RATE = 12, 240, 20, 20, 4e-3
SEEDS, TUNING_SEED = (0, 1, 2), 9
RATES = {
    "ordinary parameters, AdamW": (4e-3, 8e-3, 1.6e-2),
    "dressed representatives": (4e-3, 8e-3, 1.6e-2),
    "invariant parameters (chart), AdamW": (4e-3, 8e-3, 1.6e-2),
    "projected flow (QuotientSGD)": (3e-3, 1e-2, 3e-2),
    "QuotientAdam": (4e-3, 8e-3, 1.6e-2),
}
COLORS = (ADAM, "#0072B2", "#009E73", QUOTIENT_SGD, QUOTIENT_ADAM)
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def batches(text: bytes, seed: int, count: int) -> list[Tensor]:
    """Random sequences with their successors."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(MODEL["context"] + 1)
    starts = torch.randint(len(data) - len(window), (count, BATCH, 1), generator=generator)
    return list(data[starts + window].long())


def prediction_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Cross-entropy of the next byte, in nats."""
    logits = model(sequences[:, :-1])
    return functional.cross_entropy(logits.flatten(0, -2), sequences[:, 1:].flatten())


class Run:
    """One model with one scheme: the optimizers, and what is done after a step."""

    def __init__(self, scheme: str, rate: float, seed: int) -> None:
        self.scheme, self.model = scheme, reference_model("gpt", seed, **MODEL)
        if scheme.startswith("invariant"):
            for block in self.model.blocks:  # type: ignore[union-attr]
                block.attention = InvariantAttention.from_attention(
                    block.attention, parametrization="chart"
                )
        self.attention = [p for n, p in self.model.named_parameters() if ".attention." in n]
        rest = [p for n, p in self.model.named_parameters() if ".attention." not in n]
        self.heads = qo.find_symmetries(self.model).heads
        self.own = self._optimizer(rate)
        self.optimizers = [self.own, torch.optim.AdamW(rest, lr=REST_RATE, **ADAM)]
        self.rates = [rate, REST_RATE]

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"symmetries": self.heads, "residual_frame": None, **ADAM}
        if self.scheme == "QuotientAdam":
            return qo.QuotientAdam(self.attention, lr=rate, **options)
        if self.scheme.startswith("dressed"):
            return qo.QuotientAdam(self.attention, lr=rate, head_frame="svd", **options)
        if self.scheme.startswith("projected"):
            return qo.QuotientSGD(self.attention, lr=rate, momentum=0.9, symmetries=self.heads)
        return torch.optim.AdamW(self.attention, lr=rate, **ADAM)

    def step(self, index: int, sequences: Tensor) -> None:
        """One step; rates rise over the warm-up and fall to a tenth in a straight line."""
        share = min(1.0, (index + 1) / WARMUP) * (1 - 0.9 * index / STEPS)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = share * rate
            optimizer.zero_grad()
        prediction_loss(self.model, sequences).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.scheme.startswith("dressed") and index % 10 == 9:
            qo.dress_(self.model, symmetries=self.heads, optimizer=self.own)

    def charges(self) -> dict[str, Tensor]:
        """Noether charges; none where no gauge is left."""
        return qo.noether_charges(self.model, symmetries=self.heads) if self.heads else {}

    def counts(self) -> dict[str, int]:
        """Numbers of the attention: parameters, gauge directions among them, optimizer state."""
        state = [value for entry in self.own.state.values() for value in entry.values()]
        tensors = [value for value in state if isinstance(value, Tensor)]
        return {
            "parameters": sum(p.numel() for p in self.attention),
            "gauge": sum(symmetry.heads * symmetry.group.dim for symmetry in self.heads),
            "state": sum(tensor.numel() for tensor in tensors),
        }


def drift_of(run: Run, start: dict[str, Tensor], size: float) -> float | None:
    """``‖C − C₀‖`` over the size of the factors at the start, all pairs together."""
    if not start:
        return None
    now = run.charges()
    apart = [torch.linalg.vector_norm(now[name] - start[name]) for name in start]
    return (torch.linalg.vector_norm(torch.stack(apart)) / size).item()


def size_of(run: Run) -> float:
    """Root of the sum of ``(‖AAᵀ‖ + ‖BBᵀ‖)²``."""
    sizes = []
    for symmetry in run.heads:
        factors = (torch.cat(side, dim=-1) for side in (symmetry.left, symmetry.right))
        norms = [torch.linalg.matrix_norm(X @ X.mT) for X in factors]
        sizes.append(torch.linalg.vector_norm(norms[0] + norms[1]))
    return torch.linalg.vector_norm(torch.stack(sizes)).item() if sizes else 1.0


def train(scheme: str, rate: float, seed: int, text: tuple[bytes, bytes]) -> dict[str, Any]:
    """A run, with validation loss and charges on the way."""
    run = Run(scheme, rate, seed)
    validation = batches(text[1], 1234, 8)
    start, size = run.charges(), size_of(run)
    curve: list[tuple[int, float, float | None]] = []
    times = []

    def measure(step: int) -> None:
        with torch.no_grad():
            losses = [prediction_loss(run.model, part).item() for part in validation]
        curve.append((step, statistics.fmean(losses), drift_of(run, start, size)))

    measure(0)
    for index, sequences in enumerate(batches(text[0], seed, STEPS)):
        begin = time.perf_counter()
        run.step(index, sequences)
        times.append(time.perf_counter() - begin)
        if (index + 1) % EVERY == 0:
            measure(index + 1)
    return {
        "rate": rate,
        "seed": seed,
        "steps": [step for step, _, _ in curve],
        "loss": [loss for _, loss, _ in curve],
        "drift": [drift for _, _, drift in curve],
        "milliseconds": 1000 * statistics.median(times),
        **run.counts(),
    }


def measure() -> dict[str, Any]:
    """Tuning, then the runs of every scheme."""
    corpus = load_corpus("stdlib", MODEL["context"])
    text = corpus.training, corpus.validation
    found: dict[str, Any] = {}
    for scheme, rates in RATES.items():
        tuning = {rate: train(scheme, rate, TUNING_SEED, text)["loss"][-1] for rate in rates}
        best = min(tuning, key=lambda rate: tuning[rate])
        runs = [train(scheme, best, seed, text) for seed in SEEDS]
        found[scheme] = {"tuning": {f"{rate:g}": loss for rate, loss in tuning.items()}}
        found[scheme] |= {"rate": best, "runs": runs}
        print(json.dumps({scheme: [run["loss"][-1] for run in runs]}), flush=True)
    settings = {"model": MODEL, "batch": BATCH, "steps": STEPS, "seeds": SEEDS, "rest": REST_RATE}
    return {"settings": settings, "corpus": corpus.digest, "schemes": found}


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    settings, environment = record["settings"], record["environment"]
    lines = [
        "# Reduced training, side by side",
        "",
        f"`{record['command']}`, {environment['processor']}, torch {environment['torch']}, "
        f"float32, one thread; {len(settings['seeds'])} seeds, mean ± standard error. A GPT of "
        f"{settings['model']['layers']} layers and width {settings['model']['width']}, "
        f"{settings['steps']} steps of {settings['batch']} × {settings['model']['context']} bytes "
        "of Python's standard library; everything but the attention by AdamW at "
        f"{settings['rest']:g}. Drift: ‖C − C₀‖ over ‖AAᵀ‖ + ‖BBᵀ‖, at the end; "
        "dressing goes to balanced factors, of charge zero, at once. Numbers are those of the "
        "attention; time is of the whole step.",
        "",
        "| scheme | rate, of those tried | validation loss (nats) | drift of the charges "
        "| parameters | of them gauge | optimizer state | ms a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scheme, entry in record["schemes"].items():
        runs = entry["runs"]
        losses = [run["loss"][-1] for run in runs]
        error = standard_error(losses) or 0.0
        drifts = [run["drift"][-1] for run in runs]
        drift = "none to drift" if None in drifts else f"{statistics.fmean(drifts):.2g}"
        first = runs[0]
        lines.append(
            f"| {scheme} | {entry['rate']:g} of {', '.join(entry['tuning'])} "
            f"| {statistics.fmean(losses):.3f} ± {error:.3f} | {drift} | {first['parameters']} "
            f"| {first['gauge']} | {first['state']} "
            f"| {statistics.median(run['milliseconds'] for run in runs):.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Curves of loss and of charges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (scheme, entry), color in zip(record["schemes"].items(), COLORS, strict=False):
        for run in entry["runs"]:
            label = scheme if run is entry["runs"][0] else None
            left.plot(run["steps"], run["loss"], color=color, lw=1.4, alpha=0.8, label=label)
            if None not in run["drift"]:
                right.plot(run["steps"][1:], run["drift"][1:], color=color, lw=1.4, alpha=0.8)
    last = [run["loss"][-1] for entry in record["schemes"].values() for run in entry["runs"]]
    left.set(xlabel="step", ylabel="validation loss (nats)", ylim=(min(last) - 0.1, 3.6))
    right.set(xlabel="step", ylabel="drift of the charges, relative", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    note(figure, "one line for each seed")
    return png(figure)


def main() -> None:
    """Command line."""
    run_experiment(
        "reduced_training.py",
        "The three schemes of the relational paper side by side.",
        RESULTS,
        measure,
        table,
        plot,
        indent=None,
    )


if __name__ == "__main__":
    main()
