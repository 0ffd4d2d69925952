"""geomstats' FiberBundleTestCase, and its own Bures–Wasserstein bundle, on our manifolds."""

import inspect
import os
import random

import pytest
import torch

os.environ.setdefault("GEOMSTATS_BACKEND", "pytorch")
pytest.importorskip("geomstats", reason="geomstats is not installed: run tests/judges/run")

import numpy as np
from geomstats.geometry.full_rank_matrices import FullRankMatrices
from geomstats.geometry.group_action import SpecialOrthogonalComposeAction
from geomstats.geometry.matrices import MatricesMetric
from geomstats.geometry.rank_k_psd_matrices import (
    BuresWassersteinBundle,
    PSDBuresWassersteinMetric,
    RankKPSDMatrices,
)
from geomstats.geometry.spd_matrices import SPDBuresWassersteinMetric, SPDMatrices
from geomstats.test_cases.geometry.fiber_bundle import FiberBundleTestCase

from quotientopt.manifolds import GramQuotient
from tests.judges.spaces import FLAT, SPACES, randn

torch.set_default_dtype(torch.float32)  # geomstats' torch backend has changed it
ATOL = 1e-10

METHODS = {
    name: "n_points" if "n_points" in inspect.signature(method).parameters else "n_reps"
    for name, method in vars(FiberBundleTestCase).items()
    if name.startswith("test_")
    and set(inspect.signature(method).parameters)
    in ({"self", "n_points", "atol"}, {"self", "n_reps", "atol"})
}
# O'Neill's tensor is a method of the Gram quotients only; its covariant derivative of nobody.
WITHOUT_DERIVATIVE = tuple(name for name in METHODS if "tensor_derivative" not in name)
# The logarithm of the total space, in closed form where it is flat.
ONLY_FLAT = ("test_log_after_align_is_horizontal",)
ONLY_GRAM = ("test_integrability_tensor_vec",)


def applies(method, space):
    if method in ONLY_FLAT:
        return space in FLAT
    return method not in ONLY_GRAM or space.startswith("gram")


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- geomstats draws from the global generators
    random.seed(0)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def judge(space):
    """An instance of geomstats' test case for one of our spaces."""
    case = FiberBundleTestCase()
    case.total_space, case.base = space, space.base
    case.setup_method()
    return case


@pytest.mark.parametrize(
    ("space", "method", "count"),
    [
        (space, method, count)
        for space in SPACES
        for method in WITHOUT_DERIVATIVE
        if applies(method, space)
        for count in ((1, 4) if METHODS[method] == "n_points" else (2, 3))
    ],
)
def test_fiber_bundle(space, method, count):
    getattr(judge(SPACES[space]()), method)(count, atol=ATOL)


def test_the_case_has_the_methods_counted_on():
    assert len(METHODS) == 21
    assert set(ONLY_FLAT + ONLY_GRAM) < set(METHODS)


def wrong_sign(bundle):
    right = bundle.vertical_projection
    bundle.horizontal_projection = lambda u, x: u + right(u, x)


def leaning_vertical(bundle):
    right = bundle.vertical_projection
    bundle.vertical_projection = lambda u, x: right(u, x) + 1e-4 * u


def short_lift(bundle):
    right = bundle.horizontal_lift
    bundle.horizontal_lift = lambda u, base_point=None, fiber_point=None: (
        0.999 * right(u, base_point, fiber_point)
    )


def leaning_lift(bundle):
    right = bundle.horizontal_lift

    def lift(u, base_point=None, fiber_point=None):
        lifted = right(u, base_point, fiber_point)
        fiber_point = bundle.lift(base_point) if fiber_point is None else fiber_point
        return lifted + 1e-3 * bundle.vertical_projection(randn(*lifted.shape), fiber_point)

    bundle.horizontal_lift = lift


CONTROLS = {
    "test_horizontal_projection_is_horizontal": wrong_sign,
    "test_vertical_projection_is_vertical": leaning_vertical,
    "test_tangent_riemannian_submersion_after_vertical_projection": leaning_vertical,
    "test_tangent_riemannian_submersion_after_horizontal_lift": short_lift,
    "test_horizontal_lift_is_horizontal": leaning_lift,
}


@pytest.mark.parametrize("method", CONTROLS)
@pytest.mark.parametrize("space", SPACES)
def test_the_judge_finds_mistakes(space, method):
    total = SPACES[space]()
    CONTROLS[method](total.fiber_bundle)
    with pytest.raises(AssertionError):
        getattr(judge(total), method)(3, atol=ATOL)


