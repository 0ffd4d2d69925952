"""Retractions, transport, and the slopes of gradient and Hessian along them."""

import pytest
import torch

from tests.geometry.cases import (
    BATCH_SHAPES,
    FLAT_KINDS,
    KINDS,
    Case,
    add,
    combine,
    deviation,
    euclidean_gradient,
    euclidean_hessian,
    relative,
    scale,
    slope,
)

kinds = pytest.mark.parametrize("kind", KINDS)
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
STEPS = torch.logspace(-3, -0.7, 24, dtype=torch.float64)


@pytest.mark.parametrize("name", ["retract", "retract_second_order"])
@batches
@kinds
def test_retractions_are_equivariant(kind, batch_shape, name):
    case = Case(kind, batch_shape)
    M, x = case.manifold, case.point()
    retract = getattr(M, name)
    u, g = scale(0.3, case.tangent(x)), case.element(cond=30)
    y = retract(x, u)
    moved = retract(M.act(g, x), M.act(g, u))
    assert deviation(moved, M.act(g, y)) < 1e-10
    assert deviation(M.canonical_projection(moved), M.canonical_projection(y)) < 1e-10
    # Control: the vector left behind.
    left_behind = retract(M.act(g, x), u)
    assert deviation(M.canonical_projection(left_behind), M.canonical_projection(y)) > 1e-4


@pytest.mark.parametrize("name", ["retract", "retract_second_order"])
@kinds
def test_retractions_start_with_the_velocity_given(kind, name):
    case = Case(kind, (3,))
    M, x = case.manifold, case.point()
    retract, u = getattr(M, name), case.tangent(x)
    step = 1e-5
    velocity = add(retract(x, scale(step, u)), retract(x, scale(-step, u)), -1)
    assert deviation(scale(1 / (2 * step), velocity), u) < 1e-7
    assert deviation(retract(x, scale(0.0, u)), x) < 1e-15


@batches
@kinds
def test_transport_is_equivariant(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x = case.manifold, case.point()
    u, v, g = case.tangent(x), case.tangent(x), case.element(cond=30)
    y = M.retract(x, scale(0.3, u))
    transported = M.transport(x, y, v)
    M.check_tangent(y, transported, tolerance=1e-10)
    moved = M.transport(M.act(g, x), M.act(g, y), M.act(g, v))
    assert deviation(moved, M.act(g, transported)) < 1e-10
    # Control: the vector left behind.
    assert deviation(M.transport(M.act(g, x), M.act(g, y), v), M.act(g, transported)) > 1e-3


def model_errors(M, cost, x, u, gradient, hessian, retract):
    """Errors of the first- and second-order models of the cost along a retraction."""
    first, second = M.inner(x, gradient, u), M.inner(x, hessian, u)
    values = torch.stack([cost(retract(x, scale(t, u))) for t in STEPS.tolist()])
    linear = values - cost(x) - STEPS * first
    return linear.abs(), (linear - STEPS.square() / 2 * second).abs()


def directions(case, x, cost):
    u = case.tangent(x)
    partials, second = euclidean_gradient(cost, x), euclidean_hessian(cost, x, u)
    gradient = case.manifold.gradient(x, partials)
    return u, partials, second, gradient, case.manifold.hessian(x, partials, second, u)


@pytest.mark.parametrize("seed", [0, 1, 2])
@kinds
def test_slopes_at_generic_points(kind, seed):
    case = Case(kind, seed=seed)
    M, x, cost = case.manifold, case.point(), case.cost()
    u, partials, second, gradient, hessian = directions(case, x, cost)
    retract = M.retract_second_order
    first, third = model_errors(M, cost, x, u, gradient, hessian, retract)
    assert abs(slope(first, STEPS) - 2) < 0.1
    assert abs(slope(third, STEPS) - 3) < 0.1
    # Controls: another gradient, another Hessian, a retraction of first order only.
    wrong_gradient = scale(0.5, gradient) if case.is_flat else partials
    first, _ = model_errors(M, cost, x, u, wrong_gradient, hessian, retract)
    assert abs(slope(first, STEPS) - 1) < 0.1
    wrong_hessian = scale(0.5, hessian) if case.is_flat else M.gradient(x, second)
    _, third = model_errors(M, cost, x, u, gradient, wrong_hessian, retract)
    assert abs(slope(third, STEPS) - 2) < 0.1
    if not case.is_flat:
        _, third = model_errors(M, cost, x, u, gradient, hessian, M.retract)
        assert abs(slope(third, STEPS) - 2) < 0.1


@kinds
def test_hessian_slope_at_a_critical_point_along_the_first_order_retraction(kind):
    case = Case(kind)
    M, x = case.manifold, case.point()
    cost = case.critical_cost(x)
    u, _, _, gradient, hessian = directions(case, x, cost)
    assert M.norm(x, gradient) < 1e-10
    _, third = model_errors(M, cost, x, u, gradient, hessian, M.retract)
    assert abs(slope(third, STEPS) - 3) < 0.1
    _, third = model_errors(M, cost, x, u, gradient, scale(0.5, hessian), M.retract)
    assert abs(slope(third, STEPS) - 2) < 0.1


@batches
@kinds
def test_hessian_is_symmetric_horizontal_and_equivariant(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x, cost = case.manifold, case.point(), case.cost()
    u, v, g = case.tangent(x), case.tangent(x), case.element()
    partials = euclidean_gradient(cost, x)

    def hessian(w):
        return M.hessian(x, partials, euclidean_hessian(cost, x, w), w)

    size = M.norm(x, hessian(u)) + M.norm(x, hessian(v))
    asymmetry = M.inner(x, hessian(u), v) - M.inner(x, u, hessian(v))
    assert (asymmetry.abs() / size).max() < 1e-10
    M.check_tangent(x, hessian(u), tolerance=1e-10)
    y, w = M.act(g, x), M.act(g, u)
    moved = M.hessian(y, euclidean_gradient(cost, y), euclidean_hessian(cost, y, w), w)
    assert deviation(moved, M.act(g, hessian(u))) < 1e-9
    # Control: partial derivatives that are those of no function.
    skew = combine(lambda a: torch.randn(a.shape[-1], a.shape[-1], dtype=a.dtype), x)

    def rotational(w):
        return M.hessian(x, partials, combine(torch.matmul, w, skew), w)

    asymmetry = M.inner(x, rotational(u), v) - M.inner(x, u, rotational(v))
    assert asymmetry.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FLAT_KINDS])
def test_hessian_needs_the_christoffel_form(kind):
    case = Case(kind)
    M, x, cost = case.manifold, case.point(), case.cost()
    u, v = case.tangent(x), case.tangent(x)
    step = 1e-5

    def plain_derivative(w):
        ahead, behind = (add(x, w, sign * step) for sign in (1, -1))
        gradients = [M.gradient(y, euclidean_gradient(cost, y)) for y in (ahead, behind)]
        derivative = scale(1 / (2 * step), add(*gradients, -1))
        return M.horizontal_component(x, derivative)

    left, right = M.inner(x, plain_derivative(u), v), M.inner(x, u, plain_derivative(v))
    assert relative(left, right) > 1e-3
