"""The checks on manifolds of geoopt and pymanopt, right ones and wrong ones."""

import warnings

import pytest
import torch

from quotientopt import checks
from quotientopt.checks.subject import as_view


@pytest.fixture
def geoopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip("geoopt", reason="pip install geoopt")


@pytest.fixture
def pymanopt():
    return pytest.importorskip("pymanopt", reason="pip install pymanopt")


WEIGHTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cost(x):
    return (WEIGHTS * x * x.sin()).sum()


@pytest.mark.parametrize("name", ["EuclideanStiefel", "Sphere", "SphereExact", "Euclidean"])
def test_geoopt(geoopt, name):
    torch.manual_seed(0)
    view = checks.GeooptView(getattr(geoopt, name)(), 5, 3)
    results = checks.check_manifold(view, cost)
    assert [result.name for result in results] == [
        "gradient",
        "retraction",
        "projection",
        "transport",
    ]
    assert all(results), results
    assert repr(view) == f"GeooptView({name})"


def test_geoopt_dimension_and_dtype(geoopt):
    torch.manual_seed(0)
    sphere = geoopt.Sphere()
    checks.check_dimension(checks.GeooptView(sphere, 5, dim=4)).require()
    assert not checks.check_dimension(checks.GeooptView(sphere, 5, dim=5))
    ball = checks.GeooptView(geoopt.PoincareBall(c=1.0), 3)
    assert checks.check_retraction(ball).require()
    assert ball.random_point(dtype=torch.float64).dtype == torch.float32


def test_a_wrong_geoopt_manifold_is_caught(geoopt):
    class Doubled(geoopt.Sphere):
        def egrad2rgrad(self, x, u):
            return 2 * super().egrad2rgrad(x, u)

        def transp(self, x, y, v):
            return v

    torch.manual_seed(0)
    view = checks.GeooptView(Doubled(), 5, 3)
    with pytest.raises(AssertionError, match=r"gradient: slope 1.0"):
        checks.check_gradient(view, cost).require()
    with pytest.raises(AssertionError, match="transport: vertical component off by"):
        checks.check_transport(view).require()


@pytest.mark.parametrize("name", ["Sphere", "Grassmann", "Stiefel", "PSDFixedRank", "Oblique"])
def test_pymanopt(pymanopt, name):
    import numpy as np

    np.random.seed(0)  # noqa: NPY002 -- pymanopt draws from the global generator
    manifold = getattr(pymanopt.manifolds, name)(5, 3)
    results = checks.check_manifold(manifold)
    assert [result.name for result in results] == [
        "retraction",
        "projection",
        "transport",
        "dimension",
    ]
    assert all(results), results

    weights = np.random.randn(5, 3)  # noqa: NPY002

    def linear(x):
        return (weights * x).sum()

    def gradient(x):
        return manifold.euclidean_to_riemannian_gradient(x, weights)

    if name != "PSDFixedRank":  # where a linear cost is not constant along orbits
        if name != "Grassmann":
            checks.check_gradient(manifold, linear, gradient=gradient).require()
        wrong = checks.check_gradient(manifold, linear, gradient=lambda x: 1.1 * gradient(x))
        assert abs(wrong.slope - 1) < 0.1
    with pytest.raises(TypeError, match="derivatives by autograd need points of tensors"):
        checks.check_gradient(manifold, linear)


def test_pymanopt_hessian(pymanopt):
    import numpy as np

    np.random.seed(0)  # noqa: NPY002
    manifold = pymanopt.manifolds.Sphere(6)
    weights = np.random.randn(6, 6)  # noqa: NPY002
    weights = weights + weights.T

    def quadratic(x):
        return x @ weights @ x / 2

    def gradient(x):
        return manifold.euclidean_to_riemannian_gradient(x, weights @ x)

    def hessian(x, u):
        return manifold.euclidean_to_riemannian_hessian(x, weights @ x, weights @ u, u)

    keywords = {"gradient": gradient, "hessian": hessian}
    result = checks.check_hessian(manifold, quadratic, **keywords).require()
    assert abs(result.slope - 3) < 0.1
    wrong = checks.check_hessian(
        manifold,
        quadratic,
        gradient=gradient,
        hessian=lambda x, u: manifold.projection(x, weights @ u),
    )
    assert abs(wrong.slope - 2) < 0.1
    assert not wrong
    assert checks.check_retraction(manifold, order=2).require().slope > 2.9


def test_a_view_lacks_what_the_manifold_lacks(pymanopt):
    view = as_view(pymanopt.manifolds.FixedRankEmbedded(5, 4, 2))
    assert not hasattr(view, "exp")
    assert hasattr(view, "retract")
    assert as_view(view) is view


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_our_own_manifold_in_pymanopt(pymanopt, backend, batch_shape):
    import quotientopt.pymanopt as qp

    torch.manual_seed(0)
    options = {"backend": backend, "batch_shape": batch_shape, "retraction": "second-order"}
    manifold = qp.FactorManifold(3, 7, 5, **options)
    results = checks.check_manifold(manifold)
    assert [result.name for result in results] == [
        "retraction",
        "projection",
        "transport",
        "dimension",
    ]
    assert all(results), results
    problem = qp.problem(manifold, lambda A, B: (A.mT @ B).sin().sum())
    derivatives = {
        "gradient": problem.riemannian_gradient,
        "hessian": problem.riemannian_hessian,
    }
    result = checks.check_hessian(manifold, problem.cost, **derivatives)
    assert abs(result.require().slope - 3) < 0.1
    wrong = checks.check_gradient(
        manifold, problem.cost, gradient=lambda x: 1.01 * problem.riemannian_gradient(x)
    )
    assert abs(wrong.slope - 1) < 0.05
    assert not wrong
