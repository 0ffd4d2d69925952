"""Metrics on stacked pairs: against the manifolds, against complex arithmetic, and their laws."""

import pytest
import torch

import quotientopt as qo
from quotientopt.groups import GL, O, PlaneCommutant, RotaryCommutant
from quotientopt.optim.options import PAIR_METRICS
from quotientopt.optim.sgd.metrics import dressed_gradient, measure
from quotientopt.optim.sgd.pairs import horizontal_component, riemannian_gradient

R, N, M = 6, 9, 11
GROUPS = [
    GL(R),
    RotaryCommutant(R),
    RotaryCommutant(R, layout="interleaved"),
    RotaryCommutant(R, rotary_dim=4),
    RotaryCommutant(R, rotary_dim=2, layout="interleaved"),
    O(R),
]
CASES = [
    (group, metric)
    for group in GROUPS
    for metric in PAIR_METRICS
    if not (isinstance(group, O) and metric == "right-invariant")
]
# Planes that turn alike, which mix as complex rows do.
PLANES = PlaneCommutant(R, [[(0, 1), (2, 3)]]).in_order()
BATCHES = [(), (3,), (2, 3)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(batch, seed=0, dtype=torch.float64):
    return normal(*batch, R, N, seed=seed, dtype=dtype), normal(
        *batch, R, M, seed=seed + 1, dtype=dtype
    )


def grams(group, x):
    """Grams of real rows, or of the complex rows of planes: |a|² is the sum of both diagonals."""
    full = [X.double() @ X.double().mT for X in x]
    if not isinstance(group, RotaryCommutant | PlaneCommutant):
        return full
    weight = torch.ones(R, dtype=torch.float64)
    weight[[row for plane in group.planes for row in plane]] = 2
    return [weight * group.algebra_projection(S) for S in full]


def inner(group, metric, x, u, v):
    """The metric from its definition."""
    SA, SB = grams(group, x)
    weights = (SB, SA) if metric == "preconditioned" else (SA.inverse(), SB.inverse())
    return sum(
        (W @ a.double() * b.double()).sum((-2, -1)) for W, a, b in zip(weights, u, v, strict=True)
    )


def vertical(group, x, seed=5):
    Lambda = group.algebra_projection(normal(*x[0].shape[:-2], R, R, seed=seed))
    Lambda = Lambda.to(x[0].dtype)
    return -Lambda.mT @ x[0], Lambda @ x[1]


def distance(u, v):
    return max((a - b).abs().max().item() for a, b in zip(u, v, strict=True))


def geometry_of(group, x):
    return measure(group, *x, torch.finfo(x[0].dtype).eps)


def invariant_function(group, A, B):
    """A function of what the group cannot see."""
    weights = normal(N, M, seed=9)
    if isinstance(group, O):
        return ((A.mT @ B) * weights).sum().sin() + (A.mT @ A).square().sum().sqrt()
    if isinstance(group, GL):
        return ((A.mT @ B).sin() * weights).sum()
    planes = torch.tensor(group.planes)
    passing = list(group.pass_rows)
    a = torch.complex(A[..., planes[:, 0], :], A[..., planes[:, 1], :])
    b = torch.complex(B[..., planes[:, 0], :], B[..., planes[:, 1], :])
    products = a.conj().unsqueeze(-1) * b.unsqueeze(-2)
    value = (products.real.sin() * weights).sum() + (products.imag.cos() * weights).sum()
    return value + ((A[..., passing, :].mT @ B[..., passing, :]).sin() * weights).sum()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_it_agrees_with_the_manifold(group, metric, batch):
    manifold = qo.manifolds.FactorQuotient(R, N, M, group=group, metric=metric, batch_shape=batch)
    x, u = pair(batch), pair(batch, seed=3)
    geometry = geometry_of(group, x)
    assert distance(riemannian_gradient(metric, geometry, u), manifold.gradient(x, u)) < 1e-11
    projected = horizontal_component(metric, geometry, x, u)
    assert distance(projected, manifold.horizontal_component(x, u)) < 1e-11
    assert distance(projected, u) > 1e-2


def test_metrics_and_groups_differ():
    x, u = pair((3,)), pair((3,), seed=3)
    projections = [
        horizontal_component(metric, geometry_of(group, x), x, u)
        for group, metric in (
            (GL(R), PAIR_METRICS[0]),
            (GL(R), PAIR_METRICS[1]),
            (O(R), PAIR_METRICS[0]),
        )
    ]
    for i in range(3):
        assert distance(projections[i], projections[i - 1]) > 1e-2


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_planes_agree_with_complex_arithmetic(layout):
    group = RotaryCommutant(R, layout=layout)
    first, second = torch.tensor(group.planes).unbind(1)

    def rows(X):
        return torch.complex(X[..., first, :], X[..., second, :])

    def h(u, v):
        return (u.conj() * v).sum(-1, keepdim=True)

    x, u = pair((2,)), pair((2,), seed=3)
    (a, b), (u_a, u_b) = map(rows, x), map(rows, u)
    factor = (h(b, u_b) / h(b, b) - (h(a, u_a) / h(a, a)).conj()) / 2
    projected = horizontal_component("preconditioned", geometry_of(group, x), x, u)
    assert (rows(projected[0]) - (u_a + factor.conj() * a)).abs().max() < 1e-12
    assert (rows(projected[1]) - (u_b - factor * b)).abs().max() < 1e-12
    gradient = riemannian_gradient("preconditioned", geometry_of(group, x), u)
    assert (rows(gradient[0]) - u_a / h(b, b)).abs().max() < 1e-12
    assert (rows(gradient[1]) - u_b / h(a, a)).abs().max() < 1e-12
    unstructured = horizontal_component("preconditioned", geometry_of(GL(R), x), x, u)
    assert distance(unstructured, projected) > 1e-2


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("group", "metric"), [*CASES, *((PLANES, m) for m in PAIR_METRICS)], ids=str
)
def test_projection_is_orthogonal_and_idempotent(group, metric, batch):
    x, u = pair(batch), pair(batch, seed=3)
    geometry = geometry_of(group, x)
    projected = horizontal_component(metric, geometry, x, u)
    along = vertical(group, x)
    size = (inner(group, metric, x, u, u) * inner(group, metric, x, along, along)).sqrt()
    assert (inner(group, metric, x, projected, along).abs() / size).max() < 1e-12
    assert (inner(group, metric, x, u, along).abs() / size).max() > 1e-3
    assert distance(horizontal_component(metric, geometry, x, projected), projected) < 1e-11
    gone = horizontal_component(metric, geometry, x, along)
    assert distance(gone, (0 * x[0], 0 * x[1])) < 1e-11
    # What is removed is vertical: generated by an element of the algebra.
    removed = u[0] - projected[0], u[1] - projected[1]
    generator = removed[1] @ torch.linalg.pinv(x[1])
    assert (group.algebra_projection(generator) - generator).abs().max() < 1e-11
    assert distance((-generator.mT @ x[0], generator @ x[1]), removed) < 1e-11


