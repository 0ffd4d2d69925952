"""Seconds and memory of finding symmetries from gradients, on trained weights.

`find_symmetries(model, **batch)` without the adapters: every pair is found by its charges and
proved. The whole model at once, and module by module as for models that do not fit into memory.
Each run has a process of its own. What is found is compared with what the adapters know.

    python benchmarks/discovery.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from canonical_forms import MODELS, load, resident, settle
from torch import nn

import quotientopt as qo
from quotientopt.checkpoints.outputs import example_inputs
from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import write_atomically
from quotientopt.symmetries import HeadSymmetry
from quotientopt.symmetries.discovery import discover
from quotientopt.symmetries.discovery.discover import COPIES

OUT = Path(__file__).parent / "results" / "discovery.json"
NAMES = ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct")
WAYS = ("whole", "module by module")


def largest_layer(model: nn.Module) -> int:
    """Parameters of the largest member of a list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(sum(p.numel() for p in layer.parameters()) for members in lists for layer in members)


def heads_of(symmetries: tuple[HeadSymmetry, ...] | list[HeadSymmetry]) -> set[Any]:
    """Group and place of every pair."""
    return {
        (
            str(s.group),
            frozenset(
                frozenset((b.name, b.size, b.offset) for b in side)
                for side in (s.left_blocks, s.right_blocks)
            ),
        )
        for s in symmetries
    }


def measure(name: str, way: str) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    model = load(name)
    inputs = example_inputs(model)
    layer = largest_layer(model)
    known = qo.find_symmetries(model)
    # Enough for one layer and no more.
    budget = 2**62 if way == "whole" else COPIES * 8 * layer
    # Weights are mapped from files, and resident once they have been read.
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    settle()
    before, start, processor = resident(), time.perf_counter(), time.process_time()
    found = discover(model, (), inputs, budget=budget)
    row = {
        "model": name,
        "way": way,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_the_largest_layer": layer,
        "tokens": inputs["input_ids"].numel(),
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "peak_growth_bytes": resident(peak=True) - before,
        "head_pairs": len(found.heads),
        "hidden_units": sum(s.heads for s in found.hidden_units),
        "largest_deviation_of_a_proof": max(
            (float(s.source.rpartition(" ")[2]) for s in (*found.heads, *found.hidden_units)),
            default=None,
        ),
        "as_the_adapters_know": heads_of(found.heads) == heads_of(known.heads),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def measure_apart(name: str, way: str) -> dict[str, Any]:
    """The same in a process of its own."""
    call = [sys.executable, __file__, "--only", name, way]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | | seconds | memory over float64 parameters | over its largest layer's | "
        "pairs of heads | hidden units | as by class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole, layer = (
            row["peak_growth_bytes"] / (8 * row[key])
            for key in ("parameters", "parameters_of_the_largest_layer")
        )
        lines.append(
            f"| {row['model']} | {row['way']} | {row['processor_seconds']:.0f} | {whole:.1f} × | "
            f"{layer:.1f} × | {row['head_pairs']} | {row['hidden_units']:,} | "
            f"{'yes' if row['as_the_adapters_know'] else 'no'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(measure(*options.only)))
        return
    rows = [measure_apart(name, way) for name in options.models for way in WAYS]
    record = {
        "command": "python benchmarks/discovery.py",
        "threads": 1,
        "environment": describe_environment("cpu")
        | {"transformers": metadata.version("transformers")},
        "runs": rows,
    }
    write_atomically(options.out, json.dumps(record, indent=1) + "\n")
    print(f"{table(rows)}\n\nwritten: {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
