"""Projections, invariance of the metric, lifts and gradients."""

import pytest
import torch

from quotientopt.groups import O
from tests.geometry.cases import (
    BATCH_SHAPES,
    KINDS,
    Case,
    add,
    deviation,
    euclidean_gradient,
    leaves,
    relative,
    scale,
)

kinds = pytest.mark.parametrize("kind", KINDS)
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def setup(kind, batch_shape):
    case = Case(kind, batch_shape)
    return case, case.manifold, case.point()


@batches
@kinds
def test_projection_is_linear_idempotent_and_self_adjoint(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    u, v = case.vector(), case.vector()
    horizontal = M.horizontal_component(x, u)
    combination = M.horizontal_component(x, add(u, v, scale=-2.5))
    assert deviation(combination, add(horizontal, M.horizontal_component(x, v), -2.5)) < 1e-11
    assert deviation(M.horizontal_component(x, horizontal), horizontal) < 1e-11
    left = M.inner(x, horizontal, v)
    assert relative(left, M.inner(x, u, M.horizontal_component(x, v))) < 1e-10
    vertical = M.vertical_component(x, u)
    assert deviation(add(horizontal, vertical), u) < 1e-11
    assert M.inner(x, horizontal, vertical).abs().max() < 1e-9
    # Control: the vector itself is not horizontal.
    assert deviation(horizontal, u) > 1e-3


@batches
@kinds
def test_projection_kills_vertical_vectors(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    Lambda = case.square()
    vertical = M.vertical_vector(x, Lambda)
    size = M.norm(x, vertical)
    assert (M.norm(x, M.horizontal_component(x, vertical)) / size).max() < 1e-11
    assert deviation(M.vertical_component(x, vertical), vertical) < 1e-11
    assert M.differential(x, vertical).abs().max() < 1e-11
    # Control: the sign forgotten, or a matrix outside of the Lie algebra.
    wrong = case.wrong_vertical(x, Lambda)
    assert (M.norm(x, M.horizontal_component(x, wrong)) / M.norm(x, wrong)).min() > 1e-3


@batches
@kinds
def test_vertical_vectors_are_velocities_of_the_action(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    Lambda = M.group.algebra_projection(case.square())
    step = 1e-6
    ahead = M.act(torch.linalg.matrix_exp(step * Lambda), x)
    behind = M.act(torch.linalg.matrix_exp(-step * Lambda), x)
    velocity = scale(1 / (2 * step), add(ahead, behind, -1))
    assert deviation(velocity, M.vertical_vector(x, Lambda)) < 1e-8
    assert deviation(velocity, M.vertical_vector(x, Lambda.mT)) > 1e-2


@batches
@kinds
def test_metric_is_invariant(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    u, v, g = case.vector(), case.vector(), case.element(cond=30)

    def act(w):
        return M.act(g, w)

    assert relative(M.norm(x, u), M.norm(act(x), act(u))) < 1e-10
    size = M.norm(x, u) * M.norm(x, v)
    change = M.inner(act(x), act(u), act(v)) - M.inner(x, u, v)
    assert (change.abs() / size).max() < 1e-10
    moved = M.horizontal_component(act(x), act(u))
    assert deviation(moved, act(M.horizontal_component(x, u))) < 1e-10
    # Control: a wrong action. The metrics of GL(r) are invariant under more than O(r), the
    # right-invariant one even under GL(r) × GL(r), but their horizontal spaces are not.
    wrong_x, wrong_u = case.wrong_act(g, x, seed=1), case.wrong_act(g, u, seed=1)
    if kind not in ("gl right-invariant", "o preconditioned", "o right-invariant"):
        assert relative(M.norm(x, u), M.norm(wrong_x, wrong_u)) > 1e-3
    wrong_moved = case.wrong_act(g, M.horizontal_component(x, u), seed=1)
    assert deviation(M.horizontal_component(wrong_x, wrong_u), wrong_moved) > 1e-3
    # Control: the Euclidean inner product is invariant under orthogonal groups only.
    if not isinstance(case.group, O):
        euclidean = [sum(w.square().sum() for w in vector) for vector in (u, act(u))]
        assert relative(*euclidean) > 1e-3


@batches
@kinds
def test_horizontal_lift_inverts_the_differential(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    u = case.tangent(x)
    base = M.differential(x, u)
    lifted = M.horizontal_lift(x, base)
    assert deviation(lifted, u) < 1e-10
    assert deviation(M.differential(x, lifted), base) < 1e-10
    g = case.element()
    assert deviation(M.horizontal_lift(M.act(g, x), base), M.act(g, u)) < 1e-9
    # Control: a vector with a vertical part has the same image but is not the lift.
    tilted = add(u, M.vertical_vector(x, case.square()))
    assert deviation(M.differential(x, tilted), base) < 1e-10
    assert deviation(M.horizontal_lift(x, M.differential(x, tilted)), tilted) > 1e-3


@batches
@kinds
def test_gradients_of_invariant_costs_are_horizontal_and_equivariant(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    cost = case.cost()
    partials = euclidean_gradient(cost, x)
    gradient = M.gradient(x, partials)
    assert deviation(M.horizontal_component(x, gradient), gradient) < 1e-10
    M.check_tangent(x, gradient, tolerance=1e-10)
    u = case.vector()
    differential = sum(
        (p * d).sum((-2, -1)) for p, d in zip(leaves(partials), leaves(u), strict=True)
    )
    assert relative(M.inner(x, gradient, u), differential) < 1e-9
    g = case.element()
    y = M.act(g, x)
    assert deviation(M.gradient(y, euclidean_gradient(cost, y)), M.act(g, gradient)) < 1e-9
    # Control: a linear cost, which is not invariant.
    linear = M.gradient(x, case.vector())
    assert deviation(M.horizontal_component(x, linear), linear) > 1e-3
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, linear, tolerance=1e-10)


@batches
@kinds
def test_dimension_by_the_gram_spectrum(kind, batch_shape):
    case = Case(kind, batch_shape, small=True)
    M, x = case.manifold, case.point()

    def spectrum(draw):
        vectors = [draw() for _ in range(M.dim + 1)]
        rows = [torch.stack([M.inner(x, u, v) for v in vectors], dim=-1) for u in vectors]
        values = torch.linalg.eigvalsh(torch.stack(rows, dim=-2))
        return values / values[..., -1:]

    horizontal = spectrum(lambda: case.tangent(x))
    assert horizontal[..., 0].abs().max() < 1e-12
    assert horizontal[..., 1].min() > 1e-9
    # Control: unprojected vectors fill one dimension more.
    assert spectrum(case.vector)[..., 0].min() > 1e-9


@batches
@kinds
def test_random_tangents_are_horizontal_of_unit_norm(kind, batch_shape):
    case, M, x = setup(kind, batch_shape)
    u = case.tangent(x)
    M.check_tangent(x, u, tolerance=1e-10)
    assert (M.norm(x, u) - 1).abs().max() < 1e-12
