"""Batches against loops, precision, and refused input."""

import math

import pytest
import torch

from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient, factor_geometry
from quotientopt.sections import element
from tests.geometry.cases import KINDS, ONE_LINE, Case, combine, deviation, generator, leaves

kinds = pytest.mark.parametrize("kind", KINDS)


def operations(M, x, y, u, v, square, g):
    """Results of every method of a manifold on the same arguments, by name."""
    base = M.differential(x, u)
    results = {
        "inner": M.inner(x, u, v),
        "norm": M.norm(x, u),
        "distance": M.distance(x, y),
        "canonical_projection": M.canonical_projection(x),
        "differential": base,
        "vertical_vector": M.vertical_vector(x, square),
        "vertical_component": M.vertical_component(x, u),
        "horizontal_component": M.horizontal_component(x, u),
        "horizontal_lift": M.horizontal_lift(x, base),
        "gradient": M.gradient(x, u),
        "hessian": M.hessian(x, u, v, y),
        "retract": M.retract(x, u),
        "retract_second_order": M.retract_second_order(x, u),
        "transport": M.transport(x, y, u),
        "act": M.act(g, x),
        "align": M.align(x, y)[0],
    }
    results |= {f"section {kind}": M.section(x, kind)[0] for kind in M.section_kinds}
    if isinstance(M, GramQuotient) or M.metric == "euclidean":
        results |= {"exp": M.exp(x, u), "log": M.log(x, y), "geodesic": M.geodesic(x, u, 0.5)}
    if isinstance(M, GramQuotient):
        results |= {
            "integrability_tensor": M.integrability_tensor(x, u, v),
            "sectional_curvature": M.sectional_curvature(x, u, v),
        }
    return results


def arguments(case):
    return [case.point() for _ in range(4)] + [case.square(), case.element()]


def pick(argument, index):
    return combine(lambda tensor: tensor[index], argument)


def difference(p, q):
    """Relative deviation of results that are matrices, pairs of matrices, or scalars."""
    if isinstance(p, torch.Tensor) and p.ndim < 2:
        p, q = p.reshape(-1, 1, 1), q.reshape(-1, 1, 1)
    return deviation(p, q)


@pytest.mark.parametrize("batch_shape", [(3,), (2, 3)], ids=str)
@kinds
def test_batch_equals_loop(kind, batch_shape):
    case, single = Case(kind, batch_shape), Case(kind)
    batched = arguments(case)
    together = operations(case.manifold, *batched)
    indices = [tuple(i.tolist()) for i in torch.ones(batch_shape).nonzero()]
    for index in indices:
        alone = operations(single.manifold, *(pick(a, index) for a in batched))
        assert alone.keys() == together.keys()
        for name, result in alone.items():
            assert difference(pick(together[name], index), result) < 1e-10, name
            # Control: the neighbour's result is another one.
            neighbour = indices[(indices.index(index) + 1) % math.prod(batch_shape)]
            assert difference(pick(together[name], neighbour), result) > 1e-4, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
@kinds
def test_low_precision_input_keeps_its_dtype(kind, dtype, tolerance):
    case = Case(kind, (3,))
    low = [combine(lambda t: t.to(dtype), argument) for argument in arguments(case)]
    if isinstance(case.group, O):
        low[-1] = case.element().float()
    exact = operations(case.manifold, *(combine(lambda t: t.double(), a) for a in low))
    for name, result in operations(case.manifold, *low).items():
        assert all(leaf.dtype == dtype for leaf in leaves(result)), name
        if name != "horizontal_lift":  # its argument was rounded as well
            wide = combine(lambda t: t.double(), result)
            assert difference(wide, exact[name]) < tolerance, name


@kinds
def test_random_points_repeat_with_the_generator_and_take_dtype(kind):
    M = Case(kind).manifold
    first, second = (M.random_point(generator=generator(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))
    assert all(leaf.dtype == torch.get_default_dtype() for leaf in leaves(first))
    x = M.random_point(dtype=torch.bfloat16)
    assert all(leaf.dtype == torch.bfloat16 for leaf in leaves(M.random_tangent(x)))


def test_operations_are_differentiable_and_do_not_touch_their_input():
    M = FactorQuotient(3, 7, 5)
    x = tuple(
        t.requires_grad_() for t in M.random_point(generator=generator(), dtype=torch.float64)
    )
    u = M.random_point(generator=generator(1), dtype=torch.float64)
    copies = [t.detach().clone() for t in x]
    loss = sum(t.square().sum() for t in M.horizontal_component(x, u))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, x))
    assert all(torch.equal(a, b) for a, b in zip(x, copies, strict=True))


