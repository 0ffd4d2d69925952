"""LoRA on pretrained weights: AdamW, LoRA+, PEFT's riemannian optimizer, LoRA-RITE, Muon and ours.

Every optimizer starts from the same factors, sees the same batches for the same seed and is tuned
over its learning rate; the head next to the adapters is trained by AdamW at one rate for all. The
record of a rank is rewritten after every run, and runs found there are not made again; several
processes may add to it.

    python benchmarks/lora.py --task snippets --rank 8 --seeds 3
    python benchmarks/lora.py --task snippets --report
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from experiment import command_of
from lora_report import write_report
from lora_summary import plan
from lora_tasks import TASKS, LoraProtocol, Recipe, Task
from lora_training import CONTENDERS, available, train

from quotientopt.compare.protocol import Run, UsageError, describe_environment, require
from quotientopt.compare.record import Record, prepare_folder
from quotientopt.compare.report import result_line

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("peft", "transformers", "tokenizers")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    recipe: Recipe
    names: tuple[str, ...]
    protocol: LoraProtocol
    only_report: bool
    start: tuple[float, ...]
    factor: float
    cover: bool
    seeds: int
    all_seeds: bool
    settings: dict[str, float]
    redo: tuple[str, ...]
    folder: Path
    command: str

    def make_record(self) -> Record:
        """An empty one of this protocol."""
        environment = describe_environment("cpu")
        environment |= {package: importlib.metadata.version(package) for package in PACKAGES}
        return Record(self.command, self.protocol, environment)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="snippets")
    add("--rank", type=int, default=8)
    add("--optimizers", default=",".join(CONTENDERS), help="comma-separated")
    add("--steps", type=int, help="default: the task's")
    add("--evaluate-every", type=int, help="steps between validations; default: the task's")
    add("--seeds", type=int, default=1)
    add("--all-seeds", action="store_true", help="every rate on every seed, not the best one alone")
    add("--rates", default="", help="R,R,... to start from instead of the usual three")
    add("--factor", type=float, default=2.0, help="between rates of the search; 1: no search")
    add("--cover", action="store_true", help="search until both ends are 0.02 above the best")
    add("--settings", default="", help="NAME=NUMBER,... of the optimizers, such as beta2=0.99")
    add("--redo", default="", help="optimizers whose runs are made again, comma-separated")
    add("--report", action="store_true", help="only write tables and plots of what there is")
    add("--out", type=Path, help="default: benchmarks/results/lora-TASK, -STEPS if not the usual")
    return parser


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Positive numbers separated by commas."""
    try:
        values = tuple(sorted({float(part) for part in filter(None, text.split(","))}))
    except ValueError:
        raise UsageError(f"{option} needs numbers separated by commas, got {text!r}") from None
    if not all(0 < value < math.inf for value in values):
        raise UsageError(f"{option} needs positive numbers, got {text!r}")
    return values


def parse_settings(text: str) -> dict[str, float]:
    """``"beta2=0.99"`` as a mapping."""
    settings: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in ("beta1", "beta2", "polar", "nesterov"):
            raise UsageError(f"--settings: unknown {name!r}; known: beta1, beta2, polar, nesterov")
        try:
            settings[name] = float(value)
        except ValueError:
            raise UsageError(f"--settings needs NAME=NUMBER,…, got {part!r}") from None
    return settings


def names_in(text: str, option: str) -> tuple[str, ...]:
    """Names of contenders, each once."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in CONTENDERS:
            raise UsageError(f"{option}: unknown {name!r}; known: {', '.join(CONTENDERS)}")
        if names.count(name) > 1:
            raise UsageError(f"{option} names {name!r} twice")
    return names


def make_request(argv: Sequence[str] | None) -> Request:
    """Read the command line; refuses what cannot be carried out before anything is trained."""
    given = make_parser().parse_args(argv)
    for name in ("rank", "seeds", "steps", "evaluate_every"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 1 <= given.factor < math.inf:
        raise UsageError(f"--factor must be at least 1, got {given.factor:g}")
    if given.factor == 1 and not given.rates:
        raise UsageError("--factor 1 searches for nothing: give --rates")
    for package in ("matplotlib", "peft", "transformers"):
        require(package)
    recipe = TASKS[given.task]
    usual = recipe.protocol
    steps = given.steps or usual.steps
    every = given.evaluate_every or usual.evaluate_every
    protocol = replace(usual, rank=given.rank, steps=steps, evaluate_every=every)
    names = names_in(given.optimizers, "--optimizers")
    for name in () if given.report else names:
        available(CONTENDERS[name])
    suffix = "" if steps == usual.steps else f"-{steps}"
    return Request(
        recipe=recipe,
        names=names,
        protocol=protocol,
        only_report=given.report,
        start=numbers(given.rates, "--rates"),
        factor=given.factor,
        cover=given.cover,
        seeds=given.seeds,
        all_seeds=given.all_seeds,
        settings=parse_settings(given.settings),
        redo=names_in(given.redo, "--redo"),
        folder=given.out or RESULTS / f"lora-{given.task}{suffix}",
        command=command_of("lora.py", argv),
    )


def add_run(request: Request, folder: Path, run: Run) -> Record:
    """Add a run to what is in the record by now."""
    record = request.make_record()
    record.resume(folder)
    record.runs = [other for other in record.runs if other.trial != run.trial] + [run]
    record.earlier_commands = list(dict.fromkeys(record.earlier_commands))
    record.save(folder)
    return record


def compare(request: Request, task: Task) -> None:
    """Make all runs that are not in the record."""
    folder = request.folder / f"rank-{request.protocol.rank}"
    prepare_folder(folder)
    record = request.make_record()
    record.resume(folder, request.redo)
    if request.redo:
        record.save(folder)
    runs = record.runs
    for name in request.names:
        centre = CONTENDERS[name].centre
        start = request.start or (centre, centre * request.factor, centre / request.factor)
        trials = plan(
            name,
            start,
            runs,
            settings=request.settings,
            factor=request.factor,
            cover=request.cover,
            seeds=request.seeds,
            all_seeds=request.all_seeds,
        )
        trial = next(trials)
        while True:
            run = next((run for run in runs if run.trial == trial), None)
            if run is None:
                run = train(trial, request.protocol, task)
                runs.append(run)
                add_run(request, folder, run)
                print(f"{result_line(run)}  {run.curve[-1:]}", flush=True)
            try:
                trial = trials.send(run)
            except StopIteration:
                break


def main(argv: Sequence[str] | None = None) -> None:
    """Compare at one rank, then report on all ranks in the folder."""
    torch.set_num_threads(1)
    try:
        request = make_request(argv)
        if not request.only_report:
            task = request.recipe.load(request.protocol)
            protocol = replace(request.protocol, data_digest=task.digest)
            compare(replace(request, protocol=protocol), task)
        print(write_report(request.folder, request.recipe))
    except UsageError as error:
        make_parser().error(str(error))


if __name__ == "__main__":
    main()