@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_gradient_represents_the_differential_and_is_horizontal(group, metric):
    x = tuple(X.requires_grad_() for X in pair((3,)))
    partials = torch.autograd.grad(invariant_function(group, *x), x)
    x, xi = tuple(X.detach() for X in x), pair((3,), seed=3)
    geometry = geometry_of(group, x)
    gradient = riemannian_gradient(metric, geometry, partials)
    differential = sum((d * v).sum((-2, -1)) for d, v in zip(partials, xi, strict=True))
    assert (inner(group, metric, x, gradient, xi) - differential).abs().max() < 1e-9
    assert distance(horizontal_component(metric, geometry, x, gradient), gradient) < 1e-10
    own_norm = sum(z.square().sum((-2, -1)) for z in dressed_gradient(metric, geometry, partials))
    expected = inner(group, metric, x, gradient, gradient)
    assert ((own_norm - expected) / expected).abs().max() < 1e-10
    not_invariant = tuple(d + X for d, X in zip(partials, x, strict=True))
    if not isinstance(group, O):
        gradient = riemannian_gradient(metric, geometry, not_invariant)
        assert distance(horizontal_component(metric, geometry, x, gradient), gradient) > 1e-3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("cond", [10.0, 1000.0])
@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_metric_gradient_and_projection_are_equivariant(group, metric, cond, batch):
    x, u, partials = pair(batch), pair(batch, seed=3), pair(batch, seed=7)
    g = group.random(
        batch, cond=cond, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    y, v, moved = group.act(g, x), group.act_tangent(g, u), group.act_gradient(g, partials)

    def back(w):
        return group.act_tangent(group.inverse(g), w)

    here, there = geometry_of(group, x), geometry_of(group, y)
    gradient = riemannian_gradient(metric, here, partials)
    assert distance(back(riemannian_gradient(metric, there, moved)), gradient) < 1e-10
    horizontal = horizontal_component(metric, here, x, u)
    assert distance(back(horizontal_component(metric, there, y, v)), horizontal) < 1e-10
    length, twin_length = inner(group, metric, x, u, u), inner(group, metric, y, v, v)
    assert ((length - twin_length) / length).abs().max() < 1e-8
    norms = [
        sum(z.square().sum((-2, -1)) for z in dressed_gradient(metric, at, d))
        for at, d in ((here, partials), (there, moved))
    ]
    assert ((norms[0] - norms[1]) / norms[0]).abs().max() < 1e-10
    if not isinstance(group, O):
        flat = [sum(d.square().sum() for d in own) for own in (partials, moved)]
        assert abs(flat[0] / flat[1] - 1) > 1e-2


@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_a_batch_is_a_loop(group, metric):
    x, u = pair((2, 3)), pair((2, 3), seed=3)
    geometry = geometry_of(group, x)
    gradient = riemannian_gradient(metric, geometry, u)
    horizontal = horizontal_component(metric, geometry, x, u)
    for i in range(2):
        for j in range(3):
            own, vector = (x[0][i, j], x[1][i, j]), (u[0][i, j], u[1][i, j])
            single = geometry_of(group, own)
            assert (
                distance(
                    riemannian_gradient(metric, single, vector),
                    (gradient[0][i, j], gradient[1][i, j]),
                )
                < 1e-12
            )
            assert (
                distance(
                    horizontal_component(metric, single, own, vector),
                    (horizontal[0][i, j], horizontal[1][i, j]),
                )
                < 1e-12
            )


@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_float32_follows_float64(group, metric):
    x, u = pair((3,), dtype=torch.float32), pair((3,), seed=3, dtype=torch.float32)
    wide_x, wide_u = (tuple(X.double() for X in both) for both in (x, u))
    single, double = geometry_of(group, x), geometry_of(group, wide_x)
    for narrow, exact in (
        (riemannian_gradient(metric, single, u), riemannian_gradient(metric, double, wide_u)),
        (
            horizontal_component(metric, single, x, u),
            horizontal_component(metric, double, wide_x, wide_u),
        ),
    ):
        assert narrow[0].dtype == torch.float32
        scale = max(e.abs().max().item() for e in exact)
        assert distance(narrow, exact) < 1e-5 * scale


def test_deficient_factors_are_flagged():
    A, B = pair((2, 3))
    A[1, 2, 4] = A[1, 2, 0] - 2 * A[1, 2, 3]
    B[0, 1, 0] = torch.nan
    deficient = geometry_of(GL(R), (A, B)).deficient
    assert deficient.shape == (2, 2, 3)
    assert deficient.nonzero().tolist() == [[0, 1, 2], [1, 0, 1]]
    # Planes need no full rank, only not to vanish.
    planes = geometry_of(RotaryCommutant(R), (A, B)).deficient
    assert planes.nonzero().tolist() == [[1, 0, 1]]
    A[0, 0, [1, 4]] = 0
    assert geometry_of(RotaryCommutant(R), (A, B)).deficient[0, 0, 0]
    nearly = torch.cat([torch.eye(R, dtype=torch.float64)] * 2, -1)
    nearly[-1] = nearly[0] + 1e-7 * nearly[-1]
    assert not geometry_of(GL(R), (nearly, nearly)).deficient.any()
    assert geometry_of(GL(R), (nearly.float(), nearly.float())).deficient.all()