def test_description():
    assert FactorQuotient(3, 7, 5).dim == 3 * 9
    assert FactorQuotient(3, 7, 5, group=O(3)).dim == 36 - 3
    assert FactorQuotient(6, 7, 5, group=RotaryCommutant(6, 4)).dim == 72 - 4 - 4
    assert GramQuotient(7, 3).dim == 21 - 3
    assert GramQuotient(7, 4, stabilizer=StabilizerOfOnes(4)).dim == 28 - 3
    assert GramQuotient(3, 6).dim == GramQuotient(3, 3).dim == 6  # symmetric 3×3 matrices
    assert GramQuotient(3, 7, stabilizer=StabilizerOfOnes(7)).dim == 6 + 3
    assert "preconditioned" in repr(FactorQuotient(3, 7, 5))
    assert repr(GramQuotient(7, 3)) == "GramQuotient(7, 3, batch_shape=())"
    assert "StabilizerOfOnes(4)" in repr(GramQuotient(7, 4, stabilizer=StabilizerOfOnes(4)))


FACTOR = FactorQuotient(2, 4, 3, batch_shape=(3,))
GRAM = GramQuotient(4, 2)
X43 = torch.randn(4, 3, generator=generator())


def x4():
    return FactorQuotient(2, 4, 3).random_point(generator=generator())


PAIR = (torch.randn(3, 2, 4), torch.randn(3, 2, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FactorQuotient(5, 4, 6), "r <= n"),
        (lambda: FactorQuotient(5, 6, 4), "r <= m"),
        (lambda: FactorQuotient(0, 4, 6), "positive integer"),
        (lambda: FactorQuotient(2, 4, 3, batch_shape=(0,)), "batch_shape"),
        (lambda: FactorQuotient(2, 4, 3, group=GL(3)), "does not act on factors of 2 rows"),
        (lambda: FactorQuotient(2, 4, 3, group=StabilizerOfOnes(2)), "one of GL, Rotary"),
        (lambda: FactorQuotient(2, 4, 3, metric="euclidean"), r"metric for GL\(2\) must be one of"),
        (lambda: FactorQuotient(2, 4, 3, group=O(2), metric="flat"), "metric for O"),
        (lambda: FactorQuotient(5, 4, 6, group=O(5)), "r <= n"),
        (lambda: FactorQuotient(5, 2, 2, group=O(5), metric="euclidean"), r"r <= n \+ m"),
        (lambda: FactorQuotient(6, 1, 3, group=RotaryCommutant(6, 4)), "2 passing rows"),
        (lambda: FactorQuotient(2, 4, 3).exp(x4(), x4()), "no closed form"),
        (lambda: FactorQuotient(2, 4, 3).log(x4(), x4()), "no closed form"),
        (lambda: FactorQuotient(2, 4, 3).geodesic(x4(), x4(), 1.0), "no closed form"),
        (lambda: FactorQuotient(2, 4, 3, group=O(2)).section(x4(), "balanced"), r"for O\(2\)"),
        (lambda: FactorQuotient(2, 4, 3, group=O(2)).act(2 * torch.eye(2), x4()), "not orthogonal"),
        (lambda: GramQuotient(2, 3).check_point(torch.ones(2, 3)), "x is rank-deficient"),
        (lambda: GramQuotient(0, 3), "N must be a positive"),
        (lambda: GramQuotient(4, 2, stabilizer=O(1)), r"O\(2\) or StabilizerOfOnes\(2\)"),
        (lambda: GramQuotient(4, 2, stabilizer=GL(2)), r"got GL\(2\)"),
        (
            lambda: GramQuotient(4, 3, stabilizer=StabilizerOfOnes(3)).act(-torch.eye(3), X43),
            "ones",
        ),
        (lambda: FACTOR.check_point((PAIR[0][0], PAIR[1][0])), r"\(3, 2, 4\), got \(2, 4\)"),
        (lambda: FACTOR.check_point(PAIR[::-1]), r"got \(3, 2, 3\)"),
        (lambda: FACTOR.check_point((PAIR[0], PAIR[1] * float("nan"))), "non-finite"),
        (lambda: FACTOR.retract(PAIR, (PAIR[0] / 0, PAIR[1])), "non-finite"),
        (lambda: FACTOR.check_point((PAIR[0], 0 * PAIR[1])), "right factor B is rank-deficient"),
        (lambda: FACTOR.gradient((0 * PAIR[0], PAIR[1]), PAIR), "left factor A is rank-defic"),
        (lambda: FACTOR.act(torch.eye(2), PAIR), r"g must have shape \(3, 2, 2\)"),
        (lambda: FACTOR.section(PAIR, "polar"), "section must be one of"),
        (lambda: GRAM.check_point(torch.ones(4, 2)), "rank-deficient"),
        (lambda: GRAM.horizontal_component(torch.ones(4, 2), torch.ones(4, 2)), "rank-deficient"),
        (lambda: GRAM.exp(torch.ones(4, 2), torch.ones(4, 3)), r"\(4, 2\), got \(4, 3\)"),
        (lambda: GRAM.section(torch.randn(4, 2), "balanced"), "section must be one of"),
    ],
)
def test_bad_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: FACTOR.check_point(PAIR[0]),
        lambda: FACTOR.check_point((PAIR[0], PAIR[1].long())),
        lambda: FACTOR.check_point((PAIR[0], None)),
        lambda: FACTOR.random_point(dtype=torch.complex64),
        lambda: GRAM.check_point(torch.ones(4, 2, dtype=torch.int32)),
        lambda: GRAM.random_point(dtype=torch.int32),
    ],
)
def test_bad_types(build):
    with pytest.raises(TypeError, match=ONE_LINE):
        build()


