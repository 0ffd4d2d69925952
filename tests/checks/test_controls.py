"""The checks find wrong gradients, Hessians, retractions, transports, projections, groups, …"""

import pytest
import torch

from quotientopt import checks
from quotientopt.checks.subject import Subject
from quotientopt.groups import GL, O
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from tests.checks.cases import (
    add,
    build,
    combine,
    factor_kinds,
    fails,
    generator,
    kinds,
    partials,
    random_cost,
    random_point,
    scale,
)

ONE_LINE = r"\A.+\Z"


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0])
@kinds
def test_a_wrong_gradient_is_caught(kind, size):
    M = build(kind)
    x, cost = random_point(M), random_cost(M)

    def gradient(y):
        return scale(1 + size, M.gradient(y, partials(cost, y)))

    result = checks.check_gradient(M, cost, x, gradient=gradient)
    fails(result, r"gradient: slope (0.99|1.0).*expected at least 2: the gradient is wrong")
    assert abs(result.slope - 1) < 0.1
    assert result.expected == 2


@factor_kinds
def test_the_euclidean_gradient_is_caught(kind):
    M = build(kind)
    cost = random_cost(M)
    result = checks.check_gradient(M, cost, gradient=lambda x: partials(cost, x))
    fails(result, "slope 1.0")
    assert result.residuals["vertical component"] > 1e-3


@kinds
def test_a_cost_that_is_not_invariant_is_caught_by_the_vertical_component(kind):
    M = build(kind)
    weights = random_point(M, seed=5)

    def cost(y):
        product = combine(lambda w, z: (w * z).sum(), weights, y)
        return product[0] * product[1] if isinstance(product, tuple) else product

    result = checks.check_gradient(M, cost)
    fails(result, "gradient: vertical component off by")
    assert result.slope > 1.95
    result = checks.check_invariance(M, cost)
    fails(result, "cost off by")


@pytest.mark.parametrize("size", [1e-3, 1e-1])
@kinds
def test_a_wrong_hessian_is_caught(kind, size):
    M = build(kind)
    x, cost = random_point(M), random_cost(M)
    right = checks.check_hessian(M, cost, x).require()
    hessian = Subject(M, x).hessian_of(cost)
    result = checks.check_hessian(M, cost, x, hessian=lambda y, u: scale(1 + size, hessian(y, u)))
    fails(result, r"hessian: slope (1.99|2.0).*expected at least 3: the Hessian is wrong")
    assert abs(result.slope - 2) < 0.1
    assert abs(right.slope - 3) < 0.1


@kinds
def test_an_asymmetric_or_nonlinear_hessian_is_caught(kind):
    M = build(kind)
    x, cost = random_point(M), random_cost(M)
    hessian = Subject(M, x).hessian_of(cost)
    fixed, other = (M.random_tangent(x, generator=generator(seed)) for seed in (3, 4))

    def one_sided(y, u):
        part = scale(M.inner(x, fixed, u).item(), other)
        return add(hessian(y, u), part)

    def squared(y, u):
        return scale(M.norm(y, u).item(), hessian(y, u))

    fails(checks.check_hessian(M, cost, x, hessian=one_sided), "symmetry off by")
    fails(checks.check_hessian(M, cost, x, hessian=squared), "linearity off by")
    vertical = M.vertical_vector(x, torch.randn(3, 3, generator=generator(5)).double())

    def leaning(y, u):
        part = scale(M.inner(x, fixed, u).item(), vertical)
        return add(hessian(y, u), part)

    result = checks.check_hessian(M, cost, x, hessian=leaning)
    fails(result, "hessian: vertical component off by")
    assert abs(result.slope - 3) < 0.1


def test_the_hessian_needs_a_second_order_retraction_or_a_critical_point():
    M = build("preconditioned")
    x, cost = random_point(M), random_cost(M)
    result = checks.check_hessian(M, cost, x, retraction=M.retract)
    fails(result, r"slope 2.0.*or the retraction is of first order")
    # Critical: the residual is orthogonal to the tangent space, I − P on both sides.
    A, B = (torch.linalg.qr(factor.mT).Q for factor in x)
    residual = torch.randn(7, 5, generator=generator(1), dtype=torch.float64)
    residual = residual - A @ (A.mT @ residual)
    residual = residual - (residual @ B) @ B.mT
    target = M.canonical_projection(x) + residual

    def critical(y):
        return (M.canonical_projection(y) - target).square().sum()

    checks.check_hessian(M, critical, x, retraction=M.retract).require()


@kinds
def test_a_wrong_retraction_is_caught(kind):
    M = build(kind)

    def too_fast(x, u):
        return M.retract(x, scale(1.0001, u))

    def displaced(x, u):
        return M.retract(scale(1.001, x), u)

    result = checks.check_retraction(M, retraction=too_fast)
    fails(result, "retraction: slope 1.0.*another velocity")
    result = checks.check_retraction(M, retraction=displaced)
    fails(result, r"R_x\(0\) = x off by [12].0e-03")


