"""pymanopt's solvers and checks on our manifolds: paths, invariance, products."""

import numpy as np
import pytest
import torch

pytest.importorskip("pymanopt", reason="pip install pymanopt")

from pymanopt.manifolds import Euclidean, Product
from pymanopt.optimizers import (
    ConjugateGradient,
    NelderMead,
    ParticleSwarm,
    SteepestDescent,
    TrustRegions,
)
from pymanopt.tools import diagnostics

import quotientopt.pymanopt as qp
from tests.adapters import pymanopt_cases as cases

SOLVERS = (SteepestDescent, ConjugateGradient, TrustRegions)
METRICS = ("preconditioned", "right-invariant")
every_kind = pytest.mark.parametrize("kind", cases.KINDS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the generator that pymanopt uses


# ---- paths --------------------------------------------------------------------------------------


@every_kind
@every_solver
@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_both_backends_take_the_same_path(kind, solver, batch_shape):
    records = []
    for backend in cases.BACKENDS:
        adapted = cases.manifold(kind, batch_shape, backend)
        torch.manual_seed(1)
        start = adapted.random_point()
        problem = qp.problem(adapted, cases.invariant_cost(adapted))
        records.append(cases.trace(solver, problem, start))
    numpy, tensor = records
    assert len(numpy.costs) > 6
    assert numpy.costs[-1] < 0.9 * numpy.costs[0]
    assert cases.relative(numpy.costs, tensor.costs) < 1e-12
    assert cases.deviation(numpy.points[-1], tensor.points[-1]) < 1e-12
    assert isinstance(numpy.points[-1][0], np.ndarray)
    assert isinstance(tensor.points[-1][0], torch.Tensor)


@every_kind
@every_solver
@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_the_path_does_not_depend_on_the_representative(kind, solver, batch_shape):
    adapted = cases.manifold(kind, batch_shape)
    cost = cases.invariant_cost(adapted)
    start, g = adapted.random_point(), cases.element(adapted, cond=100.0)
    one = cases.trace(solver, qp.problem(adapted, cost), start)
    other = cases.trace(solver, qp.problem(adapted, cost), cases.act(adapted, g, start))
    assert cases.relative(one.costs, other.costs) < 1e-9
    assert cases.deviation(other.points[-1], cases.act(adapted, g, one.points[-1])) < 1e-8
    assert cases.deviation(other.points[0], one.points[0]) > 0.1


@every_solver
@pytest.mark.parametrize("metric", METRICS)
def test_the_path_of_least_squares_does_not_depend_on_the_gauge_unlike_that_of_the_factors(
    solver, metric
):
    cost, (A, B) = cases.least_squares()
    adapted = qp.FactorManifold(3, 12, 10, metric=metric)
    start = adapted.from_torch((A, B))
    moved = cases.act(adapted, cases.element(adapted, cond=100.0), start)
    problem = qp.problem(adapted, cost)
    one, other = (cases.trace(solver, problem, x).costs for x in (start, moved))
    assert one[-1] < 0.1 * one[0]
    assert one[-1] > 1e-16 * one[0]  # above rounding
    assert cases.relative(one, other) < 1e-8

    plain = qp.problem(cases.euclidean_factors(), cost)
    one, other = (cases.trace(solver, plain, list(x)) for x in (start, moved))
    shared = min(len(one.costs), len(other.costs))
    assert abs(one.costs[0] / other.costs[0] - 1) < 1e-10
    assert cases.relative(one.costs[:shared], other.costs[:shared]) > 0.1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_trust_regions_converge_quadratically(metric, backend):
    cost, _ = cases.least_squares()
    adapted = qp.FactorManifold(3, 12, 10, metric=metric, backend=backend)
    result = TrustRegions(verbosity=0, min_gradient_norm=1e-10).run(
        qp.problem(adapted, cost), initial_point=adapted.random_point()
    )
    assert result.cost < 1e-18
    assert result.gradient_norm < 1e-10
    assert result.iterations < 60
    assert isinstance(result.point, qp.FactorPair)
    adapted.quotient.check_point(cases.on_tensors(result.point))


def test_solvers_start_from_plain_pairs_and_from_nothing():
    cost, _ = cases.least_squares()
    adapted = qp.FactorManifold(3, 12, 10)
    problem = qp.problem(adapted, cost)
    x = adapted.random_point()
    for solver in SOLVERS:
        first = cases.trace(solver, problem, x).costs
        for start in (tuple(x), list(x)):
            assert cases.trace(solver, problem, start).costs == first
        torch.manual_seed(5)
        result = solver(verbosity=0, max_iterations=5).run(problem)
        torch.manual_seed(5)
        assert result.cost < problem.cost(adapted.random_point())


@pytest.mark.parametrize("rule", ["FletcherReeves", "PolakRibiere", "HagerZhang", "LiuStorey"])
def test_every_rule_of_conjugate_gradients(rule):
    adapted = cases.manifold("preconditioned", backend="torch")
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    record = cases.trace(ConjugateGradient, problem, adapted.random_point(), beta_rule=rule)
    assert record.costs[-1] < 0.9 * record.costs[0]


def test_randomised_trust_regions():
    cost, _ = cases.least_squares()
    for backend in cases.BACKENDS:
        adapted = qp.FactorManifold(3, 12, 10, backend=backend)
        problem = qp.problem(adapted, cost)
        record = cases.trace(TrustRegions, problem, adapted.random_point(), 40, use_rand=True)
        assert record.costs[-1] < 1e-10


# ---- derivatives, by pymanopt's own check -------------------------------------------------------


@pytest.fixture
def slope(monkeypatch):
    """Slope of the error found by pymanopt's check of directional derivatives."""

    def straightest(x, y, window):
        # In place of pymanopt's, which NumPy 2.4 stops: it assigns an array to a scalar.
        fits = []
        for start in range(len(x) - window):
            part = slice(start, start + window + 1)
            poly, residual, *_ = np.polyfit(x[part], y[part], 1, full=True)
            fits.append((float(residual[0]), poly))
        return None, min(fits, key=lambda fit: fit[0])[1]

    monkeypatch.setattr(diagnostics, "identify_linear_piece", straightest)

    def of(problem, x, *, quadratic):
        d = problem.manifold.random_tangent_vector(x)
        _, _, _, poly = diagnostics.check_directional_derivative(
            problem, x, d, use_quadratic_model=quadratic
        )
        return poly[0]

    return of


def second_order(kind, backend):
    flat = kind in cases.GRAMS
    options = {} if flat else {"retraction": "second-order"}
    return cases.manifold(kind, backend=backend, **options)


@every_kind
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_pymanopts_check_of_the_derivatives(kind, backend, slope):
    adapted = second_order(kind, backend)
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    x = adapted.random_point()
    assert abs(slope(problem, x, quadratic=False) - 2) < 0.02
    assert abs(slope(problem, x, quadratic=True) - 3) < 0.05


@pytest.mark.parametrize("kind", ["preconditioned", "right-invariant", "rotary"])
def test_a_wrong_hessian_or_gradient_is_found(kind, slope, monkeypatch):
    adapted = second_order(kind, "numpy")
    problem = qp.problem(adapted, cases.invariant_cost(adapted))
    x = adapted.random_point()

    def without_christoffel(point, partials, second, u):
        return adapted.projection(point, adapted.euclidean_to_riemannian_gradient(point, second))

    with monkeypatch.context() as patch:
        patch.setattr(adapted, "euclidean_to_riemannian_hessian", without_christoffel)
        assert abs(slope(problem, x, quadratic=True) - 2) < 0.05
    assert abs(slope(problem, x, quadratic=True) - 3) < 0.05
    additive = cases.manifold(kind)  # whose paths turn away from geodesics at once
    plain = qp.problem(additive, cases.invariant_cost(additive))
    assert abs(slope(plain, x, quadratic=True) - 2) < 0.05
    with monkeypatch.context() as patch:
        patch.setattr(adapted, "euclidean_to_riemannian_gradient", lambda x, partials: partials)
        problem = qp.problem(adapted, cases.invariant_cost(adapted))
        partials = adapted.from_torch(tuple(cases.tensors(problem.euclidean_gradient(x))))
        monkeypatch.setattr(problem, "_riemannian_gradient", lambda point: partials)
        assert abs(slope(problem, x, quadratic=False) - 1) < 0.05


# ---- products -----------------------------------------------------------------------------------


def mixture():
    """A low-rank matrix, a Gram matrix and an offset, fitted together."""
    cost, _ = cases.least_squares()
    generator = torch.Generator().manual_seed(7)
    gram, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 6), (6,))
    )

    def function(A, B, X, b):
        distance = (X @ X.mT - gram @ gram.mT / 6).square().sum() / 2
        return cost(A, B) + distance + (b - offset - X.square().sum(-1)).square().sum() / 2

    return function


