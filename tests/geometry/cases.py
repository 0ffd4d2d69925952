"""The manifolds under test behind one face, and arithmetic on points that are tensors or pairs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient

FACTORS = {
    "gl preconditioned": (GL(3), "preconditioned"),
    "gl right-invariant": (GL(3), "right-invariant"),
    "rotary preconditioned": (RotaryCommutant(4), "preconditioned"),
    "rotary right-invariant": (RotaryCommutant(4, layout="interleaved"), "right-invariant"),
    "partial preconditioned": (RotaryCommutant(5, 2, layout="interleaved"), "preconditioned"),
    "partial right-invariant": (RotaryCommutant(6, 4), "right-invariant"),
    "o preconditioned": (O(3), "preconditioned"),
    "o right-invariant": (O(3), "right-invariant"),
    "o euclidean": (O(3), "euclidean"),
}
SMALL_GROUPS = {
    "gl": GL(2),
    "rotary": RotaryCommutant(2),
    "partial": RotaryCommutant(3, 2),
    "o": O(2),
}
FACTOR_KINDS = tuple(FACTORS)
BROAD_KINDS = ("broad gram", "broad gram of ones")  # fewer tokens than dimensions
GRAM_KINDS = ("gram", "gram of ones", *BROAD_KINDS)
KINDS = FACTOR_KINDS + GRAM_KINDS
FLAT_KINDS = ("o euclidean", *GRAM_KINDS)  # the total space is flat
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
        self.is_gram = self.kind in GRAM_KINDS
        self.is_flat = self.kind in FLAT_KINDS
        if self.is_gram:
            rows, columns = (4, 2) if self.small else (7, 3)
            if self.kind in BROAD_KINDS:
                rows, columns = (2, 3) if self.small else (3, 6)
            group = None
            if self.kind.endswith("of ones"):
                columns += 1
                group = StabilizerOfOnes(columns)
            self.manifold = GramQuotient(
                rows, columns, stabilizer=group, batch_shape=self.batch_shape
            )
        else:
            group, metric = FACTORS[self.kind]
            columns = (4, 3) if self.small else (7, 6)
            if self.small:
                group = SMALL_GROUPS[self.kind.split()[0]]
            self.manifold = FactorQuotient(
                group.r, *columns, group=group, metric=metric, batch_shape=self.batch_shape
            )
        self.group = self.manifold.group

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
        """The contragredience forgotten, or the action of a matrix that is not in the group."""
        if isinstance(self.group, GL):
            return g @ x[0], g @ x[1]
        stranger = g + 0.3 * torch.randn(g.shape, generator=generator(seed), dtype=g.dtype)
        if self.is_gram:
            return x @ stranger.mT
        return torch.linalg.inv(stranger).mT @ x[0], stranger @ x[1]

    def wrong_vertical(self, x, Lambda):
        """A sign forgotten, or the velocity of a matrix that is not in the Lie algebra."""
        if isinstance(self.group, GL):
            return Lambda.mT @ x[0], Lambda @ x[1]
        Lambda = Lambda + Lambda.mT
        return x @ Lambda if self.is_gram else (-Lambda.mT @ x[0], Lambda @ x[1])

    def cost(self):
        """A smooth function of the invariant, returning one number per batch item."""
        shape = self.invariant(self.point()).shape
        target = torch.randn(shape, generator=self.generator, dtype=torch.float64)

        def function(x):
            invariant = self.invariant(x)
            density = (invariant - target).square() / 20 + torch.sin(invariant) / 5
            return density.flatten(len(self.batch_shape)).sum(dim=-1)

        return function

    def critical_cost(self, x):
        """A least-squares cost with a non-zero residual, critical at `x`."""
        value = self.invariant(x)
        span = [self.manifold.differential(x, self.tangent(x)) for _ in range(self.manifold.dim)]
        basis = torch.stack(span, dim=-1).reshape(-1, self.manifold.dim)
        residual = torch.randn(basis.shape[0], 1, generator=self.generator, dtype=torch.float64)
        residual = residual - basis @ torch.linalg.lstsq(basis, residual).solution
        target = value + residual.reshape(value.shape)
        return lambda y: ((self.invariant(y) - target).square() / 2).sum()

    def invariant(self, x):
        return self.manifold.canonical_projection(x)


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
