"""Low-rank least squares and matrix completion: pymanopt's solvers on four geometries.

The same cost, differentiated by the same autograd code, from the same standard normal factors, with
every solver at pymanopt's defaults: on our factor quotient with both metrics, on pymanopt's
FixedRankEmbedded (it has no Hessian, so no trust regions) and on its product of Euclidean spaces,
the factors without any geometry. Gradient norms of different metrics cannot be compared, so what is
measured and what ends a run is the gradient of the cost as a function of the matrix AᵀB, projected
to the tangent space of the rank-r matrices: the same number for every representation.

    python benchmarks/low_rank.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import command_of
from low_rank_report import markdown, picture, thinned
from pymanopt.manifolds import Euclidean, FixedRankEmbedded, Product
from pymanopt.optimizers import ConjugateGradient, SteepestDescent, TrustRegions
from torch import Tensor

import quotientopt.pymanopt as adapter
from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.record import prepare_folder, write_atomically

RESULTS = Path(__file__).parent / "results" / "low-rank"
RANK, ROWS, COLUMNS = 5, 200, 150
OBSERVATIONS, OBSERVED = 400, 0.4  # rows of the design, share of known entries
TOLERANCE = 1e-8
SOLVERS = {
    "steepest descent": SteepestDescent,
    "conjugate gradients": ConjugateGradient,
    "trust regions": TrustRegions,
}
EMBEDDED = "FixedRankEmbedded"
EUCLIDEAN = "Euclidean factors"
PRECONDITIONED = "quotient, preconditioned"
GEOMETRIES = (PRECONDITIONED, "quotient, right-invariant", EMBEDDED, EUCLIDEAN)


@dataclass(frozen=True)
class Setting:
    """A problem: singular values of the target from 1 to 1/condition, of the design likewise."""

    problem: str
    condition: float
    noise: float
    design: float = 1.0


LEAST_SQUARES, COMPLETION = "least squares", "completion"
SWEEP = (
    *(Setting(LEAST_SQUARES, *pair) for pair in itertools.product((10.0, 1e3), (0.0, 0.01))),
    Setting(LEAST_SQUARES, 10.0, 0.01, design=1e3),
    *(Setting(COMPLETION, *pair) for pair in itertools.product((10.0, 1e3), (0.0, 0.01))),
)
# Compared at length: trust regions with and without the quotient, and what pymanopt had to offer.
BAR_RUNS = (
    (PRECONDITIONED, "trust regions"),
    (EUCLIDEAN, "trust regions"),
    (EMBEDDED, "steepest descent"),
)
PICTURES = {
    "least-squares": Setting(LEAST_SQUARES, 1e3, 0.01),
    "ill-conditioned-design": Setting(LEAST_SQUARES, 10.0, 0.01, design=1e3),
    "completion": Setting(COMPLETION, 1e3, 0.01),
}
BAR = tuple(PICTURES.values())


@dataclass
class Instance:
    """One draw of a problem: its cost of the matrix, and the start."""

    cost: Callable[[Tensor, Tensor], Tensor]  # of left, n×r, and right, r×m
    matrix_gradient: Callable[[Tensor, Tensor], Tensor]
    start: tuple[Tensor, Tensor]


@dataclass
class Run:
    """A solver on a geometry: what it reached after which outer iteration and how many seconds."""

    setting: Setting
    seed: int
    geometry: str
    solver: str
    limit: float
    bar: bool
    status: str = ""
    hessian_products: int = 0
    iterations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)


def draw(setting: Setting, seed: int) -> Instance:
    """The data of a problem; ``½ ‖X AᵀB − Y‖²`` or ``½ ‖mask ∘ (AᵀB − Y)‖²``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def spectrum(rows: int, columns: int, rank: int, condition: float) -> Tensor:
        left, right = (torch.linalg.qr(normal(size, rank)).Q for size in (rows, columns))
        values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
        return (left * values) @ right.mT

    target = spectrum(ROWS, COLUMNS, RANK, setting.condition)
    if setting.problem == LEAST_SQUARES:
        if setting.design > 1:
            design = spectrum(OBSERVATIONS, ROWS, ROWS, setting.design)
        else:
            design = normal(OBSERVATIONS, ROWS) / math.sqrt(OBSERVATIONS)
        data = design @ target
        data = data + setting.noise * data.norm() / math.sqrt(data.numel()) * normal(*data.shape)

        def residual(left: Tensor, right: Tensor) -> Tensor:
            return (design @ left) @ right - data

        def matrix_gradient(left: Tensor, right: Tensor) -> Tensor:
            return design.mT @ residual(left, right)
    else:
        mask = (torch.rand(ROWS, COLUMNS, generator=generator) < OBSERVED).double()
        scale = setting.noise * target.norm() / math.sqrt(target.numel())
        data = target + scale * normal(*target.shape)

        def residual(left: Tensor, right: Tensor) -> Tensor:
            return mask * (left @ right - data)

        matrix_gradient = residual

    def cost(left: Tensor, right: Tensor) -> Tensor:
        return residual(left, right).square().sum() / 2

    return Instance(cost, matrix_gradient, (normal(RANK, ROWS), normal(RANK, COLUMNS)))