@every_solver
def test_products_with_pymanopts_own_manifolds(solver):
    factor, gram = qp.FactorManifold(3, 12, 10), qp.GramManifold(6, 2)
    product = Product([factor, gram, Euclidean(6)])
    problem = qp.problem(product, mixture())
    start = product.random_point()
    record = cases.trace(solver, problem, start)
    assert record.costs[-1] < 0.2 * record.costs[0]
    g, h = cases.element(factor, cond=50.0), cases.element(gram)
    moved = [cases.act(factor, g, start[0]), cases.act(gram, h, start[1]), start[2]]
    other = cases.trace(solver, problem, moved)
    assert cases.relative(record.costs, other.costs) < 1e-8


@every_solver
def test_products_of_our_manifolds_on_both_backends(solver):
    cost, _ = cases.least_squares()
    records = []
    for backend in cases.BACKENDS:
        torch.manual_seed(2)
        factors = [
            qp.FactorManifold(3, 12, 10, batch_shape=(2,), backend=backend),
            qp.GramManifold(6, 2, backend=backend),
        ]
        product = Product(factors)

        def both(A, B, X):
            total = sum(cost(A[k], B[k]) for k in range(2))
            return total + (X @ X.mT - torch.ones(6, 6).to(X)).square().sum()

        problem = qp.problem(product, both)
        records.append(cases.trace(solver, problem, product.random_point(), 25))
    assert records[0].costs[-1] < 0.1 * records[0].costs[0]
    assert cases.relative(records[0].costs, records[1].costs) < 1e-12


