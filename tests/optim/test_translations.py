"""Translated biases: optimizers and norms see neither those of keys nor those of values."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.optim.options import PAIR_METRICS
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD

STEPS = 30
SIZE, WIDTH = 100.0, 16


class Layers(nn.Module):
    """Two layers of torch's attention with biases, a norm and a linear layer between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)
        )
        self.norm, self.between = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(x, x, x, need_weights=False)[0]
        x = x + self.between(torch.tanh(self.norm(x)))
        return x + self.second(x, x, x, need_weights=False)[0]


def layers(dtype=torch.float64):
    torch.manual_seed(0)
    model = Layers().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def translated(model, *, size=SIZE, with_groups=False, seed=2):
    """A copy with biases of keys and of values translated, and the element."""
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    generator = torch.Generator().manual_seed(seed)
    drawn = symmetries.random_element(cond=100.0, generator=generator)
    element = {name: size * t for name, t in drawn.items() if name.endswith(".translation")}
    assert len(element) == 4
    if with_groups:
        element |= {s.name: drawn[s.name] for s in symmetries.heads}
    symmetries.act_(element)
    return twin, element


def groups_of(model):
    """Biases in a param group of their own, with another rate and decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.03, "lr": 0.01},
    ]


def inputs(steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        yield torch.randn(4, 6, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model, x):
    return (model(x) - x.roll(1, -1)).square().mean()


def losses(model, make, steps=STEPS):
    """Losses of a run, which leaves the gradients as backward made them."""
    optimizer = make(model)
    found = []
    for x in inputs(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        given = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for gradient, parameter in zip(given, model.parameters(), strict=True):
            assert torch.equal(gradient, parameter.grad)
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def deviation(model, twin, make):
    own, others = (losses(copy.deepcopy(m), make) for m in (model, twin))
    assert own[-1] < own[0]
    return ((own - others) / own).abs().max().item()


def quotient_sgd(model, **options):
    options = {"lr": 0.03, "momentum": 0.9, "nesterov": True} | options
    return QuotientSGD(groups_of(model), symmetries=qo.find_symmetries(model), **options)


def quotient_adam(model, **options):
    options = {"lr": 3e-3, "residual_frame": None} | options
    return qo.QuotientAdam(groups_of(model), symmetries=qo.find_symmetries(model), **options)


SGD_OPTIONS = {
    "nesterov": {},
    "heavy ball": {"nesterov": False},
    "no momentum": {"momentum": 0.0, "nesterov": False},
    "right-invariant": {"metric": "right-invariant", "lr": 0.01},
    "one by one": {"foreach": False},
    "tensor lr": {"lr": torch.tensor(0.03, dtype=torch.float64)},
}
ADAM_OPTIONS = {
    "default": {},
    "one by one": {"foreach": False},
    "tensor lr": {"lr": torch.tensor(3e-3, dtype=torch.float64)},
    "capturable": {"capturable": True},
    "clipped": {"max_grad_norm": 0.1},
    "masters": {"master_weights": True},
    "per matrix": {"row_frame": "per_matrix"},
}


@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_twins_of_gradient_descent(options, with_groups):
    model = layers()
    twin, _ = translated(model, with_groups=with_groups)
    assert deviation(model, twin, lambda m: quotient_sgd(m, **options)) < 1e-10


def test_the_control_sees_translations():
    """torch's SGD, and the pairs without their affine part."""
    model = layers()
    twin, _ = translated(model, size=1.0)

    def linear(m):
        pairs = [symmetry.without_translation() for symmetry in qo.find_symmetries(m).heads]
        return QuotientSGD(groups_of(m), 0.03, 0.9, symmetries=pairs)

    assert not deviation(model, twin, linear) < 1e-4
    assert not deviation(model, twin, lambda m: torch.optim.SGD(groups_of(m), 0.03, 0.9)) < 1e-4
    assert not deviation(model, twin, lambda m: torch.optim.AdamW(groups_of(m), 3e-3)) < 1e-4


@pytest.mark.parametrize("options", ADAM_OPTIONS.values(), ids=ADAM_OPTIONS)
def test_twins_of_adam(options):
    model = layers()
    twin, _ = translated(model, with_groups=True)
    assert deviation(model, twin, lambda m: quotient_adam(m, **options)) < 1e-10


def test_maximizing_decays_the_effective_bias_too():
    """Stronger decay than ascent: without the sign of the coupled decay twins part."""
    model = layers()
    twin, _ = translated(model)

    def make(m):
        optimizer = quotient_sgd(m, maximize=True, lr=1e-4)
        optimizer.param_groups[1]["weight_decay"] = 10.0
        return optimizer

    own, others = (losses(copy.deepcopy(m), make) for m in (model, twin))
    assert ((own - others) / own).abs().max() < 1e-10


