"""O'Neill's tensor and the curvature of the Gram quotient."""

import pytest
import torch

from quotientopt.manifolds import GramQuotient
from tests.geometry.cases import (
    BATCH_SHAPES,
    GRAM_KINDS,
    Case,
    deviation,
    generator,
    relative,
    slope,
)

kinds = pytest.mark.parametrize("kind", GRAM_KINDS)
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def setup(kind, batch_shape=()):
    case = Case(kind, batch_shape)
    x = case.point()
    return case.manifold, x, case.tangent(x), case.tangent(x)


@batches
@kinds
def test_it_is_vertical_skew_and_equivariant(kind, batch_shape):
    M, x, u, v = setup(kind, batch_shape)
    A = M.integrability_tensor(x, u, v)
    assert deviation(M.vertical_component(x, A), A) < 1e-11
    assert deviation(M.integrability_tensor(x, v, u), -A) < 1e-12
    assert M.integrability_tensor(x, u, u).abs().max() < 1e-13
    g = M.group.random(batch_shape, generator=generator(4), dtype=torch.float64)
    assert deviation(M.integrability_tensor(*(M.act(g, z) for z in (x, u, v))), M.act(g, A)) < 1e-11
    # Control: it is not zero, the horizontal spaces are not integrable.
    assert (M.norm(x, A) > 1e-3).all()


@batches
@kinds
def test_it_is_half_the_vertical_bracket_of_horizontal_fields(kind, batch_shape):
    M, x, u, v = setup(kind, batch_shape)
    step = 1e-5

    def derivative(direction, vector):
        """Of the horizontal field P(y) vector at x, along the direction."""
        ends = [M.horizontal_component(x + sign * step * direction, vector) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    # [U, V] = DV[u] − DU[v] for the fields U(y) = P(y) u and V(y) = P(y) v.
    bracket = derivative(u, v) - derivative(v, u)
    A = M.integrability_tensor(x, u, v)
    assert deviation(M.vertical_component(x, bracket) / 2, A) < 1e-8
    assert deviation(M.vertical_component(x, derivative(u, v)), A) < 1e-8
    # Control: the horizontal part of the bracket has nothing to do with it.
    assert deviation(M.horizontal_component(x, bracket) / 2, A) > 1e-3


@kinds
def test_it_is_the_vertical_gap_of_a_small_parallelogram(kind):
    M, x, u, v = setup(kind)
    steps = torch.logspace(-2.5, -1, 8, dtype=torch.float64)

    def loop(t):
        """Gap of a parallelogram of horizontal curves, flows along u, v, −u and −v."""
        y = x
        for direction in (u, v, -u, -v):
            for _ in range(16):
                ahead = M.horizontal_component(y, direction) * (t / 16)
                y = y + M.horizontal_component(y + ahead / 2, direction) * (t / 16)
        return y - x

    A = M.integrability_tensor(x, u, v)
    errors = torch.stack(
        [
            torch.linalg.matrix_norm(M.vertical_component(x, loop(t)) - 2 * t**2 * A)
            for t in steps.tolist()
        ]
    )
    assert abs(slope(errors, steps, window=5) - 3) < 0.2
    # Control: without the tensor the gap is of second order.
    wrong = torch.stack(
        [torch.linalg.matrix_norm(M.vertical_component(x, loop(t))) for t in steps.tolist()]
    )
    assert abs(slope(wrong, steps, window=5) - 2) < 0.2


@kinds
def test_sectional_curvature_from_distances(kind):
    M, x, u, v = setup(kind)
    u = u / M.norm(x, u)
    v = v - M.inner(x, u, v) * u
    v = v / M.norm(x, v)
    curvature = M.sectional_curvature(x, u, v)
    assert curvature > 0
    assert relative(M.sectional_curvature(x, 3 * u, v - 2 * u), curvature) < 1e-11
    # dist(exp tu, exp tv)² = t² |u − v|² − K t⁴ (|u|² |v|² − ⟨u, v⟩²)/3 + O(t⁵)
    steps = torch.logspace(-2, -1, 10, dtype=torch.float64)

    def errors(factor):
        squared = [M.distance(M.exp(x, t * u), M.exp(x, t * v)).square() for t in steps.tolist()]
        return (torch.stack(squared) - 2 * steps**2 + factor * curvature * steps**4 / 3).abs()

    assert slope(errors(1.0), steps, window=5) > 4.8
    assert abs(slope(errors(0.5), steps, window=5) - 4) < 0.2


def test_lines_are_flat():
    M = GramQuotient(5, 1)
    x = M.random_point(generator=generator(), dtype=torch.float64)
    u, v = (M.random_tangent(x, generator=generator(seed)) for seed in (1, 2))
    assert M.sectional_curvature(x, u, v) == 0