@pytest.mark.parametrize("batch", [(), (4,)])
def test_the_bures_wasserstein_bundle_of_geomstats_agrees(batch):
    ours = GramQuotient(7, 3, batch_shape=batch)
    space = FullRankMatrices(7, 3, equip=False)
    space.equip_with_metric(MatricesMetric)
    space.equip_with_group_action(SpecialOrthogonalComposeAction(3))
    theirs = BuresWassersteinBundle(space)
    x, u = randn(*batch, 7, 3), randn(*batch, 7, 3)

    def same(a, b):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)

    same(ours.canonical_projection(x), theirs.riemannian_submersion(x))
    same(ours.differential(x, u), theirs.tangent_riemannian_submersion(u, x))
    same(ours.vertical_component(x, u), theirs.vertical_projection(u, x))
    same(ours.horizontal_component(x, u), theirs.horizontal_projection(u, x))
    rate = ours.differential(x, u)
    same(ours.horizontal_lift(x, rate), theirs.horizontal_lift(rate, fiber_point=x))
    # Control: at another point of the orbit the lift is another one.
    g = ours.group.random(batch, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not torch.allclose(
        ours.horizontal_lift(ours.act(g, x), rate), theirs.horizontal_lift(rate, fiber_point=x)
    )


def test_alignment_agrees_with_geomstats_up_to_reflections():
    ours = GramQuotient(7, 3, batch_shape=(20,))
    space = FullRankMatrices(7, 3, equip=False)
    space.equip_with_metric(MatricesMetric)
    space.equip_with_group_action(SpecialOrthogonalComposeAction(3))
    theirs = BuresWassersteinBundle(space)
    x, y = randn(20, 7, 3), randn(20, 7, 3)
    aligned, g = ours.align(y, x)
    other = theirs.align(y, x)
    # geomstats' group is SO(d), ours O(d).
    rotated = torch.linalg.det(g) > 0
    assert 3 < rotated.sum() < 17
    assert torch.allclose(aligned[rotated], other[rotated], rtol=1e-10, atol=1e-11)
    distance, farther = torch.linalg.matrix_norm(aligned - x), torch.linalg.matrix_norm(other - x)
    assert (distance < farther - 1e-3)[~rotated].all()


def test_geomstats_metric_on_matrices_of_fixed_rank_agrees():
    ours = GramQuotient(7, 3)
    base = RankKPSDMatrices(7, 3, equip=False)
    base.equip_with_metric(PSDBuresWassersteinMetric)
    x, y = randn(7, 3), randn(7, 3)
    G, H = ours.canonical_projection(x), ours.canonical_projection(y)
    assert torch.allclose(base.metric.squared_dist(G, H), ours.distance(x, y).square(), rtol=1e-9)
    u = ours.random_tangent(x)
    rate = ours.differential(x, u)
    length = base.metric.inner_product(rate, rate, G)
    assert torch.allclose(length, ours.inner(x, u, u), rtol=1e-9)
    # Control: the distance of representatives that are not aligned.
    assert not torch.allclose(ours.distance(x, y), torch.linalg.matrix_norm(x - y), rtol=1e-2)


@pytest.mark.parametrize("batch", [(), (4,)])
def test_geomstats_metric_on_positive_definite_matrices_agrees(batch):
    ours = GramQuotient(4, 4, batch_shape=batch)
    metric = SPDBuresWassersteinMetric(SPDMatrices(4, equip=False))
    x, y = randn(*batch, 4, 4), randn(*batch, 4, 4)
    G, H = ours.canonical_projection(x), ours.canonical_projection(y)
    u, v = (0.3 * ours.random_tangent(x) for _ in range(2))
    rates = ours.differential(x, u), ours.differential(x, v)

    def same(a, b):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)

    same(metric.inner_product(*rates, G), ours.inner(x, u, v))
    same(metric.exp(rates[0], G), ours.canonical_projection(ours.exp(x, u)))
    same(metric.log(H, G), ours.differential(x, ours.log(x, y)))
    same(metric.squared_dist(G, H), ours.distance(x, y).square())
    # Control: the Euclidean inner product of the rates is another metric.
    euclidean = (rates[0] * rates[1]).sum(dim=(-2, -1))
    assert not torch.allclose(euclidean, ours.inner(x, u, v), rtol=1e-2)