def test_costs_that_change_along_the_orbit_of_one_factor_are_refused():
    product = Product([qp.FactorManifold(3, 12, 10), qp.GramManifold(6, 2), Euclidean(6)])
    function = mixture()
    problem = qp.problem(product, lambda A, B, X, b: function(A, B, X, b) + X[0, 0])
    with pytest.raises(ValueError, match=r"not invariant under O\(2\)"):
        problem.riemannian_gradient(product.random_point())


def test_a_product_counts_the_heads_of_a_batch():
    separate = Product([qp.FactorManifold(3, 7, 5) for _ in range(2)])
    together = qp.FactorManifold(3, 7, 5, batch_shape=(2,))
    assert separate.dim == together.dim
    assert abs(separate.typical_dist / together.typical_dist - 1) < 1e-12
    points = separate.random_point()
    stacked = qp.FactorPair(*(np.stack(arrays) for arrays in zip(*points, strict=True)))
    assert abs(together.norm(stacked, stacked) / separate.norm(points, points) - 1) < 1e-12
    targets = torch.randn(2, 7, 5, dtype=torch.float64)

    def apart(A1, B1, A2, B2):
        squares = ((A1.mT @ B1 - targets[0]), (A2.mT @ B2 - targets[1]))
        return sum(square.square().sum() for square in squares)

    def at_once(A, B):
        return (A.mT @ B - targets).square().sum()

    for solver in SOLVERS:
        one = cases.trace(solver, qp.problem(separate, apart), points)
        other = cases.trace(solver, qp.problem(together, at_once), stacked)
        assert cases.relative(one.costs, other.costs) < 1e-9


# ---- solvers without derivatives ----------------------------------------------------------------


def small(kind, backend="numpy"):
    """A manifold of dimension 3 or 4 with a cost whose minimum is 0."""
    if kind == "gram":
        adapted = qp.GramManifold(3, 1, backend=backend)
        target = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
        target = target @ target.mT
    else:
        adapted = qp.FactorManifold(1, 2, 2, metric=kind, backend=backend)
        target = torch.tensor([[2.0, 1.0], [4.0, 2.0]], dtype=torch.float64)

    def cost(x):
        return (adapted.quotient.canonical_projection(x) - target).square().sum()

    return adapted, qp.problem(adapted, cost)


without_derivatives = pytest.mark.parametrize(
    ("kind", "backend"),
    [("preconditioned", "numpy"), ("right-invariant", "torch"), ("gram", "numpy")],
)


@without_derivatives
def test_particle_swarm(kind, backend):
    adapted, problem = small(kind, backend)
    result = ParticleSwarm(verbosity=0, population_size=12, max_iterations=40).run(problem)
    start = np.median([problem.cost(adapted.random_point()) for _ in range(100)])
    assert result.cost < 1e-2 * start


@without_derivatives
def test_nelder_mead(kind, backend):
    adapted, problem = small(kind, backend)
    result = NelderMead(verbosity=0, max_iterations=60).run(problem)
    start = np.median([problem.cost(adapted.random_point()) for _ in range(100)])
    assert result.cost < 1e-1 * start


def test_particle_swarm_on_a_product():
    mixed = Product([qp.FactorManifold(1, 2, 2), Euclidean(2)])
    swarm = ParticleSwarm(verbosity=0, population_size=15, max_iterations=80)
    problem = qp.problem(mixed, lambda A, B, b: (A.mT @ B - 1).square().sum() + b.square().sum())
    assert swarm.run(problem).cost < 0.05
