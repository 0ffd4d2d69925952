"""Is what wraps around any optimizer worth it around QuotientAdam?

Averages of the weights; an outer step with Nesterov momentum every few steps; weight decay only
where it agrees with the update; matrices whose norm stays what it was. The first two are linear in
the weights, and norms and masks are those of dressed weights u⁻ᵀ W Q, so that the path stays
equivariant. The protocol and the tuned rates of ``quotientopt compare``: where a wrapper has
several settings, all are run on seed 0 and the best one on the others.

    python benchmarks/wrappers.py --jobs 2

Runs in the record are not repeated; ``--report`` makes the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from experiment import command_of, markdown_table, standard_error
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quotientopt import QuotientAdam
from quotientopt.compare.data import load_task
from quotientopt.compare.optimizers import BETAS, OPTIMIZERS, Entry
from quotientopt.compare.protocol import Protocol, Trial, describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.compare.train import Training
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.update import scale_of

RESULTS = Path(__file__).parent / "results" / "wrappers"
# The best of the comparison.
RATE, SETTINGS = 4e-3, {"embedding_scale": 2.0}
SOAP_MUON_RATE, SOAP_MUON_SETTINGS = 8e-3, {"adamw_rate": 1.6e-2, "every": 5}
DECAY = 0.1
AVERAGE, AVERAGED = 0.95, 0.4


class Dressed(NamedTuple):
    """The weights of a bucket in the frames of their moments, and the way back.

    ``W_d = u⁻ᵀ W Q`` goes to itself under g, and ``W = uᵀ W_d Qᵀ``; what is done entry by entry, or
    by norms, to W_d is done to W on whatever representative training is.
    """

    bucket: Bucket
    left: Tensor | None
    right: Tensor

    @classmethod
    def all_of(cls, optimizer: QuotientAdam) -> Iterator[Dressed]:
        """Every bucket of an optimizer that has taken a step."""
        for bucket in optimizer._current_engine().buckets:
            heads, right = bucket.heads, bucket.residual_frames()
            assert right is not None
            left = None if heads is None else bucket.of_heads(heads.frame)
            yield cls(bucket, left, right[:, None, None])

    def into(self, weights: Tensor) -> Tensor:
        """``W ↦ W_d``, of tensors of the bucket's shape."""
        if self.left is not None:
            weights = torch.linalg.inv(self.left.double()).mT.to(weights) @ weights
        return weights @ self.right

    def back(self, dressed: Tensor) -> Tensor:
        """``W_d ↦ W``."""
        weights = dressed @ self.right.mT
        return weights if self.left is None else self.left.mT @ weights

    def write(self, weights: Tensor) -> None:
        """Put weights into the parameters."""
        views = self.bucket.views()
        shape = (len(views), *self.bucket.slices[0].shape[1:])
        torch._foreach_copy_(views, list(weights.reshape(shape).unbind()))


