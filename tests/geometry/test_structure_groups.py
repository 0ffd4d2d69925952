"""What the geometry of each structure group is, against independent formulas."""

import pytest
import torch

from quotientopt.groups import GL, O, RotaryCommutant, RotaryPhases, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient
from tests.geometry.cases import BATCH_SHAPES, Case, deviation, generator, relative

batches = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
metrics = pytest.mark.parametrize("metric", ["preconditioned", "right-invariant"])
layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])


def points(M, count, seed=0):
    source = generator(seed)
    return [M.random_point(generator=source, dtype=torch.float64) for _ in range(count)]


def complex_rows(group, X):
    """The planes' rows as complex numbers, row by row."""
    return torch.stack([torch.complex(X[..., j, :], X[..., k, :]) for j, k in group.planes], -2)


@layouts
@metrics
@batches
def test_rotary_projection_plane_by_plane(batch_shape, metric, layout):
    group = RotaryCommutant(7, rotary_dim=4, layout=layout)
    M = FactorQuotient(7, 9, 8, group=group, metric=metric, batch_shape=batch_shape)
    x, u = points(M, 2)
    horizontal = M.horizontal_component(x, u)
    a, b, xi_a, xi_b = (complex_rows(group, X) for X in (*x, *u))

    def h(p, q):
        return (p.conj() * q).sum(dim=-1, keepdim=True)

    scalar = (h(b, xi_b) / h(b, b) - (h(a, xi_a) / h(a, a)).conj()) / 2
    planes = xi_a + scalar.conj() * a, xi_b - scalar * b
    for found, expected in zip(horizontal, planes, strict=True):
        assert deviation(complex_rows(group, found), expected) < 1e-12
    # On the rows that pass it is the projection under GL.
    passing = FactorQuotient(3, 9, 8, metric=metric, batch_shape=batch_shape)
    rows = slice(4, 7)
    expected = passing.horizontal_component(
        tuple(X[..., rows, :] for X in x), tuple(U[..., rows, :] for U in u)
    )
    assert deviation(tuple(U[..., rows, :] for U in horizontal), expected) < 1e-12
    # Controls: the scalar without its conjugate, and the projection under GL of all rows.
    assert deviation(complex_rows(group, horizontal[0]), xi_a + scalar * a) > 1e-3
    everything = FactorQuotient(7, 9, 8, metric=metric, batch_shape=batch_shape)
    assert deviation(everything.horizontal_component(x, u), horizontal) > 1e-3


@layouts
@metrics
@batches
def test_rotary_manifold_is_a_product(batch_shape, metric, layout):
    group = RotaryCommutant(7, rotary_dim=4, layout=layout)
    M = FactorQuotient(7, 9, 8, group=group, metric=metric, batch_shape=batch_shape)
    x, y, u, v = points(M, 4)
    parts = [
        (FactorQuotient(2, 9, 8, group=RotaryCommutant(2), metric=metric), list(plane))
        for plane in group.planes
    ]
    parts.append((FactorQuotient(3, 9, 8, metric=metric), list(group.pass_rows)))
    squared, inner = torch.zeros(batch_shape), torch.zeros(batch_shape)
    for part, rows in parts:
        part.batch_shape = batch_shape
        own = [tuple(X[..., rows, :] for X in pair) for pair in (x, y, u, v)]
        squared = squared + part.distance(own[0], own[1]).square()
        inner = inner + part.inner(own[0], own[2], own[3])
        second = part.retract_second_order(own[0], own[2])
        whole = M.retract_second_order(x, u)
        assert deviation(tuple(X[..., rows, :] for X in whole), second) < 1e-12
    assert relative(M.distance(x, y).square(), squared) < 1e-12
    assert relative(M.inner(x, u, v), inner) < 1e-11
    # Control: GL sees fewer invariants and another metric.
    everything = FactorQuotient(7, 9, 8, metric=metric, batch_shape=batch_shape)
    assert relative(everything.distance(x, y).square(), squared) > 1e-3
    assert relative(everything.inner(x, u, v), inner) > 1e-3


