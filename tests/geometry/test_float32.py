"""The properties of the other tests in float32, to what its rounding allows."""

import pytest
import torch

from quotientopt.groups import O
from tests.geometry.cases import (
    BATCH_SHAPES,
    KINDS,
    Case,
    add,
    combine,
    deviation,
    euclidean_gradient,
    leaves,
    relative,
    scale,
)

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str),
]
EXACT = 1e-5  # a few roundings
MOVED = 2e-4  # roundings times the condition number of the group element


def low(point):
    return combine(torch.Tensor.float, point)


def setup(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x = case.manifold, low(case.point())
    return case, M, x, low(case.vector()), case.element().float()


def test_projection(kind, batch_shape):
    case, M, x, u, g = setup(kind, batch_shape)
    v = low(case.vector())
    horizontal = M.horizontal_component(x, u)
    assert all(leaf.dtype == torch.float32 for leaf in leaves(horizontal))
    assert deviation(M.horizontal_component(x, horizontal), horizontal) < EXACT
    combination = M.horizontal_component(x, add(u, v, scale=-2.5))
    assert deviation(combination, add(horizontal, M.horizontal_component(x, v), -2.5)) < EXACT
    M.check_tangent(x, horizontal, tolerance=EXACT)
    size = M.norm(x, u) * M.norm(x, v)
    left, right = M.inner(x, horizontal, v), M.inner(x, u, M.horizontal_component(x, v))
    assert ((left - right).abs() / size).max() < EXACT
    vertical = M.vertical_vector(x, case.square().float())
    remainder = M.norm(x, M.horizontal_component(x, vertical)) / M.norm(x, vertical)
    assert remainder.max() < EXACT
    moved = M.horizontal_component(M.act(g, x), M.act(g, u))
    assert deviation(moved, M.act(g, horizontal)) < MOVED
    assert relative(M.norm(M.act(g, x), M.act(g, u)), M.norm(x, u)) < MOVED
    # Control: the action forgotten on the vector.
    assert deviation(M.horizontal_component(M.act(g, x), u), M.act(g, horizontal)) > 1e-2


def test_steps(kind, batch_shape):
    case, M, x, _, g = setup(kind, batch_shape)
    u, v = (low(case.tangent(x)) for _ in range(2))
    for retract in (M.retract, M.retract_second_order):
        y = retract(x, scale(0.3, u))
        moved = retract(M.act(g, x), M.act(g, scale(0.3, u)))
        assert deviation(M.canonical_projection(moved), M.canonical_projection(y)) < MOVED
        transported = M.transport(x, y, v)
        M.check_tangent(y, transported, tolerance=EXACT)
        again = M.transport(M.act(g, x), M.act(g, y), M.act(g, v))
        assert deviation(again, M.act(g, transported)) < MOVED
        left_behind = retract(M.act(g, x), scale(0.3, u))
        assert deviation(M.canonical_projection(left_behind), M.canonical_projection(y)) > 1e-3


def test_gradients(kind, batch_shape):
    case, M, x, u, g = setup(kind, batch_shape)
    cost = case.cost()
    wide = combine(torch.Tensor.double, x)
    gradient = M.gradient(x, low(euclidean_gradient(cost, wide)))
    M.check_tangent(x, gradient, tolerance=MOVED)
    y = M.act(g, x)
    partials = low(euclidean_gradient(cost, combine(torch.Tensor.double, y)))
    assert deviation(M.gradient(y, partials), M.act(g, gradient)) < MOVED
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, M.gradient(x, u), tolerance=1e-2)


def test_orbits(kind, batch_shape):
    case, M, x, _, g = setup(kind, batch_shape)
    size = torch.linalg.vector_norm(case.invariant(x).flatten(len(batch_shape)), dim=-1)
    size = size.sqrt() if isinstance(case.group, O) else size
    assert (M.distance(x, M.act(g, x)) / size).max() < MOVED
    y = low(case.point())
    assert deviation(M.align(M.act(g, y), y)[0], y) < MOVED
    for section in M.section_kinds:
        dressed, element = M.section(x, section)
        assert (M.distance(dressed, x) / size).max() < EXACT
        assert deviation(M.act(element, x), dressed) < EXACT
    dressed, _ = M.section(x, "svd")
    assert deviation(M.section(M.act(g, x), "svd")[0], dressed) < 10 * MOVED
    # Control: other orbits are at a distance, and have other representatives.
    assert (M.distance(x, y) / size).min() > 1e-2
    assert deviation(M.section(y, "svd")[0], dressed) > 1e-2