def tangent_gradient(instance: Instance, left: Tensor, right: Tensor) -> float:
    """``‖D P + Q D − Q D P‖`` with D = ∂f/∂(AᵀB) and the projections Q, P to its images."""
    D = instance.matrix_gradient(left, right)
    U, V = torch.linalg.qr(left).Q, torch.linalg.qr(right.mT).Q
    from_left, from_right = U.mT @ D, D @ V
    both = from_left @ V
    square = from_left.square().sum() + from_right.square().sum() - both.square().sum()
    return math.sqrt(max(square.item(), 0.0))


def pose(geometry: str, instance: Instance) -> tuple[Any, Any, Callable[[Any], Sequence[Tensor]]]:
    """The pymanopt problem on a geometry, its start, and how its points name left and right."""
    A, B = (factor.numpy() for factor in instance.start)
    if geometry == EMBEDDED:
        manifold = FixedRankEmbedded(ROWS, COLUMNS, RANK)
        u, s, vt = np.linalg.svd(A.T @ B, full_matrices=False)
        start = type(manifold.random_point())(u[:, :RANK], s[:RANK], vt[:RANK])

        def cost(u: Tensor, s: Tensor, vt: Tensor) -> Tensor:
            return instance.cost(u * s, vt)

        def matrices(point: Any) -> Sequence[Tensor]:
            u, s, vt = map(torch.from_numpy, point)
            return u * s, vt

        return adapter.problem(manifold, cost), start, matrices
    if geometry == EUCLIDEAN:
        manifold = Product([Euclidean(*A.shape), Euclidean(*B.shape)])
        start = [A, B]
    else:
        metric = geometry.removeprefix("quotient, ")
        manifold = adapter.FactorManifold(RANK, ROWS, COLUMNS, metric=metric)
        start = adapter.FactorPair(A, B)
    problem = adapter.problem(manifold, lambda A, B: instance.cost(A.mT, B))
    return problem, start, lambda point: (torch.from_numpy(point[0]).mT, torch.from_numpy(point[1]))


class Ended(Exception):  # noqa: N818 -- it ends a run and is no error
    """The tolerance or the time limit is reached."""


class Recorded:
    """A problem that notes what its solver does, off the clock, and ends it."""

    def __init__(self, problem: Any, run: Run, instance: Instance, matrices: Any) -> None:
        self.manifold, self.preconditioner = problem.manifold, problem.preconditioner
        self._problem, self._run = problem, run
        self._instance, self._matrices = instance, matrices
        self._cost_calls = 0
        self._start = self._now()
        self._off_the_clock = (0.0, 0.0)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def _elapsed(self) -> tuple[float, float]:
        cpu, wall = (
            now - start - off
            for now, start, off in zip(self._now(), self._start, self._off_the_clock, strict=True)
        )
        return cpu, wall

    def cost(self, point: Any) -> float:
        self._cost_calls += 1
        return self._problem.cost(point)

    def riemannian_gradient(self, point: Any) -> Any:
        gradient, run = self._problem.riemannian_gradient(point), self._run
        (cpu, wall), before = self._elapsed(), self._now()
        # Trust regions evaluate the cost once in each outer iteration, rejected ones included.
        accepted = len(run.iterations)
        run.iterations.append(self._cost_calls - 1 if run.solver == "trust regions" else accepted)
        run.seconds.append(cpu)
        run.wall_seconds.append(wall)
        run.costs.append(self._problem.cost(point))
        run.gradients.append(tangent_gradient(self._instance, *self._matrices(point)))
        if run.gradients[-1] < TOLERANCE:
            raise Ended("reached")
        self._check_time()
        self._off_the_clock = tuple(
            off + after - start
            for off, after, start in zip(self._off_the_clock, self._now(), before, strict=True)
        )
        return gradient

    def riemannian_hessian(self, point: Any, vector: Any) -> Any:
        self._run.hessian_products += 1
        self._check_time()
        return self._problem.riemannian_hessian(point, vector)

    def _check_time(self) -> None:
        if self._elapsed()[0] > self._run.limit:
            raise Ended("time limit")


