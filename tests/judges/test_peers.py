"""Our checks on manifolds of others: what is right passes, what is known to be wrong is found."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from quotientopt import checks

RUN = "is not at the pinned version: run tests/judges/run"


def pinned(package, wanted):
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    return pytest.mark.skipif(found != wanted, reason=f"{package} {found} {RUN}")


@pytest.fixture
def geoopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import geoopt
    torch.manual_seed(0)
    return geoopt


@pytest.fixture
def manifolds():
    import numpy as np
    import pymanopt

    np.random.seed(0)  # noqa: NPY002 -- pymanopt draws from the global generator
    return pymanopt.manifolds


def failures(results):
    return {result.name for result in results if not result}


@pinned("geoopt", "0.5.1")
def test_geoopt(geoopt):
    weights = torch.randn(5, 3, dtype=torch.float64)

    def cost(x):
        return (weights * x * x.sin()).sum()

    for manifold in (geoopt.EuclideanStiefel(), geoopt.EuclideanStiefelExact(), geoopt.Sphere()):
        assert failures(checks.check_manifold(checks.GeooptView(manifold, 5, 3), cost)) == set()
    # Its projection to the tangent space of the canonical Stiefel manifold is u ↦ u − x uᵀ x.
    canonical = checks.GeooptView(geoopt.CanonicalStiefel(), 5, 3)
    result = checks.check_projection(canonical)
    with pytest.raises(AssertionError, match="projection: idempotence off by"):
        result.require()


@pinned("geoopt", "0.5.1")
def test_the_inner_product_of_a_batch_in_the_poincare_ball(geoopt):
    ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64))
    weights = torch.randn(5, 3, dtype=torch.float64)

    def cost(x):
        return (weights[: x.shape[0]] * x.sin()).sum()

    x = torch.randn(5, 3, dtype=torch.float64) / 5
    checks.check_gradient(checks.GeooptView(ball), cost, x[:1]).require()
    # Without keepdim it multiplies conformal factors (5, 1) with inner products (5,).
    assert not checks.check_gradient(checks.GeooptView(ball), cost, x)
    assert ball.inner(x, x, x).shape == (5, 5)


@pinned("pymanopt", "2.2.1")
def test_pymanopt(manifolds):
    for name in ("Sphere", "Grassmann", "Stiefel", "PSDFixedRank", "Oblique"):
        assert failures(checks.check_manifold(getattr(manifolds, name)(5, 3))) == set()
    # A sign in the Lyapunov equation of its projection.
    results = checks.check_manifold(manifolds.Elliptope(5, 3))
    assert failures(results) == {"projection", "transport", "dimension"}
