"""The contract of geoopt's manifolds, on both of ours."""

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quotientopt import checks
from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    geoopt = pytest.importorskip("geoopt", reason="pip install geoopt")

import quotientopt.geoopt as qg

METRICS = ("preconditioned", "right-invariant")
BUILDERS = {
    "preconditioned": lambda: qg.FactorManifold(3, 7, 5),
    "right-invariant": lambda: qg.FactorManifold(3, 7, 5, metric="right-invariant"),
    "gram": lambda: qg.GramManifold(7, 3),
    "rotary": lambda: qg.FactorManifold(5, 7, 6, group=RotaryCommutant(5, 2)),
    "euclidean": lambda: qg.FactorManifold(3, 7, 5, group=O(3), metric="euclidean"),
    "gram of ones": lambda: qg.GramManifold(7, 4, stabilizer=StabilizerOfOnes(4)),
    "broad gram": lambda: qg.GramManifold(3, 6),
}
MAIN = (*METRICS, "gram")
FLAT = ("gram", "euclidean", "gram of ones", "broad gram")
ONE_LINE = r"\A.+\Z"
kinds = pytest.mark.parametrize("kind", BUILDERS)


def build(kind):
    return BUILDERS[kind]()


@st.composite
def situations(draw):
    """A manifold of random size with a batch shape and a generator."""
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(MAIN))
    r = draw(st.integers(1, 4))
    extra = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    if kind == "gram":
        return qg.GramManifold(r + extra[0], r + extra[1]), batch, generator
    return qg.FactorManifold(r, r + 1 + extra[0], r + 1 + extra[1], metric=kind), batch, generator


def draw_point(manifold, batch, generator):
    shape = (*batch, *manifold.matrix_shape)
    return manifold.random(*shape, dtype=torch.float64, generator=generator)


def unpack(manifold, x):
    """The point of our own manifold."""
    return manifold.unpack_tensor(x) if isinstance(manifold, qg.FactorManifold) else x


def vector_like(x, generator):
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def close(a, b, tolerance=1e-10):
    size = torch.linalg.matrix_norm(b).amax().item()
    return (a - b).abs().max().item() <= tolerance * max(size, 1e-30)