def execute(run: Run) -> Run:
    """One run, from the common start to the tolerance, the limit or the solver's own end."""
    instance = draw(run.setting, run.seed)
    problem, start, matrices = pose(run.geometry, instance)
    optimizer = SOLVERS[run.solver](
        max_iterations=10**6, max_time=1e6, min_gradient_norm=0.0, verbosity=0
    )
    try:
        result = optimizer.run(Recorded(problem, run, instance, matrices), initial_point=start)
        run.status = result.stopping_criterion.split(" reached")[0].removeprefix("Terminated - ")
    except Ended as end:
        run.status = str(end)
    except ValueError as error:
        run.status = str(error)
    return run


def work(seeds: int, limit: float, bar_limit: float) -> Iterable[Run]:
    """All runs; those of the bar get a limit of their own."""
    for setting, seed, geometry, solver in itertools.product(
        SWEEP, range(seeds), GEOMETRIES, SOLVERS
    ):
        if (geometry, solver) == (EMBEDDED, "trust regions"):
            continue
        bar = setting in BAR and (geometry, solver) in BAR_RUNS
        yield execute(Run(setting, seed, geometry, solver, bar_limit if bar else limit, bar))


def overhead(geometry: str) -> list[dict[str, Any]]:
    """CPU microseconds of a call through the adapter, and of the quotient's own method.

    The smallest mean of several rounds: what else runs on the machine only adds to it.
    """
    problem, x, _ = pose(geometry, draw(PICTURES["least-squares"], 0))
    adapted, core = problem.manifold, problem.manifold.quotient
    u, d = adapted.random_tangent_vector(x), problem.euclidean_gradient(x)
    tensors = [adapted.to_torch(name, z) for name, z in (("x", x), ("u", u), ("d", d))]
    point, vector, partials = tensors
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any]]] = {
        "inner product": (adapted.inner_product, (x, u, u), core.inner),
        "projection": (adapted.projection, (x, u), core.horizontal_component),
        "retraction": (adapted.retraction, (x, u), core.retract),
        "gradient": (adapted.euclidean_to_riemannian_gradient, (x, d), core.gradient),
        "Hessian": (adapted.euclidean_to_riemannian_hessian, (x, d, d, u), core.hessian),
    }
    converted = {id(x): point, id(u): vector, id(d): partials}
    rows = []
    for name, (method, arrays, own) in calls.items():
        arguments = [converted[id(array)] for array in arrays]
        times = _microseconds(method, *arrays), _microseconds(own, *arguments)
        rows.append({"geometry": geometry, "call": name, "adapter": times[0], "core": times[1]})
    return rows


def _microseconds(function: Callable[..., Any], *arguments: Any) -> float:
    calls = 100
    timer = timeit.Timer(lambda: function(*arguments), timer=time.process_time)
    return 1e6 * min(timer.repeat(number=calls, repeat=7)) / calls


def warm_up() -> None:
    """Let torch and pymanopt load what they load on first use."""
    setting = Setting(COMPLETION, 10.0, 0.0)
    for geometry, solver in itertools.product(GEOMETRIES, SOLVERS):
        if (geometry, solver) != (EMBEDDED, "trust regions"):
            execute(Run(setting, 0, geometry, solver, 0.05, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=0.4, help="CPU seconds of a run")
    parser.add_argument(
        "--bar-limit", type=float, default=6.0, help="of the runs compared at length"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare_folder(arguments.out)
    warm_up()
    runs = []
    for run in work(arguments.seeds, arguments.limit, arguments.bar_limit):
        runs.append(run)
        print(
            f"{run.setting} seed {run.seed}, {run.solver} on {run.geometry}: {run.status} after "
            f"{run.iterations[-1]} iterations, {run.seconds[-1]:.2f} s, "
            f"gradient {run.gradients[-1]:.1e}",
            flush=True,
        )
    environment = describe_environment("cpu") | {
        package: importlib.metadata.version(package) for package in ("pymanopt", "scipy")
    }
    protocol = {
        "rank": RANK,
        "rows": ROWS,
        "columns": COLUMNS,
        "observations": OBSERVATIONS,
        "observed": OBSERVED,
        "tolerance": TOLERANCE,
        "threads": 1,
        "seeds": list(range(arguments.seeds)),
        "limit": arguments.limit,
        "bar_limit": arguments.bar_limit,
        "cpu_seconds": time.process_time(),
    }
    record = {
        "command": command_of("low_rank.py"),
        "protocol": protocol,
        "environment": environment,
        "overhead": [row for geometry in GEOMETRIES[:2] for row in overhead(geometry)],
        "runs": [asdict(run) for run in runs],
    }
    write_atomically(
        arguments.out / "low-rank.json",
        json.dumps(record | {"runs": [thinned(run) for run in record["runs"]]}) + "\n",
    )
    write_atomically(arguments.out / "low-rank.md", markdown(record))
    for name, setting in PICTURES.items():
        shown = [run for run in record["runs"] if run["setting"] == asdict(setting)]
        write_atomically(arguments.out / f"{name}.png", picture(shown))


if __name__ == "__main__":
    main()