class Wrapped(Optimizer):
    """An optimizer whose steps a function goes around.

    Parameters
    ----------
    inner : QuotientAdam
    around : callable
        ``around(inner)`` takes a step of it.
    """

    def __init__(self, inner: QuotientAdam, around: Callable[[QuotientAdam], None]) -> None:
        self.inner, self._around = inner, around
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        self._around(self.inner)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer."""
        self.inner.zero_grad(set_to_none)


def outer_nesterov(every: int, momentum: float, rate: float) -> Callable[[QuotientAdam], None]:
    """Every few steps φ ← φ + ρ (d + μ b), b ← μ b + d, with what the steps have moved φ by, d."""
    slow: list[Tensor] = []
    moved: list[Tensor] = []
    steps = 0

    def around(optimizer: QuotientAdam) -> None:
        nonlocal steps
        parameters = list(optimizer._parameters())
        if not slow:
            slow.extend(p.clone() for p in parameters)
            moved.extend(torch.zeros_like(p) for p in parameters)
        optimizer.step()
        steps += 1
        if steps % every == 0:
            for p, phi, b in zip(parameters, slow, moved, strict=True):
                d = p - phi
                b.mul_(momentum).add_(d)
                phi.add_(d.add_(b, alpha=momentum), alpha=rate)
                p.copy_(phi)

    return around


def cautious_decay(decay: float) -> Callable[[QuotientAdam], None]:
    """Decay of those dressed weights alone whose update is towards zero.

    W_d ← W_d + Δ − ηsλ 1[Δ W_d ≤ 0] W_d with the update Δ of no decay.
    """

    def around(optimizer: QuotientAdam) -> None:
        group = optimizer.param_groups[0]
        before = [bucket.weights() for bucket in optimizer._current_engine().buckets]
        optimizer.step()
        for own, old in zip(Dressed.all_of(optimizer), before, strict=True):
            new = own.bucket.weights()
            start = own.into(old)
            kept = (own.into(new) - start).mul_(start) <= 0
            rate = group["lr"] * scale_of(own.bucket.slices[0], group) * decay
            own.write(new - rate * own.back(start * kept))

    return around


def fixed_norm(size: float) -> Callable[[QuotientAdam], None]:
    """Matrices keep their dressed norm R: W_d ← R · (W_d + ηR Δ/‖Δ‖) over its norm.

    ``size`` is η where the schedule is at its peak. Embeddings, positions and head decay as ever.
    """
    norms: dict[int, Tensor] = {}

    def around(optimizer: QuotientAdam) -> None:
        group = optimizer.param_groups[0]
        before = [bucket.weights() for bucket in optimizer._current_engine().buckets]
        optimizer.step()
        for place, (own, old) in enumerate(zip(Dressed.all_of(optimizer), before, strict=True)):
            new = own.bucket.weights()
            if own.bucket.embedding:
                rate = group["lr"] * scale_of(own.bucket.slices[0], group)
                own.write(new - rate * DECAY * old)
                continue
            start = own.into(old)
            R = norms.setdefault(place, norm_of(start))
            change = own.into(new) - start
            end = start + size * (group["lr"] / RATE) * R * change / norm_of(change)
            own.write(own.back(end * (R / norm_of(end))))

    return around


def norm_of(stack: Tensor) -> Tensor:
    """Frobenius norms of stacked matrices, to divide by."""
    return stack.square().sum((1, 2, 3, 4), keepdim=True).sqrt().clamp_min(1e-30)


class Wrapper(NamedTuple):
    """What is run: a function of settings that goes around a step, and the settings to try."""

    make: Callable[..., Callable[[QuotientAdam], None]]
    settings: tuple[tuple[float, ...], ...]
    decays: bool = True


AS_IT_IS, SOAP_MUON = "as it is", "SOAP-Muon"
WRAPPERS = {
    "outer Nesterov step (every, momentum, rate)": Wrapper(
        outer_nesterov, ((10, 0.5, 0.8), (20, 0.7, 0.6))
    ),
    "cautious weight decay (decay)": Wrapper(cautious_decay, ((0.1,), (0.2,)), decays=False),
    "matrices of fixed norm (rate)": Wrapper(
        fixed_norm, ((0.03,), (0.045,), (0.06,), (0.12,)), decays=False
    ),
}
VARIANTS = (AS_IT_IS, *WRAPPERS, SOAP_MUON)


class Case(NamedTuple):
    """One run."""

    variant: str
    settings: tuple[float, ...]
    seed: int

    def key(self) -> str:
        """Of its run in the record."""
        return json.dumps(self)


def run_case(case: Case, protocol: Protocol) -> tuple[str, dict[str, Any]]:
    """Train once on one thread: the key in the record, and what was found."""
    torch.set_num_threads(1)
    name, rate, settings = "soap-muon", SOAP_MUON_RATE, SOAP_MUON_SETTINGS
    if case.variant != SOAP_MUON:
        name, rate, settings = "wrapped", RATE, SETTINGS
        wrapper = WRAPPERS.get(case.variant)

        def build(model: Any, lr: float, *_: Any) -> list[Optimizer]:
            decay = DECAY if wrapper is None or wrapper.decays else 0.0
            inner = QuotientAdam(model, lr=lr, betas=BETAS, weight_decay=decay, **SETTINGS)
            return [inner if wrapper is None else Wrapped(inner, wrapper.make(*case.settings))]

        OPTIMIZERS[name] = Entry(name, build, {})
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    training = Training(Trial(name, rate, settings, case.seed), protocol, task)
    held_out = list(task.validation_batches(protocol))
    averaged = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    for step in range(protocol.steps):
        training.step()
        if step >= (1 - AVERAGED) * protocol.steps:
            averaged.update_parameters(training.model)
    found = {"loss": training.validate(held_out)}
    training.model.load_state_dict(averaged.module.state_dict())
    return case.key(), found | {"averaged_loss": training.validate(held_out)}


def cases(runs: dict[str, Any], seeds: int, variants: Sequence[str] = VARIANTS) -> list[Case]:
    """What is to be run next: all settings on seed 0, then the best of them."""
    wanted = [
        Case(variant, own, 0)
        for variant in variants
        for own in (WRAPPERS[variant].settings if variant in WRAPPERS else ((),))
    ]
    if all(case.key() in runs for case in wanted):
        for variant in variants:
            first = [case for case in wanted if case.variant == variant and case.seed == 0]
            best = min(first, key=lambda case: runs[case.key()]["loss"])
            wanted += [best._replace(seed=seed) for seed in range(1, seeds)]
    return [case for case in wanted if case.key() not in runs]


def table(record: dict[str, Any]) -> str:
    """Losses, and differences to the plain optimizer's seed by seed, as Markdown."""
    runs: dict[Case, dict[str, float]] = {}
    for key, found in record["runs"].items():
        variant, settings, seed = json.loads(key)
        runs[Case(variant, tuple(settings), seed)] = found
    plain = {case.seed: found["loss"] for case, found in runs.items() if case.variant == AS_IT_IS}
    rows = []
    tried = {(case.variant, case.settings) for case in runs}
    for variant, settings in sorted(tried, key=lambda own: (VARIANTS.index(own[0]), own[1])):
        own = {c.seed: found for c, found in runs.items() if c[:2] == (variant, settings)}
        label = f"{variant}: {', '.join(f'{x:g}' for x in settings)}" if settings else variant
        for name, title in (("loss", label), ("averaged_loss", f"{label}, averaged weights")):
            if name == "averaged_loss" and variant not in (AS_IT_IS, SOAP_MUON):
                continue
            losses = [found[name] for found in own.values()]
            gaps = [found[name] - plain[seed] for seed, found in own.items() if seed in plain]
            rows.append((title, len(losses), with_error(losses), with_error(gaps, "+")))
    header = ("", "seeds", "last validation loss", "minus that of the optimizer as it is")
    steps = record["protocol"]["steps"]
    notes = (
        f"Small GPT of `quotientopt compare`, {steps} steps, at its best rates. Averaged weights: "
        f"an exponential average with decay {AVERAGE} over the last {AVERAGED:.0%} of the steps."
    )
    return f"# Wrappers\n\n{notes}\n\n{markdown_table(header, rows)}\n"


def with_error(values: list[float], sign: str = "") -> str:
    """Mean and standard error."""
    error = standard_error(values)
    mean = f"{statistics.fmean(values):{sign}.4f}" if values else "–"
    return mean if error is None else f"{mean} ± {error:.4f}"


def main() -> int:
    """Make the runs that are missing, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "wrappers.json"
    protocol = Protocol(steps=given.steps)
    record: dict[str, Any] = {"runs": {}}
    if path.exists():
        record = json.loads(path.read_text())
    if not given.report:
        commands = dict.fromkeys([*record.get("commands", []), command_of("wrappers.py")])
        record |= {
            "commands": list(commands),
            "environment": describe_environment("cpu"),
            "protocol": asdict(protocol),
        }
        with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
            while missing := cases(record["runs"], given.seeds, given.variants):
                tasks = [pool.apply_async(run_case, (case, protocol)) for case in missing]
                for task in tasks:
                    key, found = task.get()
                    record["runs"][key] = found
                    print(key, found, flush=True)
                    write_atomically(path, json.dumps(record, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), table(record))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
