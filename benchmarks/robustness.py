"""How much training depends on the gauge it starts from.

The same model is trained from the starts g·x, where g is a random element of GL(r) on every
attention head with condition number 1, 10, 100, 1000. All starts compute the same function; what
parts the curves is the optimizer alone. Protocol and learning rates are those of a finished
``quotientopt compare``, tuned at the usual start.

    python benchmarks/robustness.py --steps 200 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from experiment import command_of
from robustness_report import markdown, plot, summarise
from torch import nn

from quotientopt import find_symmetries
from quotientopt.compare.data import load_corpus
from quotientopt.compare.optimizers import OPTIMIZERS, find_optimizers
from quotientopt.compare.protocol import Protocol, Trial, UsageError, describe_environment, require
from quotientopt.compare.record import prepare_folder, write_atomically
from quotientopt.compare.train import train

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
TUNED = RESULTS / "gpt-stdlib-600" / "compare.json"
SUBJECT = "quotient-adam"
# Kept apart from the seeds of weights and batches.
GAUGE_SEED = 1000


@dataclass(frozen=True)
class Twin:
    """One training run from one start g·x."""

    trial: Trial
    cond: float
    dtype: str

    def __str__(self) -> str:
        return f"{self.trial} cond={self.cond:g}"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    trials: tuple[Trial, ...]
    conds: tuple[float, ...]
    dtype: str
    protocol: Protocol
    tuned: Path
    jobs: int
    keep: bool
    folder: Path
    command: str

    def twins(self) -> Iterator[Twin]:
        """All runs, one seed after the other."""
        for trial in self.trials:
            for cond in self.conds:
                yield Twin(trial, cond, self.dtype)


@torch.no_grad()
def move_start_(model: nn.Module, cond: float, seed: int) -> None:
    """Act on all heads with random elements of their groups; one seed differs in `cond` only."""
    symmetries = find_symmetries(model)
    if not symmetries.heads:
        raise UsageError(f"{type(model).__name__} has no head symmetry to act with")
    generator = torch.Generator().manual_seed(GAUGE_SEED + seed)
    element = symmetries.random_element(cond, generator=generator)
    symmetries.act_({symmetry.name: element[symmetry.name] for symmetry in symmetries.heads})


def run(twin: Twin, protocol: Protocol) -> dict[str, Any]:
    """Train once from g·x."""
    torch.set_num_threads(protocol.threads)
    entry = OPTIMIZERS[twin.trial.optimizer]

    def build(
        model: nn.Module, rate: float, settings: Mapping[str, float], protocol: Protocol
    ) -> list[torch.optim.Optimizer]:
        model.to(getattr(torch, twin.dtype))
        move_start_(model, twin.cond, twin.trial.seed)
        return entry.build(model, rate, settings, protocol)

    corpus = load_corpus(protocol.data, protocol.context)
    OPTIMIZERS[entry.name] = replace(entry, build=build)
    try:
        found = train(twin.trial, protocol, corpus)
    finally:
        OPTIMIZERS[entry.name] = entry
    return {"optimizer": entry.name, "cond": twin.cond, "seed": twin.trial.seed} | asdict(found)


def run_all(
    twins: Sequence[Twin], protocol: Protocol, jobs: int
) -> Iterator[tuple[Twin, dict[str, Any]]]:
    """Runs as they finish, in as many processes; one job stays in this one."""
    if jobs == 1:
        yield from ((twin, run(twin, protocol)) for twin in twins)
        return
    # A forked copy of torch's thread pools can hang, hence new interpreters.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {pool.submit(run, twin, protocol): twin for twin in twins}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- the request --------------------------------------------------------------------------------


def read_tuned(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Protocol of a comparison, and per optimizer its best rate and settings."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Protocol)}
        protocol = {name: v for name, v in document["protocol"].items() if name in known}
        return protocol, {row["optimizer"]: row for row in document["summary"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read {path} as a comparison's compare.json: {error}") from error


def parse_rates(text: str) -> dict[str, float]:
    """``"adamw=1e-3,soap=4e-3"`` as a mapping."""
    rates: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            rates[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--rates needs NAME=NUMBER,…, got {part!r}") from None
        if not 0 < rates[name.strip()] < math.inf:
            raise UsageError(f"--rates needs positive numbers, got {part!r}")
    return rates


def parse_conds(text: str) -> tuple[float, ...]:
    """Condition numbers in order; 1, to which the others are compared, must be among them."""
    try:
        conds = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--conds needs numbers separated by commas, got {text!r}") from None
    if conds[0] != 1 or not conds[-1] < math.inf:
        raise UsageError(f"--conds needs 1 and finite numbers above it, got {text!r}")
    return conds


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--optimizers", default=f"adamw,muon,soap,{SUBJECT}")
    add("--conds", default="1,10,100,1000", help="condition numbers of g")
    add("--steps", type=int, default=200, help="training steps; the cosine ends with them")
    add("--seeds", type=int, default=1)
    add("--evaluate-every", type=int, default=10, help="steps between validations")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--tuned", type=Path, default=TUNED, help="compare.json with the protocol and the rates")
    add("--rates", default="", help="NAME=RATE,… instead of the tuned ones")
    add("--jobs", type=int, default=2, help="processes, of one thread each")
    add("--keep", action="store_true", help="keep earlier runs of optimizers not named now")
    add("--out", type=Path, help="default: benchmarks/results/robustness-MODEL-DATA-STEPS")
    return parser


def make_request(argv: Sequence[str] | None) -> Request:
    """Read the command line; refuses what cannot be carried out before anything is trained."""
    given = make_parser().parse_args(argv)
    for name in ("steps", "seeds", "evaluate_every", "jobs"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} must be at least 1, got {getattr(given, name)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device")
    require("matplotlib")
    values, tuned = read_tuned(given.tuned)
    values |= {"steps": given.steps, "evaluate_every": given.evaluate_every}
    values |= {"threads": 1, "device": given.device}
    protocol = Protocol(**values)
    digest = load_corpus(protocol.data, protocol.context).digest
    suffix = "" if given.dtype == "float32" else f"-{given.dtype}"
    folder = f"robustness-{protocol.model}-{Path(protocol.data).stem}-{protocol.steps}{suffix}"
    return Request(
        trials=make_trials(given.optimizers, given.rates, given.seeds, tuned, given.tuned),
        conds=parse_conds(given.conds),
        dtype=given.dtype,
        protocol=replace(protocol, data_digest=digest),
        tuned=given.tuned,
        jobs=given.jobs,
        keep=given.keep,
        folder=given.out or RESULTS / folder,
        command=command_of("robustness.py", argv),
    )


def make_trials(
    optimizers: str, rates: str, seeds: int, tuned: Mapping[str, Mapping[str, Any]], path: Path
) -> tuple[Trial, ...]:
    """Every optimizer at its tuned setting, or at the rate given for it, on every seed."""
    names = [entry.name for entry in find_optimizers(optimizers)]
    given = parse_rates(rates)
    stray = [name for name in given if name not in names]
    if stray:
        raise UsageError(f"--rates names {stray[0]!r}, which is not among --optimizers")
    missing = [name for name in names if name not in tuned]
    if missing:
        raise UsageError(f"{path} has no tuned {missing[0]!r}; leave it out of --optimizers")
    return tuple(
        Trial(name, given.get(name, tuned[name]["rate"]), tuned[name]["settings"], seed)
        for seed in range(seeds)
        for name in names
    )


# ---- the record ---------------------------------------------------------------------------------


def kept(request: Request) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs of an earlier record that are not made again, and the commands that made them."""
    path = request.folder / "robustness.json"
    if not request.keep or not path.exists():
        return [], []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        made_with = (document["protocol"], document["dtype"], document["conds"])
        runs, commands = list(document["runs"]), list(document["commands"])
        again = {trial.optimizer for trial in request.trials}
        runs = [run for run in runs if run["optimizer"] not in again]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot keep runs of {path}: {type(error).__name__} {error}") from error
    if made_with != (asdict(request.protocol), request.dtype, list(request.conds)):
        raise UsageError(f"cannot keep runs of {path}: made with another protocol")
    return runs, commands