@layouts
def test_rotary_invariants_are_the_scores_at_all_relative_positions(layout):
    group = RotaryCommutant(6, rotary_dim=4, layout=layout)
    M = FactorQuotient(6, 7, 6, group=group)
    x, y = points(M, 2)
    angles = torch.tensor([0.3, 1.1], dtype=torch.float64)

    def scores(pair, position):
        rotation = torch.eye(6, dtype=torch.float64)
        for (j, k), angle in zip(group.planes, position * angles, strict=True):
            rotation[j, j] = rotation[k, k] = angle.cos()
            rotation[k, j], rotation[j, k] = angle.sin(), -angle.sin()
        return pair[0].mT @ rotation @ pair[1]

    real, imaginary, passing = M.canonical_projection(x).split((2, 2, 1), dim=-3)
    for position in (0, 1, 5):
        phase = (position * angles)[:, None, None]
        expected = (phase.cos() * real - phase.sin() * imaginary).sum(0) + passing.squeeze(0)
        assert deviation(scores(x, position), expected) < 1e-12
    g = group.random(cond=100, generator=generator(3), dtype=torch.float64)
    assert deviation(scores(M.act(g, x), 5), scores(x, 5)) < 1e-11
    # An element of GL keeps the scores at equal positions only, and the distance sees that.
    stranger = GL(6).random(generator=generator(4), dtype=torch.float64)
    moved = GL(6).act(stranger, x)
    assert deviation(scores(moved, 0), scores(x, 0)) < 1e-12
    assert deviation(scores(moved, 5), scores(x, 5)) > 1e-3
    assert FactorQuotient(6, 7, 6).distance(moved, x) < 1e-10
    assert M.distance(moved, x) > 1e-3
    dense = torch.linalg.vector_norm(M.canonical_projection(x) - M.canonical_projection(y))
    assert relative(M.distance(x, y), dense) < 1e-13


@batches
def test_euclidean_pairs_are_token_matrices(batch_shape):
    M = FactorQuotient(3, 6, 4, group=O(3), metric="euclidean", batch_shape=batch_shape)
    joint = GramQuotient(10, 3, batch_shape=batch_shape)
    x, y, u, v = points(M, 4)
    X, Y, U, V = (torch.cat(pair, dim=-1).mT for pair in (x, y, u, v))

    def columns(pair):
        return torch.cat(pair, dim=-1).mT

    assert M.dim == joint.dim
    assert relative(M.inner(x, u, v), joint.inner(X, U, V)) < 1e-12
    assert relative(M.distance(x, y), joint.distance(X, Y)) < 1e-12
    assert deviation(M.canonical_projection(x), joint.canonical_projection(X)) < 1e-12
    assert (
        deviation(columns(M.horizontal_component(x, u)), joint.horizontal_component(X, U)) < 1e-12
    )
    assert deviation(columns(M.log(x, y)), joint.log(X, Y)) < 1e-11
    assert deviation(columns(M.exp(x, u)), joint.exp(X, U)) < 1e-14
    assert deviation(columns(M.geodesic(x, u, 0.3)), joint.geodesic(X, U, 0.3)) < 1e-14
    for kind in ("svd", "polar"):
        assert deviation(columns(M.section(x, kind)[0]), joint.section(X, kind)[0]) < 1e-11
    # The geodesic to the logarithm ends on the orbit of y, as long as the distance says.
    u = M.log(x, y)
    M.check_tangent(x, u, tolerance=1e-10)
    assert relative(M.norm(x, u), M.distance(x, y)) < 1e-12
    middle = M.geodesic(x, u, 0.5)
    half = M.distance(x, y) / 2
    assert relative(M.distance(x, middle), half) < 1e-11
    assert relative(M.distance(middle, y), half) < 1e-11
    # Control: the middle of another line.
    astray = M.geodesic(x, v, 0.5)
    assert relative(M.distance(astray, y), half) > 1e-3


