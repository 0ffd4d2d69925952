"""Energies of charged particles, learned in one orientation and asked for in any.

Five particles of charges ±1 at least one unit apart have the energy ``Σ q_i q_j / r + 4 ε (r^−12 −
r^−6)``, which no rotation changes. All configurations to learn from lie along their principal axes
(the section "svd" of the quotient R^{N×3}/O(3)). A relational transformer, which reads their Gram
matrices, and an ordinary one of as many parameters, which reads coordinates, are tested on such
configurations and on the same ones rotated. Two ways out for the ordinary one are measured too:
training on randomly rotated configurations, and dressing the rotated test data before it reads
them. Writes everything measured as JSON, a table and a plot.

    python benchmarks/relational_energies.py
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from experiment import BANDS, mean_and_range, note, png, run_experiment, standard_error
from torch import Tensor, nn

from quotientopt._linalg import random_orthogonal
from quotientopt.nn.relational_embedding import embed_tokens
from quotientopt.nn.relational_transformer import RelationalTransformer
from quotientopt.sections import gram_svd

RESULTS = Path(__file__).parent / "results" / "relational-energies"
SEEDS = (0, 1, 2)
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
TUNING_SEED, TEST_SEED = 100, 1000
PARTICLES, CHARGES = 5, (1.0, 1.0, 1.0, -1.0, -1.0)
BOX, CLOSEST, DEPTH = (2.5, 1.6, 1.0), 1.0, 0.25
TRAINING, TEST = 8000, 2000
STEPS, BATCH, WEIGHT_DECAY, CLIP = 3000, 64, 1e-2, 1.0
LAYERS, HEADS, FEATURES = 2, 4, 32
ORDINARY_WIDTH, ORDINARY_HIDDEN = 40, 64
ANGLES = tuple(range(0, 181, 15))

Data = tuple[Tensor, Tensor, Tensor]


def energy(X: Tensor, charges: Tensor) -> Tensor:
    """Coulomb and Lennard-Jones energy, (*batch, N, 3), (*batch, N) -> (*batch,)."""
    first, second = torch.triu_indices(X.shape[-2], X.shape[-2], offset=1)
    r = (X[..., first, :] - X[..., second, :]).norm(dim=-1)
    products = charges[..., first] * charges[..., second]
    return (products / r + 4 * DEPTH * (r**-12 - r**-6)).sum(dim=-1)


def configurations(count: int, seed: int) -> Data:
    """Positions along their principal axes, centre at zero; charges in random order; energies."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.tensor(BOX, dtype=torch.float64)
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        uniform = torch.rand(4 * count, PARTICLES, 3, generator=generator, dtype=torch.float64)
        X = (2 * uniform - 1) * half
        apart = torch.cdist(X, X) + 2 * CLOSEST * torch.eye(PARTICLES, dtype=torch.float64)
        kept.append(X[apart.amin(dim=(-2, -1)) > CLOSEST])
    X = torch.cat(kept)[:count]
    X, _ = gram_svd(X - X.mean(dim=-2, keepdim=True))
    order = torch.rand(count, PARTICLES, generator=generator).argsort(dim=-1)
    charges = torch.tensor(CHARGES, dtype=torch.float64)[order]
    return X, charges, energy(X, charges)


class Relational(nn.Module):
    """A relational transformer on the Gram matrix of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = RelationalTransformer(
            LAYERS, HEADS, features=FEATURES, hidden=FEATURES, token_features=1, readout="sum"
        )

    def forward(self, X: Tensor, charges: Tensor) -> Tensor:
        return self.transformer(embed_tokens(X), charges.unsqueeze(-1)).squeeze(-1)


class Ordinary(nn.Module):
    """torch's encoder on coordinates and charges, summed over the particles."""

    def __init__(self) -> None:
        super().__init__()
        width = ORDINARY_WIDTH
        layer = nn.TransformerEncoderLayer(
            width, HEADS, ORDINARY_HIDDEN, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.embedding = nn.Linear(4, width)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.readout = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, X: Tensor, charges: Tensor) -> Tensor:
        tokens = self.embedding(torch.cat((X, charges.unsqueeze(-1)), dim=-1))
        return self.readout(self.encoder(tokens)).sum(dim=-2).squeeze(-1)


MODELS: dict[str, tuple[type[nn.Module], bool]] = {
    "relational": (Relational, False),
    "ordinary": (Ordinary, False),
    "ordinary, trained on rotated": (Ordinary, True),
}