def save(request: Request, runs: list[dict[str, Any]], commands: Sequence[str]) -> dict[str, Any]:
    """Write everything measured so far and return it."""
    names = [name for name in OPTIMIZERS if name != SUBJECT] + [SUBJECT]
    runs = sorted(runs, key=lambda run: (names.index(run["optimizer"]), run["cond"], run["seed"]))
    record = {
        "schema": SCHEMA,
        "commands": [*commands, request.command],
        "tuned": f"{request.tuned.parent.name}/{request.tuned.name}",
        "dtype": request.dtype,
        "conds": list(request.conds),
        "protocol": asdict(request.protocol),
        "environment": describe_environment(request.protocol.device)
        | {"runs at a time": request.jobs},
        "summary": summarise(runs),
        "runs": runs,
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(request.folder / "robustness.json", text)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Train from all starts; the record is up to date after every run."""
    try:
        request = make_request(argv)
        runs, commands = kept(request)
        prepare_folder(request.folder)
    except UsageError as error:
        make_parser().error(str(error))
    twins = list(request.twins())
    for count, (twin, done) in enumerate(run_all(twins, request.protocol, request.jobs), start=1):
        runs.append(done)
        record = save(request, runs, commands)
        ended = "diverged" if done["final_loss"] is None else f"{done['final_loss']:.4f}"
        print(f"{count}/{len(twins)} {twin}: {ended}", flush=True)
    write_atomically(request.folder / "robustness.md", markdown(record))
    write_atomically(request.folder / "robustness.png", plot(record))
    print(f"\n{markdown(record)}\n{request.folder}")


if __name__ == "__main__":
    main()