@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
def test_closures(make):
    model = layers()
    twin, _ = translated(model)
    found = []
    for own in (model, twin):
        optimizer = make(own)
        values = []
        for x in inputs(STEPS):

            def closure(own=own, x=x, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(own, x)
                loss.backward()
                return loss

            values.append(optimizer.step(closure).item())
        found.append(torch.tensor(values))
    assert ((found[0] - found[1]) / found[0]).abs().max() < 1e-10
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
def test_a_scaler_changes_nothing(make):
    """Scaled, unscaled and clipped invariantly, with one step in the middle that overflows."""
    model = layers()
    twin, _ = translated(model)
    found = []
    for own in (model, twin):
        optimizer, values = make(own), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, x in enumerate(inputs(STEPS)):
            optimizer.zero_grad()
            loss = loss_of(own, x)
            scaler.scale(loss).backward()
            if step == 7:
                own.between.weight.grad.fill_(torch.inf)
            before = [p.detach().clone() for p in own.parameters()]
            scaler.unscale_(optimizer)
            if step != 7:
                norm = qo.invariant_grad_norm(optimizer)
                torch.nn.utils.clip_grads_with_norm_(own.parameters(), 0.5, norm)
            scaler.step(optimizer)
            scaler.update()
            same = [torch.equal(p, b) for p, b in zip(own.parameters(), before, strict=True)]
            assert all(same) == (step == 7)
            values.append(loss.item())
        found.append(torch.tensor(values, dtype=torch.float64))
    assert ((found[0] - found[1]) / found[0]).abs().max() < 1e-10
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("metric", [*PAIR_METRICS, "balanced", "orthonormal", "svd"])
def test_norms_do_not_see_translations(metric):
    model = layers()
    twin, _ = translated(model, with_groups=True)
    norms, linear, plain = [], [], []
    for own in (model, twin):
        for x in inputs(1):
            loss_of(own, x).backward()
        symmetries = qo.find_symmetries(own)
        bare = [symmetry.without_translation() for symmetry in symmetries.heads]
        norms.append(qo.invariant_grad_norm(own, symmetries, metric=metric).item())
        linear.append(qo.invariant_grad_norm(own, bare, metric=metric).item())
        plain.append(torch.nn.utils.get_total_norm([p.grad for p in own.parameters()]).item())
    assert abs(norms[0] / norms[1] - 1) < 1e-10
    assert abs(linear[0] / linear[1] - 1) > 1e-3
    assert abs(plain[0] / plain[1] - 1) > 1e-3


@pytest.mark.parametrize("frame", ["balanced", "orthonormal"])
def test_the_norm_is_the_one_that_adam_clips_by(frame):
    """Read off the first moments, which a limit below the norm scales by their ratio."""
    model, x = layers(), next(inputs(1))
    loss_of(model, x).backward()
    norm = qo.invariant_grad_norm(model, metric=frame).item()
    moments = []
    for limit in (None, norm / 3):
        own = copy.deepcopy(model)
        for p, q in zip(own.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer = quotient_adam(own, head_frame=frame, max_grad_norm=limit)
        optimizer.step()
        moments.append(optimizer.state[own.between.weight]["exp_avg"])
    ratio = moments[1].norm() / moments[0].norm()
    assert abs(3 * ratio * (1 + 1e-6 / norm) - 1) < 1e-10


@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
def test_moving_along_leaves_the_trajectory(make):
    model = layers()
    optimizer = make(model)
    for x in inputs(13):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    twin, moved = copy.deepcopy((model, optimizer))
    _, element = translated(model, with_groups=True)
    moved.symmetries.act_(element)
    moved.move_state_(element)
    own = losses(model, lambda _: optimizer)
    assert ((own - losses(twin, lambda _: moved)) / own).abs().max() < 1e-10


@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
@pytest.mark.parametrize("how", ["frozen", "left out"])
def test_an_output_bias_that_is_not_trained_takes_no_translation(make, how):
    """The state then depends on the gauge: moving it by a translation is refused."""
    model = layers()
    bias = model.first.out_proj.bias
    groups = groups_of(model)
    if how == "frozen":
        bias.requires_grad_(False)
    else:
        groups[1]["params"] = [p for p in groups[1]["params"] if p is not bias]
    symmetries = qo.find_symmetries(model)
    if make is quotient_sgd:
        optimizer = QuotientSGD(groups, 0.03, 0.9, symmetries=symmetries)
    else:
        optimizer = qo.QuotientAdam(groups, 3e-3, residual_frame=None, symmetries=symmetries)
    before = bias.detach().clone()
    for x in inputs(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    assert torch.equal(bias, before)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    _, element = translated(model)
    names = sorted(element)
    refused = [name for name in names if name.startswith("first.vo")]
    assert len(refused) == 1
    with pytest.raises(ValueError, match=r"'first.vo.translation': '.*out_proj.bias'.*not trained"):
        optimizer.move_state_(element)
    after = optimizer.state_dict()["state"]
    for key, own in state.items():
        for entry, value in own.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key][entry]))
    optimizer.move_state_({name: t for name, t in element.items() if name not in refused})


@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
def test_an_output_bias_frozen_in_between_stays(make):
    model = layers()
    optimizer = make(model)
    bias = model.first.out_proj.bias
    for step, x in enumerate(inputs(9)):
        before = bias.detach().clone()
        bias.requires_grad_(not 3 <= step < 6)
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        assert torch.equal(bias, before) == (3 <= step < 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [quotient_sgd, quotient_adam])
def test_narrow_parameters(make, dtype):
    """To what their rounding allows: a translation of size one leaves a few digits."""
    model = layers(dtype)
    twin, _ = translated(model, size=1.0)
    ends = []
    for own in (model, twin):
        optimizer, values = make(own), []
        for x in inputs(10, dtype):
            optimizer.zero_grad()
            loss = loss_of(own, x)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        ends.append(torch.tensor(values))
    bound = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    assert ((ends[0] - ends[1]) / ends[0]).abs().max() < bound
