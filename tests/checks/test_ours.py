"""The checks pass this package's manifolds, whatever the group and the metric."""

import math

import pytest
import torch

from quotientopt import checks
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from tests.checks.cases import BUILDERS, build, fails, kinds, random_cost, random_point

batches = pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)


@batches
@pytest.mark.parametrize("kind", BUILDERS)
def test_everything_passes(kind, batch_shape):
    results = checks.check_manifold(build(kind, batch_shape))
    assert [result.message for result in results if not result] == []
    names = {result.name for result in results}
    assert len(names) == 8
    for result in results:
        assert result.require() is result
        assert all(value < 1e-12 for value in result.residuals.values()), result.message
        if result.name in ("gradient", "retraction"):
            assert result.slope == math.inf or abs(result.slope - 2) < 0.05


@pytest.mark.parametrize("kind", BUILDERS)
def test_float32_points(kind):
    results = checks.check_manifold(build(kind, (2,)), dtype=torch.float32)
    assert [result.message for result in results if not result] == []
    assert "hessian" not in {result.name for result in results}
    assert all(value < 1e-6 for result in results for value in result.residuals.values())


@pytest.mark.parametrize("seed", range(3))
@kinds
def test_a_cost_of_ones_own(kind, seed):
    M = build(kind, (2,))
    x, cost = random_point(M, seed), random_cost(M, seed)
    assert abs(checks.check_gradient(M, cost, x).require().slope - 2) < 0.05
    assert abs(checks.check_hessian(M, cost, x).require().slope - 3) < 0.1
    checks.check_invariance(M, cost, x).require()


@kinds
def test_a_retraction_may_change_the_representative(kind):
    M = build(kind)
    for name in ("svd", "polar" if kind == "gram" else "balanced"):
        dressed = checks.check_retraction(
            M, retraction=lambda x, u, name=name: M.section(M.retract(x, u), name)[0]
        )
        assert abs(dressed.require().slope - 2) < 0.05


@batches
@pytest.mark.parametrize("kind", BUILDERS)
def test_sections(kind, batch_shape):
    M = build(kind, batch_shape)
    for section in M.section_kinds:
        result = checks.check_section(M, section, cond=100).require()
        assert max(result.residuals.values()) < 1e-11
        checks.check_section(M, section, dtype=torch.float32).require()


@pytest.mark.parametrize("section", ["balanced", "orthonormal", "triangular"])
def test_a_section_may_have_a_residual_group(section):
    M = build("preconditioned")
    checks.check_section(M, section).require()
    result = checks.check_section(M, section, residual="trivial")
    fails(result, r"residual group \(trivial\) off by")


def test_the_same_check_gives_the_same_result():
    M = FactorQuotient(3, 7, 5)
    assert checks.check_gradient(M) == checks.check_gradient(M)
    other = checks.check_gradient(M, generator=torch.Generator().manual_seed(7))
    assert other.errors != checks.check_gradient(M).errors


def test_a_constant_cost_proves_nothing():
    M = FactorQuotient(3, 7, 5)
    result = checks.check_gradient(M, lambda x: 1 + 0 * x[0].sum() + 0 * x[1].sum())
    fails(result, "nothing measurable above rounding")


def test_a_linear_cost_is_exact():
    M = GramQuotient(5, 2)
    weights = torch.randn(5, 2, dtype=torch.float64)

    def gradient(x):
        return weights

    result = checks.check_gradient(
        M, lambda x: (weights * x).sum(), gradient=gradient, tolerance=10.0
    )
    assert result.require().slope == float("inf")
    assert "exact up to rounding" in result.message
    wrong = checks.check_gradient(
        M, lambda x: (weights * x).sum(), gradient=lambda x: 1.1 * weights, tolerance=10.0
    )
    fails(wrong, "slope 1.00")


@pytest.mark.parametrize("named", [False, True])
def test_products(named):
    factors = {"qk": build("rotary", (2,)), "stream": build("gram")}
    product = ProductManifold(factors if named else tuple(factors.values()))
    results = checks.check_manifold(product)
    assert [result.message for result in results if not result] == []
    assert len(results) == 8

    def wrong(x, u):
        moved = product.retract(x, u)
        return moved | {"stream": x["stream"]} if named else (moved[0], x[1])

    fails(checks.check_retraction(product, retraction=wrong), "slope 1.0")
