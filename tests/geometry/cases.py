"""The manifolds under test behind one face, and arithmetic on points that are tensors or pairs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quotientopt.manifolds import FactorQuotient, GramQuotient

KINDS = ("preconditioned", "right-invariant", "gram")
BATCH_SHAPES = ((), (3,), (2, 3))
ONE_LINE = r"\A.+\Z"  # what every error message is


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def leaves(point):
    return point if isinstance(point, tuple) else (point,)


def combine(function: Callable, *points):
    """Apply `function` to matching tensors of points."""
    if isinstance(points[0], tuple):
        return tuple(function(*tensors) for tensors in zip(*points, strict=True))
    return function(*points)


def add(u, v, scale=1.0):
    return combine(lambda a, b: a + scale * b, u, v)


def scale(factor, u):
    return combine(lambda a: factor * a, u)


def deviation(p, q):
    """Largest relative difference of two points, head by head and tensor by tensor."""
    worst = 0.0
    for a, b in zip(leaves(p), leaves(q), strict=True):
        assert a.shape == b.shape
        size = torch.linalg.matrix_norm(a).maximum(torch.linalg.matrix_norm(b)).clamp_min(1e-30)
        worst = max(worst, (torch.linalg.matrix_norm(a - b) / size).max().item())
    return worst


def relative(a, b):
    """Largest relative difference of two tensors of scalars."""
    return ((a - b).abs() / a.abs().maximum(b.abs()).clamp_min(1e-30)).max().item()


@dataclass
class Case:
    """One manifold with a generator of its own random numbers."""

    kind: str
    batch_shape: tuple[int, ...] = ()
    seed: int = 0
    small: bool = False

    def __post_init__(self):
        self.generator = generator(self.seed)
        if self.kind == "gram":
            rows, columns = (4, 2) if self.small else (7, 3)
            self.manifold = GramQuotient(rows, columns, batch_shape=self.batch_shape)
        else:
            sizes = (2, 4, 3) if self.small else (3, 7, 5)
            self.manifold = FactorQuotient(*sizes, metric=self.kind, batch_shape=self.batch_shape)
        self.is_gram = self.kind == "gram"

    def point(self):
        return self.manifold.random_point(generator=self.generator, dtype=torch.float64)

    def vector(self):
        """A tangent vector of the total space, neither horizontal nor vertical."""
        return self.point()

    def tangent(self, x):
        return self.manifold.random_tangent(x, generator=self.generator)

    def element(self, cond=10.0):
        return self.manifold.group.random(
            self.batch_shape, cond=cond, generator=self.generator, dtype=torch.float64
        )

    def square(self):
        size = self.manifold.group.r
        return torch.randn(
            *self.batch_shape, size, size, generator=self.generator, dtype=torch.float64
        )

    def wrong_act(self, g, x, seed=0):
        """The action with the contragredience, or the orthogonality, forgotten."""
        if self.is_gram:
            noise = torch.randn(g.shape, generator=generator(seed), dtype=g.dtype)
            return x @ (g + 0.3 * noise).mT
        return g @ x[0], g @ x[1]

    def cost(self):
        """A smooth function of the invariant, returning one number per batch item."""
        shape = self.invariant(self.point()).shape
        target = torch.randn(shape, generator=self.generator, dtype=torch.float64)

        def function(x):
            invariant = self.invariant(x)
            density = (invariant - target).square() / 20 + torch.sin(invariant) / 5
            return density.sum(dim=(-2, -1))

        return function

    def critical_cost(self, x):
        """A least-squares cost with a non-zero residual, critical at `x`."""
        size_left, size_right = self.invariant(x).shape[-2:]
        residual = torch.randn(
            *self.batch_shape, size_left, size_right, generator=self.generator, dtype=torch.float64
        )
        left, right = (x, x) if self.is_gram else (x[0].mT, x[1].mT)
        residual = residual - left @ torch.linalg.lstsq(left, residual).solution
        residual = residual - (right @ torch.linalg.lstsq(right, residual.mT).solution).mT
        target = self.invariant(x) + residual
        return lambda y: ((self.invariant(y) - target).square() / 2).sum(dim=(-2, -1))

    def invariant(self, x):
        return x @ x.mT if self.is_gram else x[0].mT @ x[1]


def euclidean_gradient(function, x):
    """Partial derivatives of a batch of functions by autograd."""
    inputs = tuple(leaf.detach().requires_grad_() for leaf in leaves(x))
    point = inputs if isinstance(x, tuple) else inputs[0]
    partials = torch.autograd.grad(function(point).sum(), inputs)
    return partials if isinstance(x, tuple) else partials[0]


def euclidean_hessian(function, x, u):
    """Derivative of the partial derivatives along `u` by autograd."""
    inputs = tuple(leaf.detach().requires_grad_() for leaf in leaves(x))
    point = inputs if isinstance(x, tuple) else inputs[0]
    partials = torch.autograd.grad(function(point).sum(), inputs, create_graph=True)
    along = sum((p * d).sum() for p, d in zip(partials, leaves(u), strict=True))
    second = torch.autograd.grad(along, inputs)
    return second if isinstance(x, tuple) else second[0]


def slope(errors, steps, window=6):
    """Slope of ``log errors`` against ``log steps`` on the straightest window of points."""
    log_steps, log_errors = steps.log(), errors.clamp_min(1e-300).log()
    best_residual, best_slope = float("inf"), float("nan")
    for start in range(len(steps) - window + 1):
        ordinates = log_errors[start : start + window]
        abscissae = log_steps[start : start + window]
        design = torch.stack((abscissae, torch.ones_like(abscissae)), dim=-1)
        solution = torch.linalg.lstsq(design, ordinates.unsqueeze(-1)).solution
        residual = (design @ solution - ordinates.unsqueeze(-1)).abs().max().item()
        if residual < best_residual:
            best_residual, best_slope = residual, solution[0].item()
    return best_slope
