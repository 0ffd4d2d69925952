"""Costs that read more than the point: no answer of one evaluation is used in another."""

import numpy as np
import pymanopt
import pytest
import torch

import quotientopt.pymanopt as qp
from tests.adapters import pymanopt_cases as cases

MANIFOLDS = {
    "factor": lambda backend: cases.manifold("preconditioned", backend=backend),
    "gram": lambda backend: cases.manifold("gram", backend=backend),
    "product": lambda backend: pymanopt.manifolds.Product(
        [cases.manifold("preconditioned", backend=backend), cases.manifold("gram", backend=backend)]
    ),
    "sphere": lambda backend: pymanopt.manifolds.Sphere(5),
}


class Penalised:
    """Distance to a target plus a penalty, both functions of invariants."""

    def __init__(self):
        self.weight = 0.0

    def __call__(self, *arrays):
        if len(arrays) == 1 and arrays[0].ndim == 1:
            invariants = [arrays[0].square()]
        else:
            invariants = []
            if len(arrays) >= 2:
                invariants.append(arrays[0].mT @ arrays[1])
            if len(arrays) != 2:
                invariants.append(arrays[-1] @ arrays[-1].mT)
        loss = sum((x - 1.0).square().sum() for x in invariants)
        return loss + self.weight * sum(
            (x.trace() if x.ndim > 1 else x[0]) ** 2 for x in invariants
        )


def answers(problem, x, u):
    return {
        "cost": problem.cost(x),
        "gradient": problem.riemannian_gradient(x),
        "euclidean gradient": problem.euclidean_gradient(x),
        "hessian": problem.riemannian_hessian(x, u),
        "euclidean hessian": problem.euclidean_hessian(x, u),
    }


def flat(value):
    if isinstance(value, (list, tuple)):
        return np.concatenate([flat(part) for part in value])
    return np.ravel(np.asarray(value, dtype=float))


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_weight_that_changes_is_seen_at_the_same_point(name, backend):
    if name == "sphere" and backend == "torch":
        pytest.skip("pymanopt's own manifolds have NumPy arrays")
    manifold, cost = MANIFOLDS[name](backend), Penalised()
    problem = qp.problem(manifold, cost)
    x = manifold.random_point()
    u = manifold.random_tangent_vector(x)
    first = answers(problem, x, u)
    cost.weight = 3.0
    fresh = answers(qp.problem(manifold, cost), x, u)
    for order in (list(first), list(reversed(first))):
        cost.weight = 0.0
        answers(problem, x, u)
        for key in order:  # after whatever was asked for last
            cost.weight = 3.0
            own = {
                "cost": lambda: problem.cost(x),
                "gradient": lambda: problem.riemannian_gradient(x),
                "euclidean gradient": lambda: problem.euclidean_gradient(x),
                "hessian": lambda: problem.riemannian_hessian(x, u),
                "euclidean hessian": lambda: problem.euclidean_hessian(x, u),
            }[key]()
            assert np.array_equal(flat(own), flat(fresh[key])), key
            assert not np.allclose(flat(own), flat(first[key])), key
            cost.weight = 0.0
            problem.cost(x)


@pytest.mark.parametrize("solver", ["SteepestDescent", "ConjugateGradient", "TrustRegions"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_warm_started_penalty_method(solver, backend):
    """Where the last run ended, the next begins: it must begin with its own weight."""
    manifold = cases.manifold("preconditioned", backend=backend)
    target = torch.linspace(-2, 2, 35, dtype=torch.float64).view(7, 5)

    def run(shared):
        cost = {"mu": 0.0}

        def penalised(A, B):
            product = A.mT @ B
            return (product - target).square().sum() + cost["mu"] * product.sum().square()

        problem = qp.problem(manifold, penalised)
        generator = torch.Generator().manual_seed(0)
        start = manifold.quotient.random_point(generator=generator, dtype=torch.float64)
        x, ends = manifold.from_torch(start), []
        for mu in (0.0, 1.0, 10.0):
            cost["mu"] = mu
            if not shared:
                problem = qp.problem(manifold, penalised)
            optimizer = getattr(pymanopt.optimizers, solver)(verbosity=0, max_iterations=60)
            result = optimizer.run(problem, initial_point=x)
            x = result.point
            ends.append(result.cost)
            assert result.cost == penalised(*map(torch.as_tensor, x)).item()
        return ends

    assert run(shared=True) == run(shared=False)


def test_a_mask_written_in_place_and_a_cost_that_draws():
    """Minibatches: every evaluation draws its own."""
    manifold = cases.manifold("preconditioned")
    mask = torch.ones(7, 5, dtype=torch.float64)
    problem = qp.problem(manifold, lambda A, B: (mask * (A.mT @ B)).square().sum())
    x = manifold.random_point()
    whole = problem.cost(x)
    mask[:, 2:] = 0
    assert problem.cost(x) < whole
    generator = torch.Generator().manual_seed(0)

    def drawn(A, B):
        rows = torch.randperm(7, generator=generator)[:3]
        return (A.mT @ B)[rows].square().sum()

    problem = qp.problem(manifold, drawn, check_invariance=False)
    assert len({problem.cost(x) for _ in range(5)}) > 1
