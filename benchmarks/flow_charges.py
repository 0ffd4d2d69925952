"""Gradient flow of a two-head attention conserves its charges; SGD nearly, Adam not.

A two-head attention learns the outputs of another one on a fixed batch, in float64: by the gradient
flow itself, by gradient descent and by Adam at several rates. Measured are the drift of the Noether
charges ``A Aᵀ − B Bᵀ``, how it depends on the rate, and the share of the motion that is vertical:
gauge, nothing that the attention computes. Writes everything measured as JSON, a table and a plot.

    python benchmarks/flow_charges.py
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiment import ADAM, FLOW, QUOTIENT_ADAM, SGD, note, png, run_experiment
from torch import Tensor, nn

import quotientopt as qo
from quotientopt.compare.optimizers import FIRST_EDITION
from quotientopt.flow import VerticalLog, projected_gradient_flow
from quotientopt.models import Attention

RESULTS = Path(__file__).parent / "results" / "flow-charges"
WIDTH, HEADS, LENGTH, BATCH = 8, 2, 6, 16
TIME, TOLERANCE = 2.0, 1e-10
RATES = (0.02, 0.01, 0.005, 0.0025)
# Adam moves every weight by about its rate a step: this is how far it gets in all.
REACH = 0.5
SEEDS = (0, 1, 2)
POINTS = 81

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate),
    "Adam": lambda model, rate: torch.optim.Adam(model.parameters(), lr=rate),
    "QuotientAdam": lambda model, rate: qo.QuotientAdam(
        model, lr=rate, weight_decay=0, **FIRST_EDITION
    ),
}
COLORS = {
    "gradient flow": FLOW,
    "SGD": SGD,
    "Adam": ADAM,
    "QuotientAdam": QUOTIENT_ADAM,
}


def problem(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A student attention and its loss: squared error to a teacher on one batch."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (Attention(WIDTH, HEADS).double() for _ in range(2))
    with torch.no_grad():
        for model, scale in ((student, 1.0), (teacher, 1.3)):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * WIDTH**-0.5 * noise)
        inputs = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
        targets = teacher(inputs)

    def loss(model: nn.Module) -> Tensor:
        return (model(inputs) - targets).square().mean(dim=(0, 1)).sum()

    return student, loss


def gradient_flow(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    """The flow itself, and its charges."""
    times = torch.linspace(0, TIME, POINTS, dtype=torch.float64)
    result = projected_gradient_flow(
        model, loss, (0, TIME), t_eval=times, rtol=TOLERANCE, atol=TOLERANCE / 100
    )
    sizes = {symmetry.name: size_of(symmetry) for symmetry in qo.find_symmetries(model).heads}
    drift = torch.stack([d / sizes[name] for name, d in result.charge_drift().items()])
    return {
        "loss": result.loss.tolist(),
        "drift": drift.amax(dim=0).tolist(),
        "charges": charges_of(result.charges),
        "vertical_share": result.vertical_share.max().item() ** 2,
        "evaluations": result.evaluations,
    }


def size_of(symmetry: qo.HeadSymmetry) -> float:
    """``‖AAᵀ‖ + ‖BBᵀ‖`` over all heads, as in the drift of a ChargeLog."""
    factors = (torch.cat(side, dim=-1) for side in (symmetry.left, symmetry.right))
    norms = [torch.linalg.matrix_norm(X @ X.mT) for X in factors]
    return torch.linalg.vector_norm(norms[0] + norms[1]).item()


def charges_of(charges: dict[str, Tensor]) -> list[list[float]]:
    """Diagonal entries of every charge at every time."""
    entries = [c.diagonal(dim1=-2, dim2=-1).flatten(1) for c in charges.values()]
    return torch.cat(entries, dim=1).tolist()


def training(
    name: str, rate: float, model: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> dict[str, Any]:
    """A run of an optimizer: for SGD as long in time as the flow, for the others by reach."""
    model = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model, rate)
    steps = round((TIME if name == "SGD" else REACH) / rate)
    losses, charges = [loss(model).item()], [qo.noether_charges(model)]
    vertical = VerticalLog(model, optimizer)
    invariantly = VerticalLog(model, optimizer, metric="preconditioned")
    with qo.ChargeLog(model, optimizer) as log, vertical, invariantly:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            losses.append(loss(model).item())
            charges.append(qo.noether_charges(model))
    drifts = [max(record.drift.values()) for record in log.records]
    motion = vertical.motion
    kept = sorted({round(k * steps / (POINTS - 1)) for k in range(POINTS)})
    lengths = motion.cumulative_vertical, motion.cumulative_horizontal
    stacked = {pair: torch.stack([charges[k][pair] for k in kept]) for pair in charges[0]}
    return {
        "rate": rate,
        "steps": steps,
        "kept": kept,
        "loss": [losses[k] for k in kept],
        "drift": [drifts[k] for k in kept],
        "first_step_drift": drifts[1],
        "charges": charges_of(stacked),
        "vertical_length": [float(lengths[0][max(k - 1, 0)]) for k in kept],
        "horizontal_length": [float(lengths[1][max(k - 1, 0)]) for k in kept],
        "vertical_share": motion.total_share,
        "invariant_vertical_share": invariantly.motion.total_share,
        "isotropic_share": motion.isotropic_share,
    }


def exponent(rates: list[float], drifts: list[float]) -> float:
    """Slope of log drift against log rate, by least squares."""
    x, y = ([math.log(v) for v in values] for values in (rates, drifts))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def measure() -> list[dict[str, Any]]:
    """One entry for each seed: the flow, and the runs and exponents of every optimizer."""
    found = []
    for seed in SEEDS:
        model, loss = problem(seed)
        entry: dict[str, Any] = {"seed": seed, "flow": gradient_flow(model, loss), "runs": {}}
        entry["exponents"] = {}
        for name in OPTIMIZERS:
            runs = [training(name, rate, model, loss) for rate in RATES]
            entry["runs"][name] = runs
            entry["exponents"][name] = {
                "one step": exponent(list(RATES), [run["first_step_drift"] for run in runs]),
                "whole run": exponent(list(RATES), [run["drift"][-1] for run in runs]),
            }
        found.append(entry)
        # Only what the plot shows of the charges themselves.
        for name, runs in entry["runs"].items():
            for k, run in enumerate(runs):
                if seed != SEEDS[0] or name != "Adam" or k:
                    del run["charges"]
        if seed != SEEDS[0]:
            del entry["flow"]["charges"]
        print(json.dumps({"seed": seed, "exponents": entry["exponents"]}), flush=True)
    return found


def spread(values: list[float], form: str) -> str:
    """Smallest to largest over seeds."""
    return f"{format(min(values), form)} … {format(max(values), form)}"


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    settings, environment, seeds = record["settings"], record["environment"], record["seeds"]
    isotropic = seeds[0]["runs"]["Adam"][0]["isotropic_share"]["qk"]
    lines = [
        "# Charges along the flow, under SGD and under Adam",
        "",
        f"`{record['command']}`, {environment['processor']}, torch {environment['torch']}, "
        f"float64, one thread; {len(seeds)} seeds, smallest … largest. A two-head attention of "
        f"width {settings['width']} learns another one's outputs on a fixed batch. Flow and SGD "
        f"run for the time {settings['time']}, the others until rate × steps is "
        f"{settings['reach']}. Drift: ‖C − C₀‖ over ‖AAᵀ‖ + ‖BBᵀ‖ at the start, largest of "
        "the run, the larger of both pairs. Vertical: share of the squared length of all steps "
        "that lies along the orbits; of "
        f"directions drawn evenly it would be {isotropic:.0%} in the Euclidean metric.",
        "",
        "| method | rate | loss at the start | at the end | drift | vertical, Euclidean "
        "| preconditioned |",
        "|---|---|---|---|---|---|---|",
    ]

    def row(name: str, rate: str, runs: list[dict[str, Any]]) -> str:
        shares = [
            spread(values, ".1e" if max(values) < 1e-3 else ".1%")
            for key in ("vertical_share", "invariant_vertical_share")
            if (values := [run[key] for run in runs if key in run])
        ]
        return (
            f"| {name} | {rate} | {spread([r['loss'][0] for r in runs], '.2f')} "
            f"| {spread([r['loss'][-1] for r in runs], '.3f')} "
            f"| {spread([max(r['drift']) for r in runs], '.1e')} "
            f"| {' | '.join(shares) if len(shares) == 2 else shares[0] + ' | '} |"
        )

    lines.append(row("gradient flow", "0", [entry["flow"] for entry in seeds]))
    for name in OPTIMIZERS:
        for k, rate in enumerate(settings["rates"]):
            lines.append(row(name, f"{rate:g}", [entry["runs"][name][k] for entry in seeds]))
    lines += ["", "Drift ∝ rate to the power of:", "", "| method | one step | whole run |"]
    lines.append("|---|---|---|")
    for name in OPTIMIZERS:
        powers = [
            spread([entry["exponents"][name][part] for entry in seeds], ".2f")
            for part in ("one step", "whole run")
        ]
        lines.append(f"| {name} | {powers[0]} | {powers[1]} |")
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any]) -> bytes:
    """Charges, drift and vertical motion of the first seed, as PNG."""
    from matplotlib.figure import Figure

    entry, rates = record["seeds"][0], record["settings"]["rates"]
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (charges, drift), (powers, gauge) = figure.subplots(2, 2)

    def progress(run: dict[str, Any]) -> list[float]:
        """Shares of the run at which it was recorded."""
        kept = run.get("kept", range(POINTS))
        return [k / kept[-1] for k in kept]

    for name, run in (("gradient flow", entry["flow"]), ("Adam", entry["runs"]["Adam"][0])):
        for k, line in enumerate(zip(*run["charges"], strict=True)):
            label = name if k == 0 else None
            style = "-" if name == "gradient flow" else "--"
            charges.plot(progress(run), line, style, color=COLORS[name], linewidth=1, label=label)
    charges.set_title("diagonal entries of AAᵀ − BBᵀ, both heads and pairs")
    charges.set(xlabel="share of the run", ylabel="entry of the charge C")
    flow = entry["flow"]
    drift.semilogy(progress(flow)[1:], flow["drift"][1:], color=COLORS["gradient flow"])
    drift.annotate("gradient flow", (1, 3 * flow["drift"][-1]), ha="right")
    for name in ("SGD", "Adam"):
        for k, run in enumerate(entry["runs"][name]):
            label = f"{name}, rates {rates[0]:g} … {rates[-1]:g}" if k == 0 else None
            drift.semilogy(
                progress(run)[1:],
                run["drift"][1:],
                color=COLORS[name],
                alpha=1 - 0.2 * k,
                label=label,
            )
    drift.set_title("drift of the charges, relative")
    drift.set(xlabel="share of the run", ylabel="‖C − C₀‖ / (‖AAᵀ‖ + ‖BBᵀ‖)")
    for name in OPTIMIZERS:
        runs = entry["runs"][name]
        for part, style, values in (
            ("one step", "--", [run["first_step_drift"] for run in runs]),
            ("whole run", "-", [run["drift"][-1] for run in runs]),
        ):
            power = entry["exponents"][name][part]
            label = f"{name}, {part}: rate^{power:.2f}"
            powers.loglog(rates, values, f"o{style}", color=COLORS[name], label=label, ms=4)
    powers.set_title("drift against the rate")
    powers.set(xlabel="learning rate", ylabel="‖C − C₀‖ / (‖AAᵀ‖ + ‖BBᵀ‖)")
    powers.set_ylim(1e-9, None)
    powers.set_xticks(rates, [f"{rate:g}" for rate in rates])
    powers.minorticks_off()
    for name in OPTIMIZERS:
        run = entry["runs"][name][-1]
        pairs = zip(run["vertical_length"], run["horizontal_length"], strict=True)
        share = [v / (v + h) for v, h in pairs]
        gauge.plot(progress(run), share, color=COLORS[name], label=f"{name}, rate {run['rate']:g}")
    gauge.set_title("vertical length over vertical + horizontal length so far")
    gauge.set(xlabel="share of the run", ylabel="vertical share of the length")
    gauge.set_ylim(-0.02, None)
    for axes in (charges, drift, powers, gauge):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    note(figure, "first of the seeds; fainter lines have lower rates")
    return png(figure)


def make_record() -> dict[str, Any]:
    """Settings and measurements."""
    return {
        "settings": {
            "width": WIDTH,
            "heads": HEADS,
            "length": LENGTH,
            "batch": BATCH,
            "time": TIME,
            "tolerance": TOLERANCE,
            "rates": RATES,
            "reach": REACH,
        },
        "seeds": measure(),
    }


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    run_experiment("flow_charges.py", description, RESULTS, make_record, table, plot, indent=None)


if __name__ == "__main__":
    main()
