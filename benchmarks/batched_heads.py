"""Gradient, projection and retraction of many heads at once, against a loop over the heads.

One unit of work is the Riemannian gradient of a cost, the horizontal projection of a momentum and a
retraction, on the quotient of factor pairs with the default metric. The batched manifold does it
for all heads in one call of each method; the loop calls the same methods head by head, with checks
in both. Processor times of a single thread are compared, which other work on the machine disturbs
least; wall times are recorded beside them. Writes JSON with everything measured.

    python benchmarks/batched_heads.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quotientopt.compare.protocol import describe_environment
from quotientopt.manifolds import FactorQuotient

SIZES = {
    "attention head, 64 x 768": (64, 768, 768),
    "attention head of a small model, 32 x 128": (32, 128, 128),
    "adapter of rank 8, 8 x 768": (8, 768, 768),
    "adapter of rank 4, 4 x 64": (4, 64, 64),
}
HEADS = (1, 12, 144)
RESULTS = Path(__file__).parent / "results"


def build(
    sizes: tuple[int, int, int], heads: int, metric: str, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The unit of work in one batch, and head by head."""
    together = FactorQuotient(*sizes, metric=metric, batch_shape=(heads,))
    single = FactorQuotient(*sizes, metric=metric)
    source = torch.Generator().manual_seed(0)
    x, partials, momentum = (together.random_point(generator=source, dtype=dtype) for _ in range(3))
    alone = [
        [tuple(factor[h].clone() for factor in pair) for pair in (x, partials, momentum)]
        for h in range(heads)
    ]

    def work(manifold: FactorQuotient, x: Any, partials: Any, momentum: Any) -> None:
        gradient = manifold.gradient(x, partials)
        horizontal = manifold.horizontal_component(x, momentum)
        manifold.retract(
            x, tuple(-1e-3 * (g + h) for g, h in zip(gradient, horizontal, strict=True))
        )

    def batch() -> None:
        work(together, x, partials, momentum)

    def loop() -> None:
        for arguments in alone:
            work(single, *arguments)

    return batch, loop


def settle_allocator() -> None:
    """Free a large tensor once, as every process that trains a model has.

    From then on glibc keeps freed memory of up to twice that size; before, it hands smaller pieces
    back to the operating system after every operation, which takes longer than the operation.
    """
    torch.empty(2**25 - 2**12, dtype=torch.uint8)


def measure(functions: tuple[Callable[[], None], ...], seconds: float) -> list[dict[str, Any]]:
    """Wall and processor times of functions called in turn until the time is up."""
    for function in functions:
        function()
    wall: list[list[float]] = [[] for _ in functions]
    processor: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(wall[0]) < 5:
        for place, function in enumerate(functions):
            start, cpu = time.perf_counter(), time.process_time()
            function()
            wall[place].append(time.perf_counter() - start)
            processor[place].append(time.process_time() - cpu)
    return [
        {
            "repetitions": len(times),
            "milliseconds": spread(times),
            "processor_milliseconds": spread(cpu_times),
        }
        for times, cpu_times in zip(wall, processor, strict=True)
    ]


def spread(times: list[float]) -> dict[str, float]:
    """Least, quartiles and median, in milliseconds."""
    first, median, third = statistics.quantiles(times, n=4)
    values = {"least": min(times), "first_quartile": first, "median": median}
    values["third_quartile"] = third
    return {name: round(1e3 * value, 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", default="preconditioned")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each size and head count")
    parser.add_argument("--runs", type=int, default=2, help="how often to measure everything")
    parser.add_argument("--out", type=Path, default=RESULTS / "batched-heads.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    record: dict[str, Any] = {
        "work": "gradient, horizontal component and retraction, with checks",
        "metric": arguments.metric,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "environment": describe_environment("cpu"),
        "results": [],
    }
    cases = itertools.product(range(arguments.runs), SIZES.items(), HEADS)
    for run, (name, sizes), heads in cases:
        functions = build(sizes, heads, arguments.metric, getattr(torch, arguments.dtype))
        load = os.getloadavg()[0]
        batch, loop = measure(functions, arguments.seconds)
        ratios = {
            f"loop_over_batch_{kind}": round(loop[kind]["median"] / batch[kind]["median"], 2)
            for kind in ("processor_milliseconds", "milliseconds")
        }
        record["results"].append(
            {
                "run": run,
                "size": name,
                "r, n, m": sizes,
                "heads": heads,
                **ratios,
                "load_average": round(load, 2),
                "batch": batch,
                "loop": loop,
            }
        )
        print(f"run {run}: {name}, {heads} heads: {ratios}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