@kinds
def test_checks_can_be_switched_off(kind):
    M = Case(kind, (3,)).manifold
    M.check = False
    x = M.random_point()
    poisoned = combine(lambda t: t * float("nan"), x)
    result = M.retract(x, poisoned)
    assert all(torch.isnan(leaf).all() for leaf in leaves(result))


def test_batches_that_do_not_match_are_named():
    group = GL(3)
    pair = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"do not match: g \(4, 3, 3\), A \(2, 3, 5\)"):
        group.act(group.random((4,)), pair)
    with pytest.raises(ValueError, match="batch shapes do not match"):
        group.compose(group.random((4,)), group.random((2,)))
    with pytest.raises(ValueError, match="batch shapes do not match"):
        element("balanced", torch.eye(3).expand(4, 3, 3), torch.eye(3).expand(2, 3, 3))
    with pytest.raises(TypeError, match="batch_shape must be a tuple"):
        FactorQuotient(2, 3, 3, batch_shape=3)


@kinds
def test_blocks_of_a_large_batch_make_no_difference(kind, monkeypatch):
    case = Case(kind, (2, 3))
    batched = arguments(case)
    together = operations(case.manifold, *batched)
    calls = []
    cat = torch.cat

    def counting(tensors, *args, **kwargs):
        calls.append(len(tensors))
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(factor_geometry, "BLOCK_BYTES", 400)  # two or three items
    monkeypatch.setattr(factor_geometry.torch, "cat", counting)
    in_blocks = operations(case.manifold, *batched)
    for name, result in together.items():
        assert difference(in_blocks[name], result) < 1e-12, name
    if not case.is_gram:
        assert any(count > 2 for count in calls)  # there were several blocks


def test_errors_count_the_items_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(factor_geometry, "BLOCK_BYTES", 1)
    M = FactorQuotient(2, 4, 3, batch_shape=(2, 3))
    A, B = M.random_point(generator=generator())
    A[1, 2, 1] = A[1, 2, 0]
    with pytest.raises(ValueError, match=r"left factor A is rank-deficient \(batch index \(1, 2\)"):
        M.gradient((A, B), (A, B))
