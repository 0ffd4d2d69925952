"""Cost of an optimizer step: seconds, share of a training iteration, memory, synchronisations.

Every optimizer is measured in a process of its own, one after the other. Steps on fixed random
gradients are timed over whole periods of ten, so that the means hold what is done every ten steps
only; then real iterations are timed, in which gradients are accumulated over micro-batches. On
CUDA events on the stream take the times, so that the host never waits inside a period.

    python benchmarks/step_time.py --device cuda --model gpt2-small --autocast
    python benchmarks/step_time.py --device cuda --model gpt2-small --syncs
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from step_timing.contenders import CONTENDERS
from step_timing.measure import measure_apart
from step_timing.record import load_rows, record_path, save_row, table
from step_timing.setting import PERIOD, SHAPES, SIZES, TOKENS, Setting

from quotientopt.compare.protocol import UsageError
from quotientopt.compare.record import prepare_folder

RESULTS = Path(__file__).parent / "results"


def parse(argv: Sequence[str] | None) -> tuple[list[str], Setting, Path]:
    """Names of the optimizers, what to measure, and where the record goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", choices=sorted(SHAPES), help="default: gpt on cpu, gpt2-small on cuda")
    add("--optimizers", default=",".join(CONTENDERS), help="comma-separated; default: all")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    add("--autocast", action="store_true", help="forward pass in bfloat16, parameters float32")
    add("--compile", choices=("model", "step"), nargs="+", default=[])
    add("--capturable", action="store_true")
    add("--syncs", action="store_true", help="count device synchronisations instead of timing")
    add("--threads", type=int, help="default: 1 on cpu, torch's own on cuda")
    add("--warmup", type=int, default=2 * PERIOD, help="steps before the first timed one")
    add("--repeats", type=int, default=5, help=f"timed periods of {PERIOD} steps")
    add("--iterations", type=int, default=PERIOD, help="real iterations; 0 leaves the share out")
    add("--sequences", type=int, help="per micro-batch")
    add("--tokens", type=int, help=f"of one iteration; others than {TOKENS} are extrapolated")
    add("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    names = [name.strip() for name in given.optimizers.split(",")]
    for name in names:
        if name not in CONTENDERS:
            parser.error(f"unknown optimizer {name!r}; known: {', '.join(CONTENDERS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if given.device == "cpu" and (given.syncs or given.capturable):
        parser.error("--syncs and --capturable need --device cuda")
    if given.autocast and given.dtype != "float32":
        parser.error("--autocast needs --dtype float32")
    model = given.model or ("gpt" if given.device == "cpu" else "gpt2-small")
    sequences, tokens = SIZES[model, given.device]
    sequences, tokens = given.sequences or sequences, given.tokens or tokens
    threads = given.threads or (1 if given.device == "cpu" else torch.get_num_threads())
    for name, value in (("threads", threads), ("warmup", given.warmup), ("repeats", given.repeats)):
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if given.iterations % PERIOD or given.iterations < 0:
        parser.error(f"--iterations must be a multiple of {PERIOD}, got {given.iterations}")
    smallest = sequences * SHAPES[model].context
    if tokens < 1 or sequences < 1 or tokens % smallest:
        parser.error(
            f"--tokens must be a multiple of the micro-batch, {sequences} sequences of "
            f"{SHAPES[model].context} tokens, got {tokens}"
        )
    setting = Setting(
        model=model,
        device=given.device,
        dtype=given.dtype,
        autocast=given.autocast,
        compiled=tuple(sorted(set(given.compile))),
        capturable=given.capturable,
        syncs=given.syncs,
        threads=threads,
        warmup=given.warmup,
        repeats=given.repeats,
        iterations=given.iterations,
        sequences=sequences,
        tokens=tokens,
    )
    return names, setting, given.out


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, one optimizer after the other; the record is up to date after each."""
    names, setting, folder = parse(argv)
    path = record_path(folder, setting.device)
    try:
        prepare_folder(folder)
        load_rows(path)
    except UsageError as error:
        sys.exit(f"step_time.py: {error}")
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/step_time.py", *arguments])
    rows = []
    for name in names:
        row = {"command": command} | measure_apart(name, setting)
        save_row(path, row)
        rows.append(row)
        print(f"{name}: {'skipped' if 'skipped' in row else 'done'}", flush=True)
    print(f"\n{table(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
