"""Manifolds to check, costs on them, and arithmetic on points that are tensors or pairs."""

import pytest
import torch

from quotientopt.groups import O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient

BUILDERS = {
    "preconditioned": lambda **kw: FactorQuotient(3, 7, 5, **kw),
    "right-invariant": lambda **kw: FactorQuotient(3, 7, 5, metric="right-invariant", **kw),
    "gram": lambda **kw: GramQuotient(7, 3, **kw),
    "rotary": lambda **kw: FactorQuotient(4, 7, 5, group=RotaryCommutant(4), **kw),
    "partial rotary": lambda **kw: FactorQuotient(
        5, 7, 6, group=RotaryCommutant(5, 2), metric="right-invariant", **kw
    ),
    "rotations": lambda **kw: FactorQuotient(3, 7, 5, group=O(3), **kw),
    "euclidean": lambda **kw: FactorQuotient(3, 7, 5, group=O(3), metric="euclidean", **kw),
    "ones": lambda **kw: GramQuotient(7, 4, stabilizer=StabilizerOfOnes(4), **kw),
}
MAIN = ("preconditioned", "right-invariant", "gram")
FACTORS = ("preconditioned", "right-invariant")

kinds = pytest.mark.parametrize("kind", MAIN)
factor_kinds = pytest.mark.parametrize("kind", FACTORS)


def build(kind, batch_shape=(), **options):
    return BUILDERS[kind](batch_shape=batch_shape, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def combine(function, *points):
    """Apply `function` to matching tensors of points."""
    if isinstance(points[0], tuple):
        return tuple(function(*tensors) for tensors in zip(*points, strict=True))
    return function(*points)


def scale(factor, u):
    return combine(lambda a: factor * a, u)


def add(u, v):
    return combine(lambda a, b: a + b, u, v)


def random_point(manifold, seed=0):
    return manifold.random_point(generator=generator(seed), dtype=torch.float64)


def random_cost(manifold, seed=0):
    """A smooth function of the invariant, returning one number per batch item."""
    shape = manifold.canonical_projection(random_point(manifold)).shape
    target = torch.randn(shape, generator=generator(seed + 100), dtype=torch.float64)

    def cost(x):
        invariant = manifold.canonical_projection(x)
        density = (invariant - target).square() / 20 + torch.sin(invariant) / 5
        return density.flatten(len(manifold.batch_shape)).sum(dim=-1)

    return cost


def partials(cost, x):
    """The Euclidean gradient, by autograd."""
    return torch.autograd.functional.jacobian(
        lambda *parts: cost(parts if len(parts) > 1 else parts[0]).sum(), x
    )


def fails(result, message):
    """Assert that a result is a failure that says so in one line."""
    assert not result
    assert not result.passed
    assert "\n" not in result.message
    with pytest.raises(AssertionError, match=message) as caught:
        result.require()
    assert str(caught.value) == result.message
