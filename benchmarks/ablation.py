"""Ablations of QuotientAdam under the protocol of ``quotientopt compare``.

Every question is a set of variants of the same training, one of them the default: the same
weights and batches for the same seed. A variant with several learning rates is run with all of
them on seed 0, and at the best on the other seeds. The records are rewritten after every run,
and runs they hold are not repeated.

    python benchmarks/ablation.py head-frame --seeds 3
    python benchmarks/ablation.py --all --seeds 3 --estimate
    python benchmarks/ablation.py --report
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ablations.fingerprint import code_digest
from ablations.record import Conditions, load_all
from ablations.report import write_report
from ablations.running import Ablations
from ablations.variants import QUESTIONS

from quotientopt.compare.data import MODEL_DEFAULTS, load_task
from quotientopt.compare.protocol import (
    Protocol,
    Run,
    UsageError,
    available_cores,
    describe_environment,
    require,
)
from quotientopt.compare.record import prepare_folder

RESULTS = Path(__file__).parent / "results" / "ablation"
SIZES = ("batch", "context", "layers", "width")


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out the command line; a wrong one ends with a line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    given = parser.parse_args(argv)
    given.command = shlex.join(["python", "benchmarks/ablation.py", *argv])
    try:
        check(given)
        run(given)
    except UsageError as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--all", action="store_true", help="all questions")
    add("--report", action="store_true", help="write table and plot of all questions in --out")
    add("--estimate", action="store_true", help="print the number of runs to make, make none")
    add("--rates", default="8e-3", help="learning rates of variants without their own")
    add("--seeds", type=int, default=1)
    add("--steps", type=int, default=300)
    add("--jobs", type=int, default=available_cores(), help="runs at a time")
    add("--model", choices=("gpt", "llama"), default="gpt")
    add("--data", default="stdlib")
    for name in SIZES:
        add(f"--{name}", type=int)
    add("--out", type=Path, default=RESULTS, metavar="FOLDER")
    add("--redo", action="store_true", help="make the questions' runs anew")
    add("--keep", action="store_true", help="go on with runs that other code has made")
    return parser


def check(given: argparse.Namespace) -> None:
    """Check the arguments; afterwards `questions` is complete and `rates` are numbers.

    Raises
    ------
    UsageError
        Naming the argument.
    """
    for name in given.questions:
        if name not in QUESTIONS:
            raise UsageError(f"unknown question {name!r}; known: {', '.join(QUESTIONS)}")
    given.questions = list(QUESTIONS) if given.all else list(dict.fromkeys(given.questions))
    if not given.questions and not given.report:
        raise UsageError(f"name a question ({', '.join(QUESTIONS)}), or give --all or --report")
    if given.redo and given.keep:
        raise UsageError("choose --redo or --keep, not both")
    try:
        given.rates = tuple(dict.fromkeys(float(rate) for rate in given.rates.split(",")))
    except ValueError as error:
        raise UsageError(f"--rates: {error}") from error
    if not all(math.isfinite(rate) and rate > 0 for rate in given.rates):
        raise UsageError("--rates: learning rates must be positive numbers")
    for name in ("seeds", "steps", "jobs", *SIZES):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")


def run(given: argparse.Namespace) -> None:
    """Make the runs that are missing, or count them, and write the report.

    Raises
    ------
    UsageError
        For data or sizes that cannot be used, and records that cannot be gone on with.
    """
    if given.report:
        require("matplotlib")
    if given.questions:
        ablations = Ablations(
            given.questions,
            Conditions(find_protocol(given), code_digest()),
            describe_environment("cpu") | {"runs at a time": given.jobs},
            given.rates,
            given.seeds,
            given.out,
            command=given.command,
            redo=given.redo,
            keep=given.keep,
        )
        if given.estimate:
            print(f"{ablations.missing()} runs of {given.steps} steps")
            return
        make_runs(ablations, given)
    if given.report:
        for path in write_report(load_all(given.out), given.out):
            print(path)


def find_protocol(given: argparse.Namespace) -> Protocol:
    """The protocol of `quotientopt compare`, for these steps, this model and its data."""
    defaults = MODEL_DEFAULTS[given.model]
    sizes = {name: getattr(given, name) or getattr(defaults, name) for name in SIZES}
    protocol = Protocol(
        model=given.model,
        data=given.data,
        steps=given.steps,
        threads=max(1, available_cores() // given.jobs),
        validation_batches=defaults.validation_batches,
        **sizes,
    )
    task = load_task(protocol.data, protocol.model, protocol.batch, protocol.context)
    return replace(protocol, data_digest=task.digest)


def make_runs(ablations: Ablations, given: argparse.Namespace) -> None:
    """Make the missing runs and say how they end."""
    prepare_folder(given.out)
    start, done = time.perf_counter(), 0

    def tell(finished: Run) -> None:
        nonlocal done
        done += 1
        loss = "diverged" if finished.final_loss is None else f"{finished.final_loss:.4f}"
        minutes = (time.perf_counter() - start) / 60
        left = ablations.missing()
        print(f"{finished.trial}: {loss} ({minutes:.0f} min, {left} runs to go)", flush=True)

    ablations.run(given.jobs, tell)
    print(f"{done} runs made; records in {given.out}")


if __name__ == "__main__":
    main()
