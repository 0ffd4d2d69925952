"""How much of a trajectory is gauge: orthogonal parts, known motions, optimizers, the log."""

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.flow import VerticalLog, projected_gradient_flow, vertical_motion
from quotientopt.flow.fibres import PairGeometry
from quotientopt.groups import GL, O, RotaryCommutant, RotaryPhases, StabilizerOfOnes
from quotientopt.manifolds import FactorQuotient, GramQuotient, ProductManifold
from quotientopt.symmetries import HeadSymmetry
from tests.canonical.models import hand_made
from tests.flow.cases import SETTINGS, attention, heads_of, randn, setting, train

ONE_LINE = r"\A.+\Z"
METRICS = ("euclidean", "preconditioned", "right-invariant")
GROUPS = {
    "gl": GL(4),
    "rotary": RotaryCommutant(4),
    "partial": RotaryCommutant(4, 2, "interleaved"),
    "o": O(4),
    "of ones": StabilizerOfOnes(4),
    "phases": RotaryPhases(4, 2),
}
BATCH_SHAPES = ((), (3,), (2, 3))
INVARIANT = [("gl", m) for m in METRICS[1:]] + [("rotary", m) for m in METRICS[1:]]
CASES = [(name, "euclidean") for name in GROUPS] + [*INVARIANT, ("partial", METRICS[1])]
cases = pytest.mark.parametrize(("group", "metric"), CASES)


def pair(batch_shape=(), seed=0):
    return randn(*batch_shape, 4, 6, seed=seed), randn(*batch_shape, 4, 5, seed=seed + 1)


def geometry_of(group, metric="euclidean"):
    return PairGeometry(GROUPS[group], metric, "pair")


def vertical_vector(group, x, Lambda):
    Lambda = group.algebra_projection(Lambda)
    return -Lambda.mT @ x[0], Lambda @ x[1]


def close(u, v, tolerance=1e-10):
    size = max(X.norm().item() for X in v)
    return all((X - Y).norm() <= tolerance * size for X, Y in zip(u, v, strict=True))


# ---- projection ----------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
def test_vertical_parts(group, metric, batch_shape):
    geometry, x, u = geometry_of(group, metric), pair(batch_shape), pair(batch_shape, seed=5)
    vertical = geometry.vertical(x, u)
    assert close(geometry.vertical(x, vertical), vertical)
    known = vertical_vector(geometry.group, x, randn(*batch_shape, 4, 4, seed=8))
    assert close(geometry.vertical(x, known), known)
    # Orthogonal parts: Pythagoras, per head.
    horizontal = tuple(a - b for a, b in zip(u, vertical, strict=True))
    parts = geometry.squared_norm(x, vertical) + geometry.squared_norm(x, horizontal)
    assert parts.shape == batch_shape
    assert torch.allclose(parts, geometry.squared_norm(x, u), rtol=1e-10)
    # And no other split along the orbit is shorter across it.
    other = tuple(h + 1e-3 * k for h, k in zip(horizontal, known, strict=True))
    shortest = geometry.squared_norm(x, horizontal)
    assert (geometry.squared_norm(x, other) > shortest).all()
    # Control: a matrix outside the Lie algebra makes no vertical vector.
    if group != "gl":
        stranger = randn(*batch_shape, 4, 4, seed=8)
        wrong = -stranger.mT @ x[0], stranger @ x[1]
        assert not close(geometry.vertical(x, wrong), wrong, 1e-2)


@pytest.mark.parametrize("group", ["o", "of ones"])
def test_it_is_that_of_the_gram_quotient(group):
    X, U = randn(2, 6, 4), randn(2, 6, 4, seed=1)
    M = GramQuotient(6, 4, stabilizer=GROUPS[group], batch_shape=(2,))
    vertical, _ = geometry_of(group).vertical((X.mT, X.mT[..., :0]), (U.mT, U.mT[..., :0]))
    assert (vertical.mT - M.vertical_component(X, U)).abs().max() < 1e-12