@factor_kinds
def test_the_additive_retraction_is_not_of_second_order(kind):
    M = build(kind)
    result = checks.check_retraction(M, order=2, retraction=M.retract)
    fails(result, "second-order retraction: slope 2.0.*acceleration")
    assert abs(checks.check_retraction(M, order=2).require().slope - 3) < 0.1


def test_a_retraction_is_compared_with_exp_where_there_is_one():
    M = GramQuotient(7, 3)
    assert checks.check_retraction(M, order=2).require().slope == float("inf")

    def accelerated(x, u):
        return M.retract(x, u) + u @ (u.mT @ x)

    fails(checks.check_retraction(M, order=2, retraction=accelerated), "slope 2.0")
    assert abs(checks.check_retraction(M, retraction=accelerated).require().slope - 2) < 0.1


@kinds
def test_a_wrong_transport_is_caught(kind):
    M = build(kind)

    def identity(x, y, v):
        return v

    def amplified(x, y, v):
        return scale(1.5, M.transport(x, y, v))

    fails(checks.check_transport(M, transport=identity), "transport: vertical component off by")
    result = checks.check_transport(M, transport=amplified)
    fails(result, "transport: slope 0.00.*identity from x to x off by 5.0e-01")


@kinds
def test_a_wrong_projection_is_caught(kind):
    M = build(kind)

    def wrong_sign(x, u):
        return combine(lambda a, b: a + b, u, M.vertical_component(x, u))

    def half(x, u):
        return combine(lambda a, b: a - b / 2, u, M.vertical_component(x, u))

    fails(checks.check_projection(M, projection=wrong_sign), "idempotence off by")
    result = checks.check_projection(M, projection=half)
    fails(result, "zero on vertical vectors off by 5.0e-01")
    assert result.residuals["self-adjointness"] < 1e-14


def test_an_oblique_projection_is_caught_by_self_adjointness():
    M, other = FactorQuotient(3, 7, 5), FactorQuotient(3, 7, 5, metric="right-invariant")
    x = M.random_point(dtype=torch.float64)
    result = checks.check_projection(M, x, projection=other.horizontal_component)
    fails(result, "projection: .* off by")
    assert result.residuals["self-adjointness"] > 1e-2
    assert result.residuals["idempotence"] < 1e-12


def test_a_wrong_action_is_caught():
    def contragredience_forgotten(g, x):
        return g @ x[0], g @ x[1]

    result = checks.check_invariance(build("preconditioned"), act=contragredience_forgotten)
    fails(result, r"invariance: metric off by .*canonical projection off by")
    # This one happens to be an isometry of the other metric, and still moves between orbits.
    result = checks.check_invariance(build("right-invariant"), act=contragredience_forgotten)
    fails(result, "invariance: canonical projection off by")


def test_a_wrong_group_is_caught():
    M = build("gram")
    g = GL(3).random(generator=generator(1), dtype=torch.float64)
    right = O(3).random(generator=generator(1), dtype=torch.float64)

    def act(h, x):
        return x @ h.mT

    result = checks.check_invariance(M, element=g, act=act)
    fails(result, r"invariance: metric off by.*canonical projection off by")
    checks.check_invariance(M, element=right, act=act).require()


def test_a_wrong_dimension_is_caught():
    M = FactorQuotient(3, 7, 5)
    result = checks.check_dimension(M).require()
    assert result.slope == result.expected == 3 * (7 + 5 - 3)
    assert len(result.errors) == 28
    assert result.errors[26] > 1e-4 > 1e-12 > result.errors[27]
    fails(checks.check_dimension(M, expected=26), "span at least 27, claimed are 26")
    fails(checks.check_dimension(M, expected=28), "span 27, claimed are 28")
    with pytest.raises(ValueError, match=ONE_LINE):
        checks.check_dimension(M, expected=10**6)


def test_wrong_sections_are_caught():
    M = FactorQuotient(3, 7, 5)
    identity = torch.eye(3, dtype=torch.float64)

    def nothing(x):
        return x, identity

    def another_element(x):
        dressed, g = M.section(x, "svd")
        return dressed, 2 * g

    def another_orbit(x):
        (A, B), g = M.section(x, "svd")
        return (A, 1.001 * B), g

    fails(checks.check_section(M, nothing), r"residual group \(orthogonal\) off by")
    fails(checks.check_section(M, another_element), r"g·x = σ\(x\) off by")
    # Under a group of rotations the identity leaves all of the group, and it is orthogonal anyway.
    for compact in (GramQuotient(8, 3), FactorQuotient(3, 6, 5, group=O(3), metric="euclidean")):
        fails(checks.check_section(compact, nothing), r"residual group \(trivial\) off by")
    fails(checks.check_section(M, another_orbit), "canonical projection off by 1.0e-03")


def test_an_identity_in_place_of_a_products_projection_is_caught():
    M = ProductManifold({"pair": FactorQuotient(3, 7, 5), "tokens": GramQuotient(6, 3)})
    checks.check_projection(M).require()
    result = checks.check_projection(M, projection=lambda x, u: u)
    fails(result, "zero on vertical vectors off by")
