"""Products of manifolds: forwarded methods, sums, names and errors."""

import pytest
import torch

from quotientopt.groups import O, RotaryCommutant
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from tests.geometry.cases import generator, relative


def factors():
    return {
        "qk": FactorQuotient(4, 6, 5, group=RotaryCommutant(4), batch_shape=(3,)),
        "vo": FactorQuotient(2, 6, 5, metric="right-invariant", batch_shape=(2, 3)),
        "tokens": GramQuotient(5, 3),
    }


def build(named):
    return ProductManifold(factors() if named else list(factors().values()))


def entries(collection):
    return list(collection.values()) if isinstance(collection, dict) else list(collection)


def flat(collection):
    """All tensors of nested collections."""
    if isinstance(collection, torch.Tensor):
        return [collection]
    return [tensor for part in entries(collection) for tensor in flat(part)]


def agree(p, q, tolerance=1e-12):
    pairs = list(zip(flat(p), flat(q), strict=True))
    return all((a - b).abs().max() <= tolerance * (1 + a.abs().max()) for a, b in pairs)


def sample(M, seed=0):
    source = generator(seed)
    return [M.random_point(generator=source, dtype=torch.float64) for _ in range(2)]


named = pytest.mark.parametrize("named", [True, False], ids=["dict", "tuple"])


@named
def test_methods_are_those_of_the_factors(named):
    M = build(named)
    x, v = sample(M)
    u, w = sample(M, 1)
    assert isinstance(x, dict if named else tuple)
    g = M.random_element(generator=generator(2), dtype=torch.float64)
    base = M.differential(x, u)
    algebra = M.random_element(generator=generator(3), dtype=torch.float64)
    calls = {
        "canonical_projection": (x,),
        "differential": (x, u),
        "vertical_vector": (x, algebra),
        "vertical_component": (x, u),
        "horizontal_component": (x, u),
        "horizontal_lift": (x, base),
        "gradient": (x, u),
        "hessian": (x, u, w, v),
        "retract": (x, u),
        "retract_second_order": (x, u),
        "transport": (x, v, u),
        "act": (g, x),
    }
    for name, arguments in calls.items():
        together = getattr(M, name)(*arguments)
        alone = [
            getattr(factor, name)(*(entries(a)[i] for a in arguments))
            for i, factor in enumerate(entries(M.manifolds))
        ]
        assert agree(together, alone), name
        # Control: another point, another result.
        moved = [v if a is x else a for a in arguments]
        if name == "transport":
            moved = [x, x, u]
        assert not agree(getattr(M, name)(*moved), alone), name
    for name in ("align", "section"):
        other = (v,) if name == "align" else ()
        representatives, elements = getattr(M, name)(x, *other)
        assert agree(M.act(elements, x), representatives, 1e-10)
        assert M.distance(representatives, x) < 1e-10


@named
def test_dimensions_and_inner_products_are_sums_over_factors_and_batch_items(named):
    M = build(named)
    x, y = sample(M)
    u, v = sample(M, 1)
    assert M.dim == 3 * (4 * 11 - 4) + 6 * (2 * 9) + (15 - 3)
    parts = [
        (factor.inner(*(entries(z)[i] for z in (x, u, v))).sum(), entries(x)[i], entries(y)[i])
        for i, factor in enumerate(entries(M.manifolds))
    ]
    inner = M.inner(x, u, v)
    assert inner.shape == ()
    assert relative(inner, sum(part[0] for part in parts)) < 1e-13
    assert relative(M.norm(x, u).square(), M.inner(x, u, u)) < 1e-13
    squared = sum(
        factor.distance(p, q).square().sum()
        for factor, (_, p, q) in zip(entries(M.manifolds), parts, strict=True)
    )
    assert relative(M.distance(x, y).square(), squared) < 1e-13
    tangent = M.random_tangent(x, generator=generator(4))
    M.check_tangent(x, tangent, tolerance=1e-10)
    assert (M.norm(x, tangent) - 1).abs() < 1e-12
    # Control: a mean over batch items is another number.
    means = sum(
        factor.inner(*(entries(z)[i] for z in (x, u, v))).mean()
        for i, factor in enumerate(entries(M.manifolds))
    )
    assert relative(inner, means) > 1e-3


def test_closed_geodesics_where_all_factors_have_them():
    M = ProductManifold(
        (GramQuotient(5, 3), FactorQuotient(2, 3, 4, group=O(2), metric="euclidean"))
    )
    x, y = sample(M)
    u = M.log(x, y)
    M.check_tangent(x, u, tolerance=1e-10)
    assert relative(M.norm(x, u), M.distance(x, y)) < 1e-12
    assert M.distance(M.exp(x, u), y) < 1e-12
    middle = M.geodesic(x, u, 0.5)
    assert relative(M.distance(x, middle), M.distance(x, y) / 2) < 1e-12
    with pytest.raises(ValueError, match="factor 'qk': geodesic has no closed form"):
        build(True).geodesic(*sample(build(True)), 0.5)


def test_nested_products_and_description():
    inner = ProductManifold({"a": GramQuotient(4, 2), "b": GramQuotient(5, 2)})
    M = ProductManifold({"pair": inner, "c": GramQuotient(3, 2)})
    x, y = sample(M)
    assert M.dim == 7 + 9 + 5
    squared = inner.distance(x["pair"], y["pair"]).square()
    squared = squared + GramQuotient(3, 2).distance(x["c"], y["c"]).square()
    assert relative(M.distance(x, y).square(), squared) < 1e-12
    assert M.groups == {"pair": {"a": O(2), "b": O(2)}, "c": O(2)}
    assert "GramQuotient(4, 2" in repr(M)


def test_float32_stays_float32():
    M = build(True)
    x = M.random_point(generator=generator())
    u = M.random_tangent(x, generator=generator(1))
    assert {t.dtype for t in flat(M.retract(x, u))} == {torch.float32}
    assert M.inner(x, u, u).dtype == torch.float32


POINT = build(True).random_point(generator=generator())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ProductManifold({}), ValueError, "at least one"),
        (lambda: ProductManifold({"a": 3}), TypeError, "factor 'a' is no quotient manifold"),
        (lambda: build(True).check_point(tuple(POINT.values())), TypeError, "must be a dict"),
        (lambda: build(False).check_point(POINT), TypeError, "must be a tuple"),
        (lambda: build(True).check_point({"qk": POINT["qk"]}), ValueError, "must have the entries"),
        (
            lambda: build(True).check_point(POINT | {"tokens": torch.ones(5, 3)}),
            ValueError,
            "factor 'tokens': token matrix x is rank-deficient",
        ),
        (
            lambda: build(True).check_point(POINT | {"vo": None}),
            TypeError,
            "factor 'vo': x must be a pair",
        ),
        (lambda: build(True).section(POINT, "polar"), ValueError, "factor 'qk': section must be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as info:
        call()
    assert "\n" not in str(info.value)