def trained(name: str, rate: float, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """A model after training in float32, now in float64, and what it cost."""
    kind, rotate = MODELS[name]
    X, charges, energies = configurations(TRAINING, seed)
    shift, unit = energies.mean(), energies.std()
    inputs = [tensor.float() for tensor in (X, charges, (energies - shift) / unit)]
    torch.manual_seed(seed)
    model = kind()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(STEPS):
        chosen = torch.randint(TRAINING, (BATCH,), generator=generator)
        x, q, target = (tensor[chosen] for tensor in inputs)
        if rotate:
            x = x @ random_orthogonal((BATCH,), 3, generator=generator).float()
        loss = (model(x, q) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    cost = {
        "processor_seconds": round(time.process_time() - start, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shift": shift.item(),
        "unit": unit.item(),
    }
    return model.double(), cost


@torch.no_grad()
def error(model: nn.Module, cost: dict[str, float], data: Data) -> float:
    """Root mean square error of the energies."""
    X, charges, energies = data
    predicted = cost["shift"] + cost["unit"] * model(X, charges)
    return (predicted - energies).square().mean().sqrt().item()


def turns(count: int, degrees: float, seed: int) -> Tensor:
    """Rotations by one angle about random axes, (count, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    x, y, z = (axes / axes.norm(dim=-1, keepdim=True)).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).reshape(count, 3, 3)
    return torch.linalg.matrix_exp(math.radians(degrees) * cross)


def tested(model: nn.Module, cost: dict[str, float]) -> dict[str, Any]:
    """Errors on test data as they are, in a random orientation, dressed again, and by angle."""
    X, charges, energies = configurations(TEST, TEST_SEED)
    generator = torch.Generator().manual_seed(TEST_SEED)
    rotated = X @ random_orthogonal((TEST,), 3, generator=generator).mT
    return {
        "unrotated": error(model, cost, (X, charges, energies)),
        "rotated": error(model, cost, (rotated, charges, energies)),
        "dressed": error(model, cost, (gram_svd(rotated)[0], charges, energies)),
        "by_angle": [
            error(model, cost, (X @ turns(TEST, angle, TEST_SEED).mT, charges, energies))
            for angle in ANGLES
        ],
        "standard_deviation_of_energies": energies.std().item(),
    }


def tuned_rate(name: str) -> tuple[float, dict[str, float]]:
    """The rate with the least error on unrotated configurations of a seed used for nothing else."""
    validation = configurations(TEST, TUNING_SEED + 1)
    errors = {rate: error(*trained(name, rate, TUNING_SEED), validation) for rate in RATES}
    return min(errors, key=errors.__getitem__), {str(rate): e for rate, e in errors.items()}


def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tuning, and one row for each model and seed."""
    tuning, rows = {}, []
    for name in MODELS:
        rate, errors = tuned_rate(name)
        tuning[name] = {"rate": rate, "errors": errors}
        print(json.dumps({name: tuning[name]}), flush=True)
        for seed in SEEDS:
            model, cost = trained(name, rate, seed)
            rows.append({"model": name, "seed": seed, **cost, **tested(model, cost)})
            print(json.dumps(rows[-1]), flush=True)
    return tuning, rows


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    return f"{statistics.fmean(values):.4f} ± {standard_error(values):.4f}"


def chosen(record: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """Rows of all seeds."""
    return [row for row in record["rows"] if row["model"] == model]


def table(record: dict[str, Any]) -> str:
    """Everything as Markdown."""
    settings, environment = record["settings"], record["environment"]
    rates = ", ".join(f"{rate:g}" for rate in settings["rates_tried"])
    deviation = record["rows"][0]["standard_deviation_of_energies"]
    lines = [
        "# Energies of five charges in one orientation and in all",
        "",
        f"`{record['command']}`, {environment['processor']}, torch {environment['torch']}, one "
        f"thread; seeds {', '.join(map(str, record['seeds']))}, mean ± standard error. Root mean "
        f"square errors of energies whose standard deviation is {deviation:.3f}, on "
        f"{settings['test']} configurations. All models were trained on {settings['training']} "
        f"configurations along their principal axes ({settings['steps']} steps of AdamW with "
        f"{settings['batch']} of them, float32), the last one on randomly rotated ones, and tested "
        f"in float64; each at the best rate of {rates} for one further seed. Change: largest "
        "relative change of the error by the rotation, over seeds. "
        "Dressed: rotated test data, turned to their principal axes before the model reads them. "
        "Processor seconds: of one training.",
        "",
        "| model | parameters | rate | along principal axes | rotated | change | rotated, dressed "
        "| processor s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, tuning in record["tuning"].items():
        rows = chosen(record, name)
        errors = (spread([row[key] for row in rows]) for key in ("unrotated", "rotated", "dressed"))
        unrotated, rotated, dressed = errors
        change = max(abs(row["rotated"] / row["unrotated"] - 1) for row in rows)
        seconds = statistics.fmean(row["processor_seconds"] for row in rows)
        lines.append(
            f"| {name} | {rows[0]['parameters']} | {tuning['rate']:g} | {unrotated} | {rotated} "
            f"| {change:.1e} | {dressed} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


STYLES = (("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-."))


def plot(record: dict[str, Any]) -> bytes:
    """Error against the angle of rotation, mean and range over seeds, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (color, style), name in zip(STYLES, MODELS, strict=True):
        curves = [row["by_angle"] for row in chosen(record, name)]
        mean_and_range(axes, ANGLES, curves, style, color=color, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xticks(ANGLES[::2])
    axes.set_xlabel("rotation of the test data about random axes (degrees)")
    axes.set_ylabel("root mean square error of the energy")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    note(figure, BANDS)
    return png(figure)


def make_record() -> dict[str, Any]:
    """Settings and measurements."""
    tuning, rows = measure()
    return {
        "seeds": SEEDS,
        "settings": {
            "particles": PARTICLES,
            "charges": CHARGES,
            "box_half_lengths": BOX,
            "least_distance": CLOSEST,
            "lennard_jones_depth": DEPTH,
            "training": TRAINING,
            "test": TEST,
            "steps": STEPS,
            "batch": BATCH,
            "weight_decay": WEIGHT_DECAY,
            "gradient_clipping": CLIP,
            "schedule": "one cycle, a tenth of it warm-up",
            "rates_tried": RATES,
            "tuning_seed": TUNING_SEED,
            "angles": ANGLES,
        },
        "tuning": tuning,
        "rows": rows,
    }


def main() -> None:
    description = (__doc__ or "").splitlines()[0]
    run_experiment("relational_energies.py", description, RESULTS, make_record, table, plot)


if __name__ == "__main__":
    main()