@batches
def test_stabilizer_of_ones(batch_shape):
    d = 4
    group = StabilizerOfOnes(d)
    M = GramQuotient(7, d, stabilizer=group, batch_shape=batch_shape)
    full = GramQuotient(7, d, batch_shape=batch_shape)
    (x, u), (y,) = points(M, 2), points(M, 1, seed=5)
    g = group.random(batch_shape, generator=generator(1), dtype=torch.float64)
    assert deviation(M.act(g, x).sum(dim=-1, keepdim=True), x.sum(dim=-1, keepdim=True)) < 1e-13
    # It commutes with centring, so that LayerNorm does not see it.
    centred = x - x.mean(dim=-1, keepdim=True)
    moved = M.act(g, x)
    assert deviation(moved - moved.mean(dim=-1, keepdim=True), M.act(g, centred)) < 1e-13
    # On what is orthogonal to 1 the geometry is that of O(d − 1).
    moving = GramQuotient(7, d - 1, batch_shape=batch_shape)
    X, Y, U = (group.moving_part(z) for z in (x, y, u))
    horizontal = M.horizontal_component(x, u)
    assert deviation(group.moving_part(horizontal), moving.horizontal_component(X, U)) < 1e-12
    assert deviation(horizontal.sum(dim=-1, keepdim=True), u.sum(dim=-1, keepdim=True)) < 1e-12
    squared = moving.distance(X, Y).square() + (x - y).sum(dim=-1).square().sum(dim=-1) / d
    assert relative(M.distance(x, y).square(), squared) < 1e-11
    # Fewer symmetries: more is horizontal, and orbits are further apart.
    assert M.dim == full.dim + d - 1
    assert (M.norm(x, horizontal) > full.norm(x, full.horizontal_component(x, u))).all()
    assert (M.distance(x, y) > full.distance(x, y)).all()
    # Control: a rotation that moves 1 keeps the Gram matrix but not the orbit.
    rotation = O(d).random(batch_shape, generator=generator(2), dtype=torch.float64)
    turned = full.act(rotation, x)
    assert (full.distance(x, turned) < 1e-10).all()
    assert (M.distance(x, turned) > 1e-3).all()
    with pytest.raises(ValueError, match="does not fix the all-ones vector"):
        M.act(rotation, x)


FACTOR_SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def modulo_compact(M, pair):
    """What two pairs share that differ by a phase in each plane and a rotation of passing rows."""
    group = M.group
    parts = [complex_rows(group, X) for X in pair]
    rows = slice(group.rotary_dim, group.r)
    shared = [X[..., rows, :].mT @ X[..., rows, :] for X in pair]
    planes = [p.unsqueeze(-1) @ p.unsqueeze(-2).conj() for p in parts]
    return tuple(planes), tuple(shared)


@layouts
@pytest.mark.parametrize("kind", FACTOR_SECTIONS)
@batches
def test_rotary_sections(batch_shape, kind, layout):
    group = RotaryCommutant(7, rotary_dim=4, layout=layout)
    M = FactorQuotient(7, 9, 8, group=group, batch_shape=batch_shape)
    (x,) = points(M, 1)
    dressed, g = M.section(x, kind)
    group.check_element(g)
    assert M.distance(dressed, x).max() < 1e-11
    assert deviation(M.act(g, x), dressed) < 1e-11
    assert deviation(M.section(dressed, kind)[0], dressed) < 1e-10
    h = group.random(batch_shape, cond=100, generator=generator(3), dtype=torch.float64)
    redressed, _ = M.section(M.act(h, x), kind)
    if kind == "svd":
        assert deviation(redressed, dressed) < 1e-10
        largest = complex_rows(group, dressed[1])
        largest = largest.gather(-1, largest.abs().argmax(dim=-1, keepdim=True))
        assert (largest.imag.abs() < 1e-12).all()
        assert (largest.real > 0).all()
    else:
        for found, expected in zip(
            modulo_compact(M, redressed), modulo_compact(M, dressed), strict=True
        ):
            assert deviation(found, expected) < 1e-10
    lengths = [torch.linalg.vector_norm(complex_rows(group, X), dim=-1) for X in dressed]
    expected = torch.ones_like(lengths[1]) if kind in ("orthonormal", "triangular") else lengths[0]
    assert (lengths[1] - expected).abs().max() < 1e-12
    # On the rows that pass it is the section under GL.
    passing = FactorQuotient(3, 9, 8, batch_shape=batch_shape)
    own = passing.section(tuple(X[..., 4:, :] for X in x), kind)[0]
    assert deviation(tuple(X[..., 4:, :] for X in dressed), own) < 1e-11
    # Control: points of one orbit share none of this.
    for found, other in zip(modulo_compact(M, M.act(h, x)), modulo_compact(M, x), strict=True):
        assert deviation(found, other) > 1e-3


