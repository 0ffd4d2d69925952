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
import json
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from experiment import command_of, markdown_table
from step_timing import (
    CONTENDERS,
    PERIOD,
    SHAPES,
    SIZES,
    TOKENS,
    Contender,
    Setting,
    SkippedError,
    accumulate,
    build_model,
    build_optimizers,
    grow_,
    make_batches,
    measure_synchronisations,
    reset_peak,
    set_gradients,
    summarise_iterations,
    summarise_periods,
    time_laps,
    used_bytes,
)
from torch import nn
from torch.optim import Optimizer

from quotientopt.compare.protocol import UsageError, describe_environment
from quotientopt.compare.record import prepare_folder, write_atomically
from quotientopt.compare.train import state_bytes

SCHEMA = 1


def record_path(folder: Path, device: str) -> Path:
    """``step-time-<device name>.json`` in `folder`."""
    name = describe_environment(device)["device"].lower()
    return folder / f"step-time-{re.sub('[^a-z0-9]+', '-', name).strip('-')}.json"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows measured earlier; refuses a file that is something else rather than replace it."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, not {SCHEMA}")
        return list(document["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot add to {path}: {error}; move it away") from error


def save_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the record, in place of one with the same optimizer and setting."""
    row = json.loads(json.dumps(row, allow_nan=False))
    key = (row["optimizer"], row["setting"])
    rows = [other for other in load_rows(path) if (other["optimizer"], other["setting"]) != key]
    document = {"schema": SCHEMA, "rows": [*rows, row]}
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, as a Markdown table."""
    syncs = any("synchronisations" in row for row in rows)
    header = (
        ("optimizer", "synchronisations per step", "at a refresh", "refused in error mode")
        if syncs
        else (
            "optimizer",
            "step ms: median",
            "mean (smallest to largest period)",
            "refresh",
            "share of an iteration",
            "state MB",
            "peak above model and gradients MB",
        )
    )
    notes = [f"{row['optimizer']} skipped: {row['skipped']}" for row in rows if "skipped" in row]
    iterations = [row["iteration"] for row in rows if "iteration" in row]
    if iterations:
        first = iterations[0]
        how = (
            f"extrapolated from {first['measured tokens']}" if first["extrapolated"] else "measured"
        )
        notes.append(f"Shares are those of iterations of {first['tokens']} tokens, {how}.")
    lines = markdown_table(header, [_line(row, len(header)) for row in rows])
    return "\n".join([lines, "", *notes])


def _line(row: dict[str, Any], columns: int) -> tuple[str, ...]:
    name = row["optimizer"]
    if "skipped" in row:
        return (name, "skipped", *["–"] * (columns - 2))
    if "synchronisations" in row:
        found = row["synchronisations"]
        counts = list(found["per step"])
        refresh = "–" if found["refresh step"] is None else str(counts.pop(found["refresh step"]))
        usual = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        refused = f"{found['steps refused in error mode']} of {found['steps in error mode']}"
        return (name, usual, refresh, refused)
    step = row["step"]
    spread = step["spread of means"]
    before, peak = row["bytes before the first step"], row["peak bytes of steps"]
    return (
        name,
        f"{1e3 * step['median']:.2f}",
        f"{1e3 * step['mean']:.2f} ({1e3 * spread['smallest']:.2f} to "
        f"{1e3 * spread['largest']:.2f})",
        "–" if step["refresh"] is None else f"{1e3 * step['refresh']:.2f}",
        f"{row['iteration']['share']:.2%}" if "iteration" in row else "–",
        f"{row['state bytes'] / 1e6:.1f}",
        "–" if before is None or peak is None else f"{(peak - before) / 1e6:.1f}",
    )


def measure_apart(name: str, setting: Setting) -> dict[str, Any]:
    """`measure` in a new process, whose memory is all its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, name, setting).result()
        except BrokenProcessPool:
            reason = "its process was killed, most likely for want of memory"
            row = {"optimizer": name, "setting": asdict(setting), "skipped": reason}
            return row | {"environment": _environment(setting)}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Measure one optimizer; a row of the record."""
    row: dict[str, Any] = {"optimizer": name, "setting": asdict(setting)}
    torch.set_num_threads(setting.threads)
    model = build_model(setting.model).to(setting.device, getattr(torch, setting.dtype))
    row |= {
        "model class": f"{type(model).__module__}.{type(model).__name__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "environment": _environment(setting),
    }
    try:
        optimizers = build_optimizers(name, model, setting)
        row["options"] = [_plain(optimizer.defaults) for optimizer in optimizers]
        return row | _measure_steps(CONTENDERS[name], model, optimizers, setting)
    except (SkippedError, torch.OutOfMemoryError) as error:
        return row | {"skipped": str(error).splitlines()[0]}


def _measure_steps(
    contender: Contender, model: nn.Module, optimizers: list[Optimizer], setting: Setting
) -> dict[str, Any]:
    device = setting.device

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    if "step" in setting.compiled:
        step = torch.compile(step)
    set_gradients(model)
    before = used_bytes(device)
    reset_peak(device)
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SkippedError(f"its first step failed: {error}") from error
    grow_(optimizers)
    for _ in range(setting.warmup - 1):
        step()
    if setting.syncs:
        return {"synchronisations": measure_synchronisations(step, contender.refreshes)}
    periods = [time_laps([step], PERIOD, device) for _ in range(setting.repeats)]
    laps = [[lap[0] for lap in period] for period in periods]
    found = {
        "step": summarise_periods(laps, contender.refreshes),
        "state bytes": state_bytes(optimizers),
        "bytes before the first step": before,
        "peak bytes of steps": used_bytes(device, peak=True),
    }
    if setting.iterations:
        found["iteration"] = _measure_iterations(model, step, setting)
    return found


def _measure_iterations(
    model: nn.Module, step: Callable[[], None], setting: Setting
) -> dict[str, Any]:
    batches = make_batches(setting)
    called = torch.compile(model) if "model" in setting.compiled else model

    def forward_and_backward() -> None:
        model.zero_grad()
        accumulate(called, batches, setting)

    forward_and_backward()
    reset_peak(setting.device)
    laps = time_laps([forward_and_backward, step], setting.iterations, setting.device)
    alone = time_laps([forward_and_backward], min(3, setting.iterations), setting.device)
    return summarise_iterations(laps, setting.tokens) | {
        "model seconds as measured, without optimizer": statistics.median(lap[0] for lap in alone),
        "peak bytes": used_bytes(setting.device, peak=True),
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    kept = (bool, int, float, str, list, tuple, type(None))
    return {name: value for name, value in options.items() if isinstance(value, kept)}


def _environment(setting: Setting) -> dict[str, Any]:
    return describe_environment(setting.device) | {
        "transformers": version("transformers") if find_spec("transformers") else "not installed",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }


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
    command = command_of("step_time.py", argv)
    rows = []
    for name in names:
        row = {"command": command} | measure_apart(name, setting)
        save_row(path, row)
        rows.append(row)
        print(f"{name}: {'skipped' if 'skipped' in row else 'done'}", flush=True)
    print(f"\n{table(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
