"""Gauge twins: from x and from g·x QuotientSGD sees the same losses, torch's SGD does not."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.groups import O
from quotientopt.optim.options import PAIR_METRICS
from quotientopt.optim.sgd.metrics import measure
from quotientopt.optim.sgd.pairs import horizontal_component
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD
from tests.optim.test_sgd_geometry import CASES, invariant_function, pair
from tests.optim.training import (
    batches,
    loss_of,
    random_gains_,
    random_heads_and_rotation,
    small_model,
    train,
    twin_of,
)

STEPS = 30
CONDS = [1.0, 10.0, 100.0, 1000.0]


def attention(seed=0):
    """torch's attention with biases, all of them away from zero."""
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def regress(layer, optimizer, steps=STEPS):
    """Losses of fitting an attention layer to fixed targets."""
    generator = torch.Generator().manual_seed(4)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 6, 16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = (layer(x, x, x)[0] - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


MODELS = {
    "gpt": (lambda: small_model("gpt"), train),
    "llama": (lambda: random_gains_(small_model("llama", key_value_heads=2)), train),
    "attention": (attention, regress),
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)


def quotient_sgd(model, momentum=0.9, **options):
    options = {"lr": 0.03, "nesterov": momentum > 0, "weight_decay": 0.1} | options
    return QuotientSGD(model, momentum=momentum, **options)


def deviation(run, model, twin, make):
    """Largest deviation of the losses, relative to the loss, and how far they fell."""
    first, second = copy.deepcopy(model), copy.deepcopy(twin)
    losses, others = run(first, make(first), STEPS), run(second, make(second), STEPS)
    return ((losses - others).abs() / losses.abs()).max().item(), losses[0] - losses[-1]


@pytest.mark.parametrize("metric", PAIR_METRICS)
@pytest.mark.parametrize("cond", CONDS)
@pytest.mark.parametrize("name", MODELS)
def test_twins_under_the_head_groups(name, cond, metric):
    build, run = MODELS[name]
    model = build()
    twin, element = twin_of(model, cond=cond, only=lambda name: name != "residual")
    assert element
    apart, fall = deviation(run, model, twin, lambda m: quotient_sgd(m, metric=metric))
    assert apart < 1e-12
    assert fall > 0.1
    if cond > 1 and metric == PAIR_METRICS[0]:  # NaN where it diverges
        assert not deviation(run, model, twin, sgd)[0] < 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_twins_without_nesterov(momentum):
    model = small_model("gpt")
    twin, _ = twin_of(model, cond=1000.0, only=lambda name: name != "residual")
    lr = 0.1 if momentum == 0 else 0.03
    apart, fall = deviation(
        train, model, twin, lambda m: quotient_sgd(m, momentum, lr=lr, nesterov=False)
    )
    assert apart < 1e-12
    assert fall > 0.5


@pytest.mark.parametrize("metric", PAIR_METRICS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_twins_under_heads_and_residual_rotations_together(name, metric):
    model = MODELS[name][0]()
    if name == "llama":
        qo.fold_norms_(model)
    twin, element = twin_of(model, cond=100.0)
    assert "residual" in element
    assert deviation(train, model, twin, lambda m: quotient_sgd(m, metric=metric))[0] < 1e-12


@pytest.mark.parametrize("frozen", ["key", "value"])
def test_twins_with_a_frozen_half(frozen):
    model = small_model("gpt")
    for block in model.blocks:
        getattr(block.attention, frozen).weight.requires_grad_(False)
    twin, _ = twin_of(model, cond=100.0, only=lambda name: name != "residual")
    assert deviation(train, model, twin, quotient_sgd)[0] < 1e-12
    assert deviation(train, model, twin, sgd)[0] > 1e-3


@pytest.mark.parametrize(("group", "metric"), CASES, ids=str)
def test_twins_of_hand_made_pairs(group, metric):
    """All groups, partial and interleaved rotary ones too; three heads, each side in two blocks."""
    start = pair((3,))
    # The loss oscillates; right-invariant gradients are relative to factors of size ten.
    lr = 1e-3 if metric == "preconditioned" else 1e-5
    g = group.random(
        (3,), cond=100.0, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def losses(x, make):
        blocks = [
            nn.Parameter(part.clone()) for X in x for part in X.split([4, X.size(-1) - 4], -1)
        ]
        optimizer = make(blocks)
        found = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            A, B = torch.cat(blocks[:2], -1), torch.cat(blocks[2:], -1)
            loss = invariant_function(group, A, B)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    def quotient(blocks):
        symmetry = qo.HeadSymmetry(blocks[:2], blocks[2:], group, name="pair")
        options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "metric": metric}
        return QuotientSGD(blocks, lr, symmetries=[symmetry], **options)

    def euclidean(blocks):
        return torch.optim.SGD(blocks, lr, 0.9, nesterov=True)

    own, twin = losses(start, quotient), losses(group.act(g, start), quotient)
    assert ((own - twin) / own).abs().max() < 1e-12
    assert own[-1] < own[0]
    if not isinstance(group, O):  # O(r) is a symmetry of SGD as well
        plain, other = losses(start, euclidean), losses(group.act(g, start), euclidean)
        assert not ((plain - other) / plain).abs().max() < 1e-3


def test_weight_decay_coupled_to_the_gradient_would_break_it():
    """Why it is decoupled: the control adds λW to the gradient."""
    model = small_model("gpt")
    twin, _ = twin_of(model, cond=10.0, only=lambda name: name != "residual")

    class Coupled(QuotientSGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.add_(parameter.detach(), alpha=0.01)
            return super().step(closure)

    assert deviation(train, model, twin, lambda m: quotient_sgd(m, weight_decay=0.01))[0] < 1e-12
    assert deviation(train, model, twin, lambda m: Coupled(m, 0.03, 0.9))[0] > 1e-4


def vertical_part(model, symmetries, buffers, metric):
    """Norm of the momenta's vertical components relative to the momenta, the largest of all."""
    largest = 0.0
    for symmetry in symmetries.heads:
        factors = [torch.cat(side, -1) for side in (symmetry.left, symmetry.right)]
        vector = [
            torch.cat([block.view(buffers[block.name]) for block in blocks], -1)
            for blocks in (symmetry.left_blocks, symmetry.right_blocks)
        ]
        geometry = measure(symmetry.group, *factors, torch.finfo(torch.float64).eps)
        projected = horizontal_component(metric, geometry, factors, vector)
        for u, p in zip(vector, projected, strict=True):
            largest = max(largest, ((u - p).norm() / u.norm()).item())
    return largest


@pytest.mark.parametrize("metric", PAIR_METRICS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_momentum_stays_horizontal(name, metric):
    """At the point where it was made; at the next one it is not, until it is transported."""
    model = MODELS[name][0]()
    optimizer = quotient_sgd(model, metric=metric)
    train(model, optimizer, 10)
    for tokens in batches(5, seed=2):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        buffers = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
        here = vertical_part(before, qo.find_symmetries(before), buffers, metric)
        assert here < 1e-10
        assert vertical_part(model, optimizer.symmetries, buffers, metric) > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_moving_parameters_and_momentum_leaves_the_trajectory(name):
    build, run = MODELS[name]
    model = build()
    optimizer = quotient_sgd(model)
    run(model, optimizer, 13)
    twin, moved = copy.deepcopy((model, optimizer))
    forgetful = copy.deepcopy((model, optimizer))
    element = random_heads_and_rotation(
        moved.symmetries, cond=1000.0, generator=torch.Generator().manual_seed(3)
    )
    for own in (moved, forgetful[1]):
        own.symmetries.act_(element)
    moved.move_state_(element)
    losses = run(model, optimizer, STEPS)
    assert ((losses - run(twin, moved, STEPS)) / losses).abs().max() < 1e-12
    assert ((losses - run(*forgetful, STEPS)) / losses).abs().max() > 1e-4


def test_moving_refuses_what_does_not_act():
    model = small_model("gpt")
    optimizer = quotient_sgd(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    name = optimizer.symmetries.heads[0].name
    fitting = random_heads_and_rotation(optimizer.symmetries)[name]
    with pytest.raises(ValueError, match="no symmetry called 'nobody'"):
        optimizer.move_state_({name: fitting, "nobody": torch.eye(8)})
    with pytest.raises(ValueError, match="singular"):
        optimizer.move_state_({name: torch.zeros(4, 8, 8)})
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        assert torch.equal(state["momentum_buffer"], after[key]["momentum_buffer"])


@pytest.mark.parametrize("metric", PAIR_METRICS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trajectories_are_those_of_the_manifold(momentum, metric):
    """Head by head with FactorQuotient: gradient, transport, retraction."""
    model = small_model("gpt")
    other = copy.deepcopy(model)
    lr, decay = 0.03, 0.1
    optimizer = quotient_sgd(model, momentum, lr=lr, weight_decay=decay, metric=metric)
    symmetries = qo.find_symmetries(other)
    pairs = [(s, s.left[0], s.right[0]) for s in symmetries.heads]
    manifold = qo.manifolds.FactorQuotient(8, 32, 32, metric=metric, batch_shape=(4,))
    momenta = [(torch.zeros_like(A), torch.zeros_like(B)) for _, A, B in pairs]
    flat = {n: torch.zeros_like(p) for n, p in other.named_parameters() if "attention" not in n}
    for tokens in batches(12):
        for net in (model, other):
            net.zero_grad()
            loss_of(net, tokens).backward()
        with torch.no_grad():
            for i, (symmetry, A, B) in enumerate(pairs):
                partials = tuple(b.view(b.parameter.grad) for b in symmetry.blocks)
                gradient = manifold.gradient((A, B), partials)
                u = manifold.horizontal_component((A, B), momenta[i])
                u = tuple(momentum * v + d for v, d in zip(u, gradient, strict=True))
                momenta[i] = u
                if momentum:
                    gradient = tuple(d + momentum * v for v, d in zip(u, gradient, strict=True))
                step = tuple(-lr * d for d in gradient)
                shrunk = ((1 - lr * decay) * A, (1 - lr * decay) * B)
                for X, new in zip((A, B), manifold.retract(shrunk, step), strict=True):
                    X.copy_(new)
            for n, p in other.named_parameters():
                if n in flat:
                    gradient = p.grad + decay * p
                    flat[n] = momentum * flat[n] + gradient
                    p.sub_(lr * (gradient + momentum * flat[n] if momentum else gradient))
        optimizer.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_stacked_is_one_by_one(name):
    build, run = MODELS[name]
    model = build()
    other = copy.deepcopy(model)
    run(model, quotient_sgd(model), 10)
    run(other, quotient_sgd(other, foreach=False), 10)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-13


@pytest.mark.parametrize("cond", CONDS)
def test_float32_curves_agree_to_plotting_accuracy(cond):
    model = small_model("gpt", dtype=torch.float32)
    twin, _ = twin_of(model, cond=cond, only=lambda name: name != "residual")
    assert deviation(train, model, twin, quotient_sgd)[0] < max(1e-6, 5e-8 * cond)
    if cond > 1:
        assert deviation(train, model, twin, sgd)[0] > 1e-3
