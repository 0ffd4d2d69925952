"""Training of InvariantAttention: what depends on the gauge of the attention it came from."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import quotientopt as qo
from quotientopt.models import Attention, reference_model
from quotientopt.nn import InvariantAttention

BATCH, LENGTH, WIDTH, HEADS = 4, 6, 24, 4
CONDITION = 30.0


def multihead(bias=True):
    module = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    return module


def grouped():
    return Attention(WIDTH, HEADS, 2, causal=True).double()


def rotary():
    return Attention(WIDTH, HEADS, 2, rotary=True, causal=True).double()


def twin_of(module, cond=CONDITION):
    """The same function in another gauge."""
    twin = copy.deepcopy(module)
    symmetries = qo.find_symmetries(twin)
    symmetries.act_(symmetries.random_element(cond))
    return twin


def call(module, x):
    return (
        module(x, x, x, need_weights=False)[0]
        if type(module) is nn.MultiheadAttention
        else (module(x))
    )


def data(steps):
    x = torch.randn(steps, BATCH, LENGTH, WIDTH).double()
    return list(zip(x, x.roll(1, dims=-1).tanh(), strict=True))


def losses_of(module, optimizer, batches, between=None):
    losses = []
    for step, (x, target) in enumerate(batches):
        optimizer.zero_grad()
        loss = functional.mse_loss(call(module, x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if between is not None:
            between(step)
    return losses


def apart(one, two):
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def quotient_adam(module):
    return qo.QuotientAdam(module, lr=1e-2, weight_decay=0.1)


SOURCES = pytest.mark.parametrize("source", [multihead, grouped, rotary])


# ---- the gauge is forgotten ---------------------------------------------------------------------


@SOURCES
@pytest.mark.parametrize("parametrization", ["fixed-rank", "chart"])
def test_parameters_do_not_depend_on_the_gauge(source, parametrization):
    module = source()
    twin = twin_of(module)
    one, two = (
        InvariantAttention.from_attention(m, parametrization=parametrization)
        for m in (module, twin)
    )
    for name, ours in one.state_dict().items():
        assert torch.allclose(two.state_dict()[name].double(), ours.double(), atol=1e-10), name
    theirs = dict(twin.named_parameters())
    assert max((theirs[n] - p).abs().max() for n, p in module.named_parameters()) > 0.1


@SOURCES
def test_chart_has_one_path_from_all_gauges_under_adamw(source):
    module, batches = source(), data(40)
    twin = twin_of(module)
    charts = [InvariantAttention.from_attention(m, parametrization="chart") for m in (module, twin)]
    paths = [losses_of(chart, adamw(chart), batches) for chart in charts]
    assert apart(*paths) < 1e-10
    assert paths[0][-1] < paths[0][0]
    ordinary = [losses_of(m, adamw(m), batches) for m in (module, twin)]
    assert apart(*ordinary) > 1e-3


@SOURCES
def test_fixed_rank_has_one_path_from_all_gauges_under_quotient_adam(source):
    module, batches = source(), data(40)
    twin = twin_of(module)
    points = [InvariantAttention.from_attention(m) for m in (module, twin)]
    # Another representative of the second: the optimizer may not see it.
    symmetries = qo.find_symmetries(points[1])
    symmetries.act_(symmetries.random_element(CONDITION))
    paths = [losses_of(m, quotient_adam(m), batches) for m in points]
    assert apart(*paths) < 1e-10
    assert paths[0][-1] < paths[0][0]
    # It is the path of the ordinary attention itself: without the values' bias, whose part in that
    # of the output is trained there twice.
    if source is multihead:
        module = multihead(bias=False)
        point = InvariantAttention.from_attention(module)
        paths = [losses_of(point, quotient_adam(point), batches)]
    assert apart(losses_of(module, quotient_adam(module), batches), paths[0]) < 1e-10
    controls = [InvariantAttention.from_attention(twin) for _ in range(2)]
    symmetries = qo.find_symmetries(controls[1])
    symmetries.act_(symmetries.random_element(CONDITION))
    assert apart(*(losses_of(m, adamw(m), batches) for m in controls)) > 1e-3


@SOURCES
def test_dressing_in_between_leaves_the_path(source):
    module, batches = source(), data(20)
    one, two, control = (InvariantAttention.from_attention(module) for _ in range(3))
    optimizers = [quotient_adam(m) for m in (one, two, control)]

    def dress(step):
        if step % 7 == 3:
            before = two.query.weight.detach().clone()
            two.to_section_("balanced", optimizer=optimizers[1])
            assert (two.query.weight - before).abs().max() > 1e-3

    plain = losses_of(one, optimizers[0], batches)
    assert apart(losses_of(two, optimizers[1], batches, dress), plain) < 1e-10
    # Without the state it is another path.
    other = losses_of(
        control,
        optimizers[2],
        batches,
        lambda step: control.to_section_("balanced") if step == 3 else None,
    )
    assert apart(other, plain) > 1e-6


def inside(name, parametrization):
    """A reference model with its attentions converted, and the tokens it reads."""
    model = reference_model(name, layers=2, width=32, heads=4).double()
    for block in model.blocks:
        block.attention = InvariantAttention.from_attention(
            block.attention, parametrization=parametrization
        )
    return model, torch.randint(256, (2, 9))


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_points_inside_a_model_keep_its_residual_stream(name):
    ordinary = reference_model(name, layers=2, width=32, heads=4).double()
    model, tokens = inside(name, "fixed-rank")
    symmetries, expected = qo.find_symmetries(model), qo.find_symmetries(ordinary)
    assert symmetries.residual.exact
    assert len(symmetries.residual.parameters) == len(expected.residual.parameters)
    assert len(symmetries.heads) == len(expected.heads)
    if name == "gpt":
        assert max(symmetries.verify(model, tokens).values()) < 1e-10


def test_a_chart_inside_a_model_breaks_its_residual_stream():
    model, _ = inside("gpt", "chart")
    assert qo.find_symmetries(model).residual is None


def test_dressing_inside_a_model():
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH, dtype=torch.float64),
        InvariantAttention.from_attention(multihead()),
        InvariantAttention.from_attention(grouped()),
    )
    batches = data(12)
    twin = copy.deepcopy(model)
    optimizers = [quotient_adam(m) for m in (model, twin)]
    plain = losses_of(model, optimizers[0], batches)

    def dress(step):
        if step == 5:
            twin[1].to_section_("orthonormal", optimizer=optimizers[1])

    assert apart(losses_of(twin, optimizers[1], batches, dress), plain) < 1e-10
    key = twin[1].points()["qk"][1]
    assert not torch.allclose(key @ key.mT, torch.eye(WIDTH // HEADS).double(), atol=1e-3)
    twin[1].to_section_("orthonormal", optimizer=optimizers[1])
    key = twin[1].points()["qk"][1]
    assert torch.allclose(key @ key.mT, torch.eye(WIDTH // HEADS).double(), atol=1e-10)
    with pytest.raises(ValueError, match="does not know the pairs"):
        twin[1].to_section_(optimizer=optimizers[0])
    with pytest.raises(TypeError, match="AdamW depends on the gauge"):
        twin[1].to_section_(optimizer=adamw(twin))


# ---- gradients ----------------------------------------------------------------------------------


def tangent_gradient(point, gradient):
    """Projection of ∂L/∂G to the tangent space of the rank-r matrices, from either gauge."""
    (A, B), (dA, dB) = point, gradient
    right = dA.mT @ torch.linalg.solve(B @ B.mT, B)  # ∂G P_B
    left = torch.linalg.solve(A @ A.mT, A).mT @ dB  # P_A ∂G
    return right + left - left @ B.mT @ torch.linalg.solve(B @ B.mT, B)


@pytest.mark.parametrize("source", [multihead, grouped])
def test_gradients_are_the_projected_ones(source):
    module = source()
    twin = twin_of(module)
    x, target = data(1)[0]
    one, two = (InvariantAttention.from_attention(m) for m in (module, twin))
    symmetries = qo.find_symmetries(two)
    symmetries.act_(symmetries.random_element(CONDITION))
    chart = InvariantAttention.from_attention(twin, parametrization="chart")
    for m in (one, two, chart):
        functional.mse_loss(m(x), target).backward()
    manifolds, points = one.manifolds(), chart.points()
    layers = {"qk": chart.key, "vo": chart.value}
    for name, manifold in manifolds.items():
        expected = tangent_gradient(one.points()[name], one.gradients()[name])
        found = tangent_gradient(two.points()[name], two.gradients()[name])
        assert expected.abs().max() > 1e-6
        assert torch.allclose(found, expected, atol=1e-10 * expected.abs().max())
        assert not torch.allclose(two.gradients()[name][0], one.gradients()[name][0], rtol=1e-2)
        # The gradient in the chart: of the representative in the chart, at its free columns.
        B = points[name][1]
        g = torch.linalg.lstsq(one.points()[name][1].mT, B.mT).solution.mT
        assert torch.allclose(g @ one.points()[name][1], B, atol=1e-10)
        dA, dB = one.gradients()[name]
        dA, dB = g @ dA, torch.linalg.solve(g.mT, dB)
        layer, rank = layers[name], manifold.r
        free = layer.columns[:, None, rank:].expand(-1, rank, -1)
        assert torch.allclose(layer.free.grad, dB.gather(-1, free), atol=1e-10 * dB.abs().max())
        pivots = layer.columns[:, None, :rank].expand(-1, rank, -1)
        assert dB.gather(-1, pivots).abs().max() > 1e-8  # not zero, but no coordinate
        if name == "qk":
            group = chart.shape.query_groups
            ours = dA.unflatten(-1, (group, -1)).transpose(1, 2).flatten(0, 2)
            weight = chart.query.weight.grad
            assert torch.allclose(weight, ours[:, :WIDTH], atol=1e-10 * ours.abs().max())


# ---- the retraction -----------------------------------------------------------------------------


def descend(attention, x, target, *, second_order=False, riemannian=True):
    """Losses of gradient descent by retractions."""
    losses = []
    for _ in range(15):
        attention.zero_grad()
        loss = functional.mse_loss(attention(x), target)
        loss.backward()
        points, steps = attention.points(), attention.gradients()
        if riemannian:
            steps = {
                name: manifold.gradient(points[name], steps[name])
                for name, manifold in attention.manifolds().items()
            }
        steps = {name: (-0.05 * u_A, -0.05 * u_B) for name, (u_A, u_B) in steps.items()}
        attention.retract_(steps, second_order=second_order)
        losses.append(loss.item())
    return losses


@SOURCES
@pytest.mark.parametrize("second_order", [False, True])
def test_riemannian_descent_does_not_depend_on_the_representative(source, second_order):
    module = source()
    x, target = data(1)[0]

    def representatives():
        one, two = (InvariantAttention.from_attention(module) for _ in range(2))
        symmetries = qo.find_symmetries(two)
        symmetries.act_(symmetries.random_element(CONDITION))
        two.section = "triangular"
        return one, two

    pair = representatives()
    paths = [descend(m, x, target, second_order=second_order) for m in pair]
    assert apart(*paths) < 1e-10
    assert all(later < earlier for earlier, later in zip(paths[0], paths[0][1:], strict=False))
    A, B = pair[0].points()["vo"]  # in the SVD section again
    assert torch.allclose(A @ A.mT, B @ B.mT, atol=1e-12)
    B = pair[1].points()["vo"][1]
    assert torch.allclose(B @ B.mT, torch.eye(WIDTH // HEADS).double(), atol=1e-12)
    # Euclidean gradients do not move with the representative as steps do.
    assert apart(*(descend(m, x, target, riemannian=False) for m in representatives())) > 1e-3


def test_retraction_moves_the_state_along():
    module, batches = multihead(), data(10)
    one, two = (InvariantAttention.from_attention(module) for _ in range(2))
    optimizers = [quotient_adam(m) for m in (one, two)]
    generator = torch.Generator().manual_seed(0)
    manifold = one.manifolds()["qk"]
    direction = manifold.random_tangent(one.points()["qk"], generator=generator)

    def move(attention, optimizer):
        def between(step):
            if step == 4:
                attention.retract_({"qk": horizontal(attention)}, optimizer=optimizer)

        return between

    def horizontal(attention):
        """The same tangent vector of the quotient at this representative."""
        x = attention.points()["qk"]
        dense = manifold.differential(reference_point, direction)
        return manifold.horizontal_lift(x, dense)

    reference_point = one.points()["qk"]
    two.section = "balanced"
    paths = [
        losses_of(m, o, batches, move(m, o)) for m, o in zip((one, two), optimizers, strict=True)
    ]
    assert apart(*paths) < 1e-9
    plain = InvariantAttention.from_attention(module)
    assert apart(losses_of(plain, quotient_adam(plain), batches), paths[0]) > 1e-6


def test_retraction_refuses_and_leaves_everything():
    attention = InvariantAttention(WIDTH, HEADS, dtype=torch.float64)
    optimizer = quotient_adam(attention)
    losses_of(attention, optimizer, data(2))
    before = copy.deepcopy(attention.state_dict())
    A, B = attention.points()["qk"]
    lost = A.clone()
    lost[1, 2] = A[1, 3]
    for steps, message in (
        ({"qk": (lost - A, torch.zeros_like(B))}, "rank-deficient"),
        ({"kv": (A, B)}, "no point called 'kv'"),
        ({"qk": (A[..., 1:], B)}, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.retract_(steps)
    with pytest.raises(TypeError, match="AdamW"):
        attention.retract_({"qk": (0.1 * A, 0 * B)}, optimizer=adamw(attention))
    for name, value in attention.state_dict().items():
        assert torch.equal(value, before[name])
    attention.zero_grad()
    with pytest.raises(ValueError, match="no gradients yet"):
        attention.gradients()
    chart = InvariantAttention(WIDTH, HEADS, parametrization="chart")
    for refused in (chart.gradients, chart.to_section_, lambda: chart.retract_({})):
        with pytest.raises(ValueError, match="the chart holds none"):
            refused()