@pytest.mark.parametrize("kind", ["svd", "polar"])
@batches
def test_orthogonal_sections(batch_shape, kind):
    M = FactorQuotient(3, 7, 5, group=O(3), batch_shape=batch_shape)
    (x,) = points(M, 1)
    dressed, g = M.section(x, kind)
    O(3).check_element(g)
    assert deviation(M.act(g, x), dressed) < 1e-12
    assert deviation(M.section(dressed, kind)[0], dressed) < 1e-11
    h = O(3).random(batch_shape, generator=generator(3), dtype=torch.float64)
    assert deviation(M.section(M.act(h, x), kind)[0], dressed) < 1e-10
    if kind == "svd":
        S = sum(X @ X.mT for X in dressed)
        assert deviation(S, torch.diag_embed(S.diagonal(dim1=-2, dim2=-1))) < 1e-12
    else:
        assert deviation(dressed[0][..., :3], dressed[0][..., :3].mT) < 1e-12
    # Control: the orbit's points differ, and general elements lead to another section.
    assert deviation(M.act(h, x), x) > 1e-3
    stranger = GL(3).random(batch_shape, generator=generator(4), dtype=torch.float64)
    assert deviation(M.section(GL(3).act(stranger, x), kind)[0], dressed) > 1e-3


@pytest.mark.parametrize("kind", ["svd", "polar"])
@batches
def test_stabilizer_sections(batch_shape, kind):
    case = Case("gram of ones", batch_shape)
    M, x, h = case.manifold, case.point(), case.element()
    dressed, g = M.section(x, kind)
    M.group.check_element(g)
    assert deviation(M.act(g, x), dressed) < 1e-12
    assert deviation(M.canonical_projection(dressed), M.canonical_projection(x)) < 1e-12
    assert deviation(M.section(dressed, kind)[0], dressed) < 1e-11
    assert deviation(M.section(M.act(h, x), kind)[0], dressed) < 1e-10
    # Control: the section under O(d) forgets the inner products with 1.
    other, _ = GramQuotient(M.N, M.d, batch_shape=batch_shape).section(x, kind)
    assert deviation(M.canonical_projection(other), M.canonical_projection(x)) > 1e-3


@batches
def test_rotary_alignment_is_closest_in_the_balanced_gauge(batch_shape):
    group = RotaryCommutant(5, rotary_dim=4)
    M = FactorQuotient(5, 7, 6, group=group, batch_shape=batch_shape)
    x, y = points(M, 2)
    y, _ = M.section(y, "balanced")
    aligned, _ = M.align(x, y)

    def gap(pair):
        return sum((p - q).square().sum((-2, -1)) for p, q in zip(pair, y, strict=True))

    for angle in (0.1, -0.1):
        phase = torch.polar(torch.ones(2), torch.tensor([angle, 0.0])).to(torch.complex128)
        turn = group.element(phase, torch.ones(1, 1, dtype=torch.float64))
        assert (gap(group.act(turn.expand(*batch_shape, 5, 5), aligned)) > gap(aligned)).all()
    # A plane without overlap keeps its phase.
    assert deviation(group.unitary_factor(torch.zeros(5, 5)), torch.eye(5)) == 0


@pytest.mark.parametrize("group", [O(3), GL(3), RotaryPhases(4, 2)])
def test_an_inverse_is_no_view(group):
    g = group.random(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = g.clone()
    group.inverse(g).zero_()
    assert torch.equal(g, before)


def test_factors_are_drawn_where_the_generator_is(monkeypatch):
    """A generator of the host serves for every device, as that of all other random elements."""
    seen = []
    draw = torch.rand

    def rand(*shape, generator=None, device=None, **more):
        seen.append(torch.device(device or "cpu") == generator.device)
        return draw(*shape, generator=generator, device=device, **more)

    monkeypatch.setattr(torch, "rand", rand)
    GL(1).random((2,), generator=torch.Generator(), device="meta", dtype=torch.float32)
    assert seen == [True]