def test_vanishing_factors_are_no_matter():
    """A fresh low-rank adapter: B = 0, whose orbit directions in B vanish too."""
    geometry = geometry_of("gl")
    x = randn(4, 6), torch.zeros(4, 5, dtype=torch.float64)
    along, across = geometry.vertical(x, pair(seed=3))
    assert across.abs().max() == 0
    assert torch.isfinite(along).all()
    nothing = geometry.vertical((torch.zeros_like(x[0]), x[1]), pair(seed=3))
    assert all(part.abs().max() == 0 for part in nothing)


def test_isotropic_share():
    geometry, x = geometry_of("partial"), pair((2000,))
    u = pair((2000,), seed=11)
    shares = geometry.squared_norm(x, geometry.vertical(x, u)) / geometry.squared_norm(x, u)
    assert geometry.isotropic_share(x) == pytest.approx(6 / 44)
    assert shares.mean().item() == pytest.approx(6 / 44, rel=0.03)


# ---- directions of optimizers --------------------------------------------------------------------


def one_step(model, loss, optimizer, **options):
    with VerticalLog(model, optimizer, **options) as log:
        train(model, loss, optimizer, 1)
    return log.motion


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_horizontal_and_adam_is_not(name):
    model, loss = setting(**SETTINGS[name])
    start = [p.detach().clone() for p in model.parameters()]

    def step(make, **options):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        return one_step(model, loss, make(model.parameters()), **options)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-2)

    descent = step(sgd)
    assert (descent.vertical_length < 1e-10 * descent.horizontal_length).all()
    adam = step(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    assert (adam.vertical_length > 0.1 * adam.horizontal_length).all()
    # Control: of another group than the right one gradients are not horizontal.
    qk = next(s for s in heads_of(model) if s.name.endswith("qk"))
    if isinstance(qk.group, GL):
        value = model.value.weight.unflatten(0, (qk.heads, qk.rank))
        blocks = qk.left_blocks, [value]
    else:
        blocks = qk.left_blocks, qk.right_blocks
    wrong = HeadSymmetry(*blocks, GL(qk.rank), "qk")
    stranger = step(sgd, symmetries=[wrong])
    assert (stranger.vertical_length > 1e-3 * stranger.horizontal_length).all()


@pytest.mark.parametrize("kind", ["normalized", "centred", "partial", "phases"])
def test_gradients_are_horizontal_under_every_group(kind):
    """Heads that are normalised, centred or partly rotated, by hand-made symmetries."""
    model, _ = hand_made(kind)
    inputs = randn(2, 6, 20)

    def step(group=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        symmetries = model.symmetries(group)
        with VerticalLog(model, optimizer, symmetries=symmetries) as log:
            train(model, lambda m: m(inputs).square().sum(), optimizer, 1)
        return log.motion

    right = step()
    assert right.horizontal["qk"].min() > 0
    assert (right.vertical["qk"] < 1e-10 * right.horizontal["qk"]).all()
    # Control: a larger group than the model has.
    wrong = step(GL(8))
    assert (wrong.vertical["qk"] > 1e-4 * wrong.horizontal["qk"]).any()


def test_pure_gauge_motion_and_motion_across():
    model = attention()
    symmetries = qo.find_symmetries(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generators = {s.name: randn(s.heads, s.rank, s.rank, seed=3) for s in symmetries.heads}
    identity = torch.eye(3, dtype=torch.float64)
    symmetries.act_({name: identity + 1e-6 * Lambda for name, Lambda in generators.items()})
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    motion = vertical_motion(model, [start, end])
    assert motion.share.item() > 1 - 1e-9
    assert motion.outside.item() == 0
    assert set(motion.vertical) == set(generators)
    for name, lengths in motion.vertical.items():
        assert lengths.shape == (1, 2)
        assert motion.share_of(name).min() > 1 - 1e-9
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, end[name])


@pytest.mark.parametrize("metric", METRICS)
def test_a_flow_does_not_move_along_orbits(metric):
    pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
    model, loss = setting()
    result = projected_gradient_flow(
        model, loss, (0, 0.05), metric=metric, t_eval=torch.linspace(0, 0.05, 41).double()[:-1]
    )
    fine = vertical_motion(model, result, metric=metric)
    coarse = [{name: p[k] for name, p in result.points.items()} for k in (0, 39)]
    whole = vertical_motion(model, coarse, metric=metric)
    # Chords of a horizontal curve leave the horizontal space to second order.
    assert fine.total_share < 1e-3
    assert whole.total_share < 0.1
    if metric == "euclidean":
        assert fine.total_share < 1e-2 * whole.total_share
    assert fine.cumulative_horizontal[-1].item() == pytest.approx(
        result.horizontal_length[-1].item(), rel=1e-3
    )


def test_on_manifolds():
    factor = FactorQuotient(4, 6, 5, batch_shape=(2,))
    M = ProductManifold([factor, GramQuotient(6, 3)])
    points = [(pair((2,), seed=k), randn(6, 3, seed=k)) for k in (1, 4, 7)]
    motion = vertical_motion(M, points)
    assert motion.vertical["0"].shape == (2, 2)
    assert motion.vertical["1"].shape == (2,)
    step = points[1][1] - points[0][1]
    expected = M.manifolds[1].vertical_component(points[0][1], step).norm()
    assert motion.vertical["1"][0].item() == pytest.approx(expected.item(), rel=1e-12)
    alone = vertical_motion(factor, [point[0] for point in points])
    assert torch.allclose(alone.vertical["point"], motion.vertical["0"], rtol=1e-12)
    squares = alone.vertical_length.square() + alone.horizontal_length.square()
    moved = sum((b - a).square().sum() for a, b in zip(points[0][0], points[1][0], strict=True))
    assert squares[0].item() == pytest.approx(moved.item(), rel=1e-12)


# ---- the log -------------------------------------------------------------------------------------


def test_the_log_is_the_trajectory():
    model, loss = setting()
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    points = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    with VerticalLog(model, optimizer) as log, VerticalLog(model, optimizer, every=2) as sparse:
        for _ in range(5):
            optimizer.zero_grad()
            (loss(model) + model.extra.square().sum()).backward()
            optimizer.step()
            points.append({name: p.detach().clone() for name, p in model.named_parameters()})
    train(model, loss, optimizer, 2)
    motion, expected = log.motion, vertical_motion(model, points)
    assert log.steps == [1, 2, 3, 4, 5]
    assert sparse.steps == [1, 3, 5]
    assert torch.equal(motion.vertical_length, expected.vertical_length)
    assert torch.equal(sparse.motion.vertical_length, motion.vertical_length[::2])
    assert motion.outside.min() > 1e-3
    assert torch.allclose(motion.cumulative_vertical[-1], motion.vertical_length.sum(), rtol=1e-14)
    squares = motion.vertical_length.square(), motion.horizontal_length.square()
    share = squares[0].sum() / (squares[0] + squares[1]).sum()
    assert motion.total_share == pytest.approx(share.item())
    # r / (n + m), the dimension of GL(r) over the size of a pair.
    assert motion.isotropic_share == pytest.approx({"qk": 0.25, "vo": 0.25})
    text = str(motion)
    assert text.splitlines()[1].startswith("qk")
    assert f"{motion.total_share:.1%} of the motion" in text


def test_alike_pairs_are_one_batch():
    """Results do not depend on whether pairs are stacked."""
    model = nn.Sequential(attention(seed=1), attention(seed=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    logs = [VerticalLog(model, optimizer, symmetries=[s]) for s in heads_of(model)]
    with VerticalLog(model, optimizer) as log:
        optimizer.zero_grad()
        model(randn(2, 5, 6)).square().sum().backward()
        optimizer.step()
    assert len(log.motion.vertical) == 4
    for alone in logs:
        for name, lengths in alone.motion.vertical.items():
            assert lengths.min() > 0
            assert torch.allclose(log.motion.vertical[name], lengths, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """The motion of the stored weights, measured in float64."""
    model, loss = setting()
    model, loss.inputs, loss.targets = (
        part.to(dtype) for part in (model, loss.inputs, loss.targets)
    )
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    found = one_step(model, loss, torch.optim.Adam(model.parameters(), lr=2.0**-4))
    after = {name: p.detach().double() for name, p in model.named_parameters()}
    exact = vertical_motion(attention(), [before, after])
    for name, lengths in exact.vertical.items():
        assert found.vertical[name].dtype == torch.float64
        assert torch.allclose(found.vertical[name], lengths, rtol=1e-12)
    assert found.total_share > 0.05


def not_copied():
    """A model and its state dicts, which all follow it."""
    model = attention()
    return model, [model.state_dict(), model.state_dict()]


def frozen():
    return attention().requires_grad_(False)


def log_of(model=None, optimizer=None, **options):
    model = attention() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return VerticalLog(model, optimizer, **options)


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda: log_of(every=0), ValueError, "every"),
        (lambda: log_of(every=True), ValueError, "every"),
        (lambda: log_of(optimizer=object()), TypeError, "register_step_pre_hook"),
        (lambda: log_of(nn.Linear(2, 2)), ValueError, "no head symmetry"),
        (
            lambda: log_of(optimizer=torch.optim.SGD(attention().parameters(), lr=0.1)),
            ValueError,
            "trains no parameter",
        ),
        (lambda: log_of(frozen()), ValueError, "trainable"),
        (lambda: log_of(metric="fisher"), ValueError, "metric"),
        (lambda: log_of().motion, ValueError, "no step"),
        (lambda: vertical_motion("sphere", [1, 2]), TypeError, "str"),
        (lambda: vertical_motion(attention(), []), ValueError, "two points"),
        (lambda: vertical_motion(attention(), [1, 2]), TypeError, "dict"),
        (lambda: vertical_motion(attention(), [{}, {}]), ValueError, "missing"),
        (lambda: vertical_motion(*not_copied()), ValueError, "copy every state_dict()"),
        (
            lambda: vertical_motion(
                attention(), [attention().state_dict(), attention(width=8).state_dict()]
            ),
            ValueError,
            "shape",
        ),
        (lambda: vertical_motion(FactorQuotient(4, 6, 5), [pair(), 3.0]), TypeError, "pair"),
        (
            lambda: vertical_motion(FactorQuotient(4, 6, 5), [pair(), pair()], symmetries=[]),
            ValueError,
            "symmetries",
        ),
        (lambda: PairGeometry(O(3), "right-invariant", "x", tokens=True), ValueError, "token"),
        (lambda: geometry_of("phases", "preconditioned"), ValueError, "euclidean"),
        (lambda: geometry_of("of ones", "preconditioned"), ValueError, "euclidean"),
    ],
)
def test_bad_input(run, error, words):
    with pytest.raises(error, match=ONE_LINE) as caught:
        run()
    assert words in str(caught.value)


@pytest.mark.parametrize("manifold", [FactorQuotient(3, 8, 6), GramQuotient(5, 3)])
def test_one_pair_without_a_batch(manifold):
    generator = torch.Generator().manual_seed(0)
    x = manifold.random_point(generator=generator, dtype=torch.float64)
    y = manifold.retract(x, manifold.random_tangent(x, generator=generator))
    z = manifold.act(manifold.group.random(generator=generator, dtype=torch.float64), y)
    motion = vertical_motion(manifold, [x, y, z])
    assert motion.vertical_length.shape == motion.horizontal_length.shape == (2,)
    assert motion.share[0] < 0.1 < motion.share[1]
    assert (motion.cumulative_vertical.diff() > 0).all()
    assert "of the motion of the pairs is gauge" in str(motion)


@pytest.mark.parametrize(("N", "d"), [(1, 10), (3, 8), (8, 3)])
def test_isotropic_share_of_few_tokens(N, d):
    """Of directions drawn evenly: the dimension of the orbit over that of the space."""
    manifold = GramQuotient(N, d)
    generator = torch.Generator().manual_seed(0)
    x = manifold.random_point(generator=generator, dtype=torch.float64)
    motion = vertical_motion(manifold, [x, x + 1e-3 * torch.randn_like(x)])
    (share,) = motion.isotropic_share.values()
    assert share == pytest.approx((N * d - manifold.dim) / (N * d), abs=1e-12)
    directions = torch.randn(400, N, d, generator=generator, dtype=torch.float64)
    vertical = torch.stack([manifold.vertical_component(x, u) for u in directions])
    assert vertical.square().sum() / directions.square().sum() == pytest.approx(share, abs=0.05)
