"""Properties over sizes, groups, metrics and condition numbers drawn by Hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quotientopt.groups import GL, O, RotaryCommutant, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient
from tests.geometry.cases import add, deviation, generator, leaves, scale

examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def manifolds(draw):
    """A manifold of small size with any group and metric that go together."""
    batch_shape = draw(st.sampled_from([(), (1,), (2,), (2, 1)]))
    family = draw(st.sampled_from(["gl", "rotary", "o", "gram"]))
    r = draw(st.integers(1, 5))
    if family == "gram":
        d = draw(st.integers(1, 4))
        stabilizer = StabilizerOfOnes(d) if d > 1 and draw(st.booleans()) else None
        rows = d + draw(st.integers(0, 3))
        return GramQuotient(rows, d, stabilizer=stabilizer, batch_shape=batch_shape)
    metrics = ["preconditioned", "right-invariant"]
    group = GL(r)
    if family == "o":
        group, metrics = O(r), [*metrics, "euclidean"]
    elif family == "rotary":
        rotary_dim = 2 * draw(st.integers(0, r // 2))
        group = RotaryCommutant(r, rotary_dim, draw(st.sampled_from(["half", "interleaved"])))
    n, m = (r + draw(st.integers(0, 4)) for _ in range(2))
    metric = draw(st.sampled_from(metrics))
    return FactorQuotient(r, n, m, group=group, metric=metric, batch_shape=batch_shape)


def tangents(M, source, count):
    return [M.random_point(generator=source, dtype=torch.float64) for _ in range(count)]


def conditioned_point(M, source):
    """A point with moderate condition numbers: a random one, all singular values larger by 3.

    (Its polar factor is added. Orthonormal rows of a QR decomposition, whose signs are the
    library's own, make some of them smaller on one processor and larger on another.)
    """
    x = M.random_point(generator=source, dtype=torch.float64)

    def improve(X):
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        return X + 3 * (U @ Vh)

    return tuple(improve(X) for X in x) if isinstance(x, tuple) else improve(x)


@examples
@given(M=manifolds(), seed=st.integers(0, 1000), log_cond=st.floats(0, 3))
def test_projection_properties(M, seed, log_cond):
    source = generator(seed)
    x = conditioned_point(M, source)
    u, v = tangents(M, source, 2)
    horizontal = M.horizontal_component(x, u)
    size = M.norm(x, u)
    vertical = M.vertical_component(x, u)
    assert deviation(add(horizontal, vertical), u) < 1e-10
    again = add(M.horizontal_component(x, horizontal), horizontal, -1)
    assert (M.norm(x, again) < 1e-11 * size).all()
    assert (M.inner(x, horizontal, vertical).abs() < 1e-11 * size.square()).all()
    left = M.inner(x, horizontal, v)
    right = M.inner(x, u, M.horizontal_component(x, v))
    assert ((left - right).abs() < 1e-11 * size * M.norm(x, v)).all()
    g = M.group.random(M.batch_shape, cond=10**log_cond, generator=source, dtype=torch.float64)
    y, w = M.act(g, x), M.act(g, u)
    assert ((M.norm(y, w) - size).abs() < 1e-10 * size).all()
    gap = add(M.horizontal_component(y, w), M.act(g, horizontal), -1)
    assert (M.norm(y, gap) < 1e-10 * size).all()
    if M.group.dim:
        tilt = M.vertical_vector(x, M.group.random(M.batch_shape, generator=source).double())
        assert (M.norm(x, M.horizontal_component(x, tilt)) < 1e-11 * (size + M.norm(x, tilt))).all()
        # Control: the vector had a vertical part, which is gone.
        assert (M.norm(x, vertical) > 1e-6 * size).all()


@examples
@given(M=manifolds(), seed=st.integers(0, 1000), log_cond=st.floats(0, 3))
def test_orbit_properties(M, seed, log_cond):
    source = generator(seed)
    x, y = (conditioned_point(M, source) for _ in range(2))
    g = M.group.random(M.batch_shape, cond=10**log_cond, generator=source, dtype=torch.float64)
    z = M.act(g, x)
    distance = M.distance(x, y)
    assert (M.distance(z, x) < 1e-9).all()
    assert ((M.distance(z, y) - distance).abs() < 1e-9 * (1 + distance)).all()
    assert (distance > 1e-3).all()  # the control: points of different orbits
    for kind in M.section_kinds:
        if kind == "polar":
            continue
        dressed, element = M.section(x, kind)
        assert (M.distance(dressed, x) < 1e-10).all()
        assert deviation(M.act(element, x), dressed) < 1e-9
        redressed, _ = M.section(dressed, kind)
        assert (M.distance(redressed, x) < 1e-10).all()
    aligned, element = M.align(z, x)
    assert deviation(aligned, x) < 1e-8
    M.group.check_element(element.float())


@examples
@given(M=manifolds(), seed=st.integers(0, 1000))
def test_dimension_property(M, seed):
    if M.dim > 14:
        return
    source = generator(seed)
    x = conditioned_point(M, source)
    basis = [M.random_tangent(x, generator=source) for _ in range(M.dim + 1)]
    rows = [torch.stack([M.inner(x, u, v) for v in basis], dim=-1) for u in basis]
    spectrum = torch.linalg.eigvalsh(torch.stack(rows, dim=-2))
    assert (spectrum[..., 0].abs() < 1e-10).all()
    if M.dim > 1:
        assert (spectrum[..., 1] > 1e-10).all()
    free = [M.random_point(generator=source, dtype=torch.float64) for _ in range(M.dim + 1)]
    if M.group.dim:
        rows = [torch.stack([M.inner(x, u, v) for v in free], dim=-1) for u in free]
        assert (torch.linalg.eigvalsh(torch.stack(rows, dim=-2))[..., 0] > 1e-10).all()


@examples
@given(M=manifolds(), seed=st.integers(0, 1000))
def test_lift_and_step_properties(M, seed):
    source = generator(seed)
    x = conditioned_point(M, source)
    u = M.random_tangent(x, generator=source)
    lifted = M.horizontal_lift(x, M.differential(x, u))
    assert (M.norm(x, add(lifted, u, -1)) < 1e-9).all()
    y = M.retract_second_order(x, scale(0.1, u))
    assert (M.distance(x, y) > 0).all()
    transported = M.transport(x, y, u)
    M.check_tangent(y, transported, tolerance=1e-9)
    assert all(torch.isfinite(leaf).all() for leaf in leaves(y))