def gauge(manifold, batch, generator, cond=10.0):
    """The action of one random group element on packed tensors, and on Euclidean gradients."""
    quotient = manifold.quotient(batch)
    g = quotient.group.random(batch, cond=cond, generator=generator, dtype=torch.float64)
    if isinstance(manifold, qg.GramManifold):
        return lambda x: quotient.act(g, x)
    return lambda x: manifold.pack_point(*quotient.act(g, manifold.unpack_tensor(x)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(situations())
def test_contract(situation):
    manifold, batch, generator = situation
    x = draw_point(manifold, batch, generator)
    assert isinstance(x, geoopt.ManifoldTensor)
    a, b = vector_like(x, generator), vector_like(x, generator)
    u, v = manifold.proju(x, a), manifold.proju(x, b)
    manifold.assert_check_point(x)
    manifold.assert_check_point_on_manifold(x)
    manifold.assert_check_vector(u)
    manifold.assert_check_vector_on_tangent(x, u, atol=1e-10, rtol=1e-10)
    # Projections.
    assert close(manifold.proju(x, u), u)
    assert manifold.projx(x) is x
    manifold.assert_check_vector_on_tangent(x, manifold.egrad2rgrad(x, a), atol=1e-10, rtol=1e-10)
    # The metric, with and without its dimensions kept.
    value = manifold.inner(x, u, v)
    assert value.shape == batch
    kept = manifold.inner(x, u, v, keepdim=True)
    assert kept.shape == (*batch, 1, 1)
    assert torch.equal(kept[..., 0, 0], value)
    assert torch.equal(manifold.component_inner(x, u, v), kept)
    assert torch.equal(manifold.inner(x, u), manifold.inner(x, u, u))
    assert torch.allclose(manifold.norm(x, u).square(), manifold.inner(x, u), rtol=1e-12)
    assert torch.allclose(value, manifold.inner(x, v, u), rtol=1e-10, atol=1e-12)
    # The gradient represents the differential.
    riemannian = manifold.inner(x, manifold.egrad2rgrad(x, a), u)
    euclidean = (a * u).sum(dim=(-2, -1))
    size = manifold.norm(x, manifold.egrad2rgrad(x, a)) * manifold.norm(x, u)
    assert ((riemannian - euclidean).abs() <= 1e-10 * size + 1e-12).all()
    # Steps and transports.
    y = manifold.retr(x, 0.1 * u)
    manifold.assert_check_vector_on_tangent(y, manifold.transp(x, y, v), atol=1e-10, rtol=1e-10)
    for step, together, follow in (
        (manifold.retr, manifold.retr_transp, manifold.transp_follow_retr),
        (manifold.expmap, manifold.expmap_transp, manifold.transp_follow_expmap),
    ):
        end = step(x, 0.1 * u)
        manifold.assert_check_point_on_manifold(end)
        assert torch.equal(step(x, 0 * u), x.detach())
        new, moved = together(x, 0.1 * u, v)
        assert torch.equal(new, end)
        assert torch.equal(moved, manifold.transp(x, end, v))
        assert torch.equal(follow(x, 0.1 * u, v), moved)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(situations())
def test_equivariance(situation):
    assert_equivariant(*situation)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@kinds
def test_equivariance_under_every_group(kind, batch):
    assert_equivariant(build(kind), batch, torch.Generator().manual_seed(0))


def assert_equivariant(manifold, batch, generator):
    act = gauge(manifold, batch, generator)
    x = draw_point(manifold, batch, generator)
    w = vector_like(x, generator)
    u = manifold.proju(x, w)
    u = 0.3 * u / manifold.norm(x, u).clamp_min(1e-30)[..., None, None]
    moved_x, moved_u = act(x), act(u)
    assert close(manifold.proju(moved_x, act(w)), act(manifold.proju(x, w)))
    assert torch.allclose(manifold.inner(moved_x, moved_u), manifold.inner(x, u), rtol=1e-10)
    for step in (manifold.retr, manifold.expmap):
        assert close(step(moved_x, moved_u), act(step(x, u)))
    y = manifold.retr(x, u)
    assert close(manifold.transp(moved_x, act(y), moved_u), act(manifold.transp(x, y, u)))


@kinds
def test_vectors_with_a_vertical_component_are_refused(kind):
    manifold = build(kind)
    x = manifold.random(dtype=torch.float64)
    u = torch.randn_like(x)
    ok, reason = manifold.check_vector_on_tangent(x, u, explain=True)
    assert not ok
    assert "not horizontal: vertical component" in reason
    with pytest.raises(ValueError, match="not lying on tangent space"):
        manifold.assert_check_vector_on_tangent(x, u)
    horizontal = manifold.proju(x, u)
    nearly = horizontal + 1e-3 * (u - horizontal)
    assert not manifold.check_vector_on_tangent(x, nearly)
    assert manifold.check_vector_on_tangent(x, nearly, rtol=1e-2)


@kinds
def test_points_that_are_none_are_refused(kind):
    manifold = build(kind)
    x = manifold.random(dtype=torch.float64)
    for bad, message in (
        (x[..., :-1], "must have shape"),
        (x[0], "must have shape"),
        (torch.zeros_like(x), "rank-deficient"),
        (x * math.nan, "non-finite"),
        (x.long(), "floating-point"),
    ):
        ok, reason = manifold.check_point_on_manifold(bad, explain=True)
        assert not ok
        assert message in reason
        assert "\n" not in reason
        assert not manifold.check_vector_on_tangent(bad, bad)
    with pytest.raises(ValueError, match="must have shape"):
        geoopt.ManifoldParameter(x[..., :-1], manifold=manifold)
    with pytest.raises(ValueError, match=ONE_LINE):
        manifold.proju(x, x[:-1])
    with pytest.raises(ValueError, match=r"batches on the .* do not match"):
        manifold.proju(x.expand(2, *x.shape), x.expand(3, *x.shape))


@kinds
def test_batches_broadcast_and_equal_loops(kind):
    manifold = build(kind)
    generator = torch.Generator().manual_seed(0)
    x = draw_point(manifold, (2, 3), generator)
    u = vector_like(x[0, 0], generator)
    together = manifold.proju(x, u)
    assert together.shape == x.shape
    assert manifold.inner(x, u).shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert close(together[i, j], manifold.proju(x[i, j], u), 1e-12)
            # Control: another head's point gives another vector.
            assert not close(together[i, j], manifold.proju(x[i, (j + 1) % 3], u), 1e-3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(kind, dtype):
    manifold = build(kind)
    x = manifold.random(2, *manifold.matrix_shape, dtype=dtype)
    u = manifold.proju(x, torch.randn(x.shape).to(dtype))
    step = 0.1 * u
    results = (
        manifold.retr(x, step),
        manifold.expmap(x, step),
        manifold.transp(x, x, u),
        manifold.egrad2rgrad(x, u),
        manifold.inner(x, u),
    )
    assert {tensor.dtype for tensor in (x, u, *results)} == {dtype}
    exact = manifold.proju(x.double(), u.double())
    assert close(manifold.proju(x, u).double(), exact, 4 * torch.finfo(dtype).eps)


@kinds
def test_our_own_checks(kind):
    torch.manual_seed(0)
    manifold = build(kind)
    for shape in ((), (2, *manifold.matrix_shape)):
        view = checks.GeooptView(manifold, *shape)
        quotient = manifold.quotient(shape[:-2])

        def cost(x, quotient=quotient, manifold=manifold):
            invariant = quotient.canonical_projection(unpack(manifold, x))
            return (invariant.sin() + invariant.square() / 9).sum()

        results = checks.check_manifold(view, cost)
        assert [result.name for result in results] == [
            "gradient",
            "retraction",
            "projection",
            "transport",
            "dimension",
        ]
        for result in results:
            result.require()


@pytest.mark.parametrize("metric", METRICS)
def test_expmap_is_of_second_order_and_retr_is_not(metric):
    manifold = build(metric)
    quotient = manifold.quotient()
    x = manifold.unpack_tensor(manifold.random(dtype=torch.float64))

    def through(step):
        def retraction(y, u):
            return manifold.unpack_tensor(step(manifold.pack_point(*y), manifold.pack_point(*u)))

        return checks.check_retraction(quotient, x, order=2, retraction=retraction)

    through(manifold.expmap).require()
    assert not through(manifold.retr)


@pytest.mark.parametrize("kind", FLAT)
def test_maps_of_flat_total_spaces_are_exact(kind):
    manifold = build(kind)
    generator = torch.Generator().manual_seed(0)
    x, y = draw_point(manifold, (3,), generator), draw_point(manifold, (3,), generator)
    u = manifold.logmap(x, y)
    manifold.assert_check_vector_on_tangent(x, u, atol=1e-10)
    end = manifold.expmap(x, u)
    quotient = manifold.quotient((3,))

    def invariant(z):
        return quotient.canonical_projection(unpack(manifold, z))

    assert close(invariant(end), invariant(y))
    assert torch.allclose(manifold.dist(x, y), manifold.norm(x, u), rtol=1e-12)
    assert manifold.dist(x, y, keepdim=True).shape == (3, 1, 1)
    assert torch.allclose(manifold.dist2(x, y), manifold.dist(x, y).square())
    halves = manifold.dist(x, manifold.expmap(x, u / 2))
    assert torch.allclose(halves, manifold.dist(x, y) / 2, rtol=1e-10)
    # Control: the straight line to y itself is no geodesic.
    assert (torch.linalg.matrix_norm(y - x) > 1.01 * manifold.dist(x, y)).all()


def test_factor_maps_without_closed_form_are_refused():
    manifold = build("preconditioned")
    x = manifold.random()
    with pytest.raises(NotImplementedError, match=r"\AFactorManifold has no geodesic distance"):
        manifold.dist(x, x)
    with pytest.raises(NotImplementedError, match=r"\AFactorManifold has no logarithmic map"):
        manifold.logmap(x, x)


def test_packing():
    manifold = qg.FactorManifold(2, 4, 3)
    A, B = torch.randn(5, 2, 4), torch.randn(5, 2, 3)
    x = manifold.pack_point(A, B)
    assert x.shape == (5, 2, 7)
    left, right = manifold.unpack_tensor(x)
    assert torch.equal(left, A)
    assert torch.equal(right, B)
    assert left.data_ptr() == x.data_ptr()  # views
    for wrong in ((A,), (A, B, B), (B, A), (A, B[0]), (A, torch.randn(4, 2, 3))):
        with pytest.raises(ValueError, match=ONE_LINE):
            manifold.pack_point(*wrong)
    gram = qg.GramManifold(4, 2)
    X = torch.randn(4, 2)
    assert gram.pack_point(X) is X
    assert gram.unpack_tensor(X) is X


@kinds
def test_random_points(kind):
    manifold = build(kind)
    shape = manifold.matrix_shape
    assert manifold.random().shape == shape
    assert manifold.random((4, *shape)).shape == (4, *shape)
    assert torch.equal(manifold.origin(*shape), manifold.origin(*shape))
    assert torch.equal(manifold.origin(*shape, seed=None).detach() * 0, torch.zeros(shape))
    state = torch.random.get_rng_state()
    manifold.origin(*shape)
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two = (torch.Generator().manual_seed(seed) for seed in (0, 0))
    assert torch.equal(manifold.random(generator=one), manifold.random(generator=two))
    with pytest.raises(ValueError, match=ONE_LINE):
        manifold.random(4, 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mean'"):
        manifold.random(mean=1)


def test_quotients_and_names():
    manifold = qg.FactorManifold(2, 4, 3, metric="right-invariant", group=GL(2))
    assert isinstance(manifold.quotient(), FactorQuotient)
    assert manifold.quotient((5, 6)).batch_shape == (5, 6)
    assert manifold.dim == 2 * (4 + 3 - 2)
    assert (manifold.name, manifold.ndim, manifold.reversible) == ("Factor", 2, False)
    assert repr(manifold) == "Factor(2, 4, 3, group=GL(2), metric='right-invariant') manifold"
    gram = qg.GramManifold(5, 2)
    assert isinstance(gram.quotient(), GramQuotient)
    assert repr(gram) == "Gram(5, 2) manifold"
    assert gram.dim == 9


@pytest.mark.parametrize(
    "call",
    [
        lambda: qg.FactorManifold(5, 4, 6),
        lambda: qg.FactorManifold(2, 4, 6, metric="euclid"),
        lambda: qg.FactorManifold(2, 4, 6, group=GL(3)),
        lambda: qg.GramManifold(0, 3),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError, match=ONE_LINE):
        call()


def test_scaled_and_product_manifolds():
    base = build("preconditioned")
    generator = torch.Generator().manual_seed(0)
    x = draw_point(base, (), generator)
    u = base.proju(x, vector_like(x, generator))
    scaled = geoopt.Scaled(base, 2.0)
    assert close(scaled.retr(x, u), base.retr(x, u / 2))
    rows, columns = base.matrix_shape
    product = geoopt.ProductManifold((base, (rows, columns)), (geoopt.Sphere(), 4))
    sphere = geoopt.Sphere().random(4, dtype=torch.float64)
    point = product.pack_point(x, sphere)
    product.assert_check_point_on_manifold(point)
    gradient = product.egrad2rgrad(point, torch.randn_like(point))
    product.assert_check_vector_on_tangent(point, gradient, atol=1e-9)
    assert product.component_inner(point, gradient).shape == point.shape


@kinds
def test_pickling(kind):
    manifold = build(kind)
    copy = pickle.loads(pickle.dumps(manifold))
    assert repr(copy) == repr(manifold)
    x = manifold.random(dtype=torch.float64)
    u = torch.randn_like(x)
    assert torch.equal(copy.egrad2rgrad(x, u), manifold.egrad2rgrad(x, u))
    again = pickle.loads(pickle.dumps(x))
    assert isinstance(again, geoopt.ManifoldTensor)
    assert torch.equal(again, x)
    assert repr(again.manifold) == repr(manifold)
