"""Manifolds and problems for the tests of the pymanopt adapter."""

import math

import numpy as np
import pymanopt
import torch

import quotientopt.pymanopt as qp
from quotientopt.groups import O, RotaryCommutant, StabilizerOfOnes

BATCH_SHAPES = ((), (3,), (2, 3))
BACKENDS = ("numpy", "torch")
GRAMS = ("gram", "stabilizer", "broad")
KINDS = ("preconditioned", "right-invariant", "rotary", "orthogonal", *GRAMS)


def manifold(kind, batch_shape=(), backend="numpy", **options):
    """A manifold of a kind; 3×7 and 3×5 factors, or 7×3 token matrices."""
    options = {"batch_shape": batch_shape, "backend": backend} | options
    if kind == "gram":
        return qp.GramManifold(7, 3, **options)
    if kind == "broad":
        return qp.GramManifold(3, 7, **options)
    if kind == "stabilizer":
        return qp.GramManifold(7, 3, stabilizer=StabilizerOfOnes(3), **options)
    if kind == "rotary":
        return qp.FactorManifold(3, 7, 5, group=RotaryCommutant(3, 2), **options)
    if kind == "orthogonal":
        return qp.FactorManifold(3, 7, 5, group=O(3), metric="euclidean", **options)
    return qp.FactorManifold(3, 7, 5, metric=kind, **options)


def tensors(point):
    """The arrays of a point as a list of tensors."""
    arrays = point if isinstance(point, (tuple, list)) else [point]
    return [torch.as_tensor(array) for array in arrays]


def on_tensors(point):
    """A point of any backend as our manifolds take it."""
    parts = tensors(point)
    return tuple(parts) if len(parts) > 1 else parts[0]


def move_to(point, device):
    """The tensors of a point on a device."""
    parts = [part.to(device) for part in tensors(point)]
    return tuple(parts) if len(parts) > 1 else parts[0]


def invariant_cost(manifold, seed=0):
    """A smooth, not convex function of the invariants, as a function of the point."""
    quotient = manifold.quotient
    generator = torch.Generator().manual_seed(seed)
    point = quotient.random_point(generator=generator, dtype=torch.float64)
    target = quotient.canonical_projection(point)

    def cost(x):
        invariants = quotient.canonical_projection(x)
        difference = invariants - target.to(invariants)
        return difference.square().sum() / 2 + torch.sin(invariants).sum() / 5

    return cost


def element(manifold, cond=30.0, seed=3):
    """A random element of the manifold's group."""
    quotient = manifold.quotient
    generator = torch.Generator().manual_seed(seed)
    return quotient.group.random(
        quotient.batch_shape, cond=cond, generator=generator, dtype=torch.float64
    )


def act(manifold, g, point):
    """Another representative of a point or tangent vector."""
    return manifold.from_torch(manifold.quotient.act(g, manifold.to_torch("point", point)))


def relative(a, b):
    """Largest relative difference of two lists of numbers."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.max(np.abs(a - b) / np.maximum(np.abs(a), np.abs(b)).clip(1e-300))


def deviation(p, q):
    """Relative difference of two points or tangent vectors."""
    norms = [
        torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-300)
        for a, b in zip(tensors(p), tensors(q), strict=True)
    ]
    return max(norms).item()


class Trace:
    """A problem that remembers the cost and the point wherever a solver forms a gradient."""

    def __init__(self, problem):
        self.manifold, self.preconditioner = problem.manifold, problem.preconditioner
        self.cost, self.riemannian_hessian = problem.cost, problem.riemannian_hessian
        self._problem = problem
        self.costs = []
        self.points = []

    def riemannian_gradient(self, point):
        self.costs.append(self.cost(point))
        self.points.append(point)
        return self._problem.riemannian_gradient(point)


def trace(solver, problem, start, iterations=12, **options):
    """Costs and points that a solver goes through."""
    record = Trace(problem)
    solver(
        max_iterations=iterations, verbosity=0, min_gradient_norm=1e-12, min_step_size=0, **options
    ).run(record, initial_point=start)
    return record


def least_squares(r=3, n=12, m=10, seed=0):
    """Least squares on a random linear image of AᵀB, with an exact solution of rank r."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    design = normal(20, n) / math.sqrt(20)
    values = design @ normal(n, r) @ normal(r, m) / math.sqrt(r)

    def cost(A, B):
        return (design.to(A) @ A.mT @ B - values.to(A)).square().sum() / 2

    return cost, (normal(r, n), normal(r, m))


def euclidean_factors(r=3, n=12, m=10):
    """The factors without any symmetry: what pymanopt offers."""
    spaces = pymanopt.manifolds.Euclidean
    return pymanopt.manifolds.Product([spaces(r, n), spaces(r, m)])
