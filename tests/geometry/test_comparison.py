"""Distances, alignment, exponential and logarithm."""

import warnings

import pytest
import torch

from quotientopt.groups import O
from quotientopt.manifolds import FactorQuotient, GramQuotient
from quotientopt.manifolds.nearest import relative_charge
from tests.geometry.cases import BATCH_SHAPES, KINDS, Case, add, deviation, generator, relative

kinds = pytest.mark.parametrize("kind", KINDS)
batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)


def invariant_size(case, x):
    """Norm of the invariants in the units of the distance."""
    norm = torch.linalg.vector_norm(case.invariant(x).flatten(len(case.batch_shape)), dim=-1)
    return norm.sqrt() if isinstance(case.group, O) else norm


@batches
@kinds
def test_distance_sees_orbits_only(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x, y = case.manifold, case.point(), case.point()
    g, h = case.element(cond=100), case.element(cond=100)
    size = invariant_size(case, x)
    assert (M.distance(x, M.act(g, x)) / size).max() < 1e-12
    distance = M.distance(x, y)
    assert distance.shape == torch.Size(batch_shape)
    assert relative(M.distance(y, x), distance) < 1e-12
    assert relative(M.distance(M.act(g, x), M.act(h, y)), distance) < 1e-11
    # Control: a transformation that is no symmetry.
    assert (M.distance(x, case.wrong_act(g, x)) / size).min() > 1e-3


@pytest.mark.parametrize(("r", "n", "m"), [(3, 7, 5), (4, 5, 9), (3, 3, 3)])
def test_factor_distance_equals_the_dense_one(r, n, m):
    M = FactorQuotient(r, n, m, batch_shape=(2,))
    source = generator()
    x, y = (M.random_point(generator=source, dtype=torch.float64) for _ in range(2))
    dense = torch.linalg.matrix_norm(M.canonical_projection(x) - M.canonical_projection(y))
    assert relative(M.distance(x, y), dense) < 1e-13


def test_factor_distance_does_not_cancel():
    M = FactorQuotient(3, 7, 5)
    x = M.random_point(generator=generator(), dtype=torch.float64)
    y = M.act(M.group.random(cond=100, generator=generator(1), dtype=torch.float64), x)
    size = torch.linalg.matrix_norm(M.canonical_projection(x))
    assert M.distance(x, y) / size < 1e-12
    # Control: the polarisation formula on Gram matrices loses half of the digits.
    squared = sum(
        sign * ((p[0] @ q[0].mT) * (p[1] @ q[1].mT)).sum()
        for p, q, sign in ((x, x, 1), (y, y, 1), (x, y, -2))
    )
    assert squared.abs().sqrt() / size > 1e-9


@batches
@kinds
def test_align(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x, y = case.manifold, case.point(), case.point()
    g, h = case.element(), case.element()
    methods = [M.align] if case.is_gram else [M.align, M.align_balanced]
    for align in methods:
        aligned, element = align(x, y)
        M.group.check_element(element)
        assert deviation(M.act(element, x), aligned) < 1e-10
        assert deviation(M.canonical_projection(aligned), M.canonical_projection(x)) < 1e-11
        assert deviation(align(M.act(g, x), y)[0], aligned) < 1e-9
        assert deviation(align(M.act(g, y), y)[0], y) < 1e-10
    # The last of them is equivariant in y.
    assert deviation(methods[-1](x, M.act(h, y))[0], M.act(h, aligned)) < 1e-9
    # Control: without alignment the representatives differ.
    assert deviation(M.act(g, y), y) > 1e-3


def apart(p, q):
    """Frobenius distances of representatives, one per batch item."""
    return sum((a - b).square().sum(dim=(-2, -1)) for a, b in zip(p, q, strict=True)).sqrt()


@batches
@pytest.mark.parametrize(
    "kind", ["gl preconditioned", "rotary preconditioned", "partial right-invariant"]
)
def test_align_finds_the_least_distance(kind, batch_shape):
    case = Case(kind, batch_shape)
    M, x, y = case.manifold, case.point(), case.point()
    nearest, _, charge = M.align(x, y, return_charge=True)
    balanced, _ = M.align_balanced(x, y)
    least, start = apart(nearest, y), apart(balanced, y)
    assert charge.max() < 1e-12
    assert (least <= start).all()
    assert (least < 0.9999 * start).all()
    # Orthogonal to the orbit, and nearer than whatever lies around it, near or far.
    difference = tuple(p - q for p, q in zip(nearest, y, strict=True))
    for seed in range(5):
        direction = M.vertical_vector(nearest, case.square())
        inner = sum((u * v).sum(dim=(-2, -1)) for u, v in zip(direction, difference, strict=True))
        size = sum(u.square().sum(dim=(-2, -1)) for u in direction).sqrt()
        assert (inner / size / least).abs().max() < 1e-11
        for strength in (1e-3, 1e-1, 1.0):
            h = torch.matrix_exp(strength * M.group.algebra_projection(case.square()))
            assert (apart(M.act(h, nearest), y) > least).all(), seed
    # Control: the closed form does not end there.
    _, _, own = M.align(balanced, y, return_charge=True)
    assert own.max() < 1e-12
    assert relative_charge(M.group, balanced, y).max() > 1e-3


def test_align_agrees_with_a_search_over_all_scales():
    """GL(1): the least distance over a fine grid of both signs."""
    M = FactorQuotient(1, 4, 3, batch_shape=(20,))
    x, y = (M.random_point(generator=generator(s), dtype=torch.float64) for s in (0, 1))
    least = apart(M.align(x, y)[0], y)
    scales = torch.logspace(-2, 2, 20001, dtype=torch.float64)
    scales = torch.cat((scales, -scales))[:, None, None, None]
    grid = apart((x[0] / scales, x[1] * scales), y).amin(dim=0)
    assert (least < grid * (1 + 1e-12)).all()
    assert (least - grid).abs().max() < 1e-6


def test_align_of_ill_conditioned_pairs_and_of_float32():
    M = FactorQuotient(4, 9, 8, batch_shape=(3,))
    x, y = (M.random_point(generator=generator(s), dtype=torch.float64) for s in (2, 3))
    expected = apart(M.align(x, y)[0], y)
    g = M.group.random((3,), cond=1e3, generator=generator(4), dtype=torch.float64)
    assert (apart(M.align(M.act(g, x), y)[0], y) - expected).abs().max() < 1e-9
    single = tuple(part.float() for part in x), tuple(part.float() for part in y)
    aligned, _ = M.align(*single)
    assert aligned[0].dtype == torch.float32
    assert (apart(aligned, single[1]) - expected).abs().max() < 1e-5


def test_align_warns_where_it_did_not_reach_the_nearest():
    """A y a hundred times larger than x: nearer than the closed form, and said to be no more."""
    M = FactorQuotient(3, 6, 5, batch_shape=(40,))
    x, y = (M.random_point(generator=generator(s), dtype=torch.float64) for s in (2, 3))
    y = tuple(100 * part for part in y)
    with pytest.warns(RuntimeWarning, match="the nearest representative was not reached"):
        aligned, _, charge = M.align(x, y, return_charge=True)
    assert charge.max() > 1e-6
    assert (apart(aligned, y) <= apart(M.align_balanced(x, y)[0], y) * (1 + 1e-12)).all()
    assert (M.distance(aligned, x) / M.distance(y, x)).max() < 1e-8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, charge = M.align(
            y, M.act(M.group.random((40,), dtype=torch.float64), y), return_charge=True
        )
    assert charge.max() < 1e-10


@batches
def test_gram_exponential_and_logarithm(batch_shape):
    case = Case("gram", batch_shape)
    M, x, y = case.manifold, case.point(), case.point()
    u = M.log(x, y)
    M.check_tangent(x, u, tolerance=1e-10)
    assert deviation(M.canonical_projection(M.exp(x, u)), M.canonical_projection(y)) < 1e-12
    assert relative(M.norm(x, u), M.distance(x, y)) < 1e-12
    short = 0.1 * case.tangent(x)
    assert deviation(M.log(x, M.exp(x, short)), short) < 1e-10
    assert M.exp(x, short) is not x
    # Controls: the chord is not horizontal, and longer than the distance.
    with pytest.raises(ValueError, match="not horizontal"):
        M.check_tangent(x, y - x, tolerance=1e-10)
    assert (M.norm(x, y - x) > M.distance(x, y)).all()


def test_gram_distance_is_the_bures_wasserstein_distance():
    M = GramQuotient(6, 3)
    source = generator()
    x, y = (M.random_point(generator=source, dtype=torch.float64) for _ in range(2))

    def root(S):
        values, vectors = torch.linalg.eigh(S)
        return vectors @ (values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT)

    S, T = x @ x.mT, y @ y.mT
    fidelity = root(root(S) @ T @ root(S)).trace()
    assert relative(M.distance(x, y).square(), S.trace() + T.trace() - 2 * fidelity) < 1e-7


@kinds
def test_distance_is_symmetric_and_obeys_the_triangle_inequality(kind):
    case = Case(kind, (5,))
    x, y, z = (case.point() for _ in range(3))
    distance = case.manifold.distance
    assert (distance(x, z) <= distance(x, y) + distance(y, z)).all()
    assert (distance(x, add(x, y)) > 0).all()
