"""What AdamW and SGD put up with in scripts, QuotientAdam and QuotientSGD do too, or refuse."""

import copy
import warnings

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.optim import polar
from quotientopt.optim.polar import polar_factor, row_polar_factor
from tests.optim.training import batches, loss_of, small_model, train

OPTIMIZERS = {
    "adam": lambda target, **options: qo.QuotientAdam(target, **({"lr": 1e-2} | options)),
    "sgd": lambda target, **options: qo.QuotientSGD(target, **({"lr": 1e-2} | options)),
}


@pytest.fixture(params=sorted(OPTIMIZERS))
def make(request):
    return OPTIMIZERS[request.param]


# ---- tiny numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-10, -12, -14, -16, -18, -20, -24, -40])
def test_polar_factors_of_tiny_updates_are_finite(exponent):
    """In float32 the squares of a Gram matrix's entries underflow from 1e-12 on."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 32, generator=generator)
    scaled = matrix * 10.0**exponent
    for factor in (row_polar_factor(scaled), polar_factor(scaled.mT)[0]):
        assert factor.isfinite().all()
    if exponent > -19:
        assert torch.allclose(row_polar_factor(scaled), row_polar_factor(matrix), rtol=1e-3)


def test_control_of_polar_factors_of_tiny_updates(monkeypatch):
    """Dividing by the Frobenius norm alone, whose squares underflow, makes NaN."""

    def plainly(gram):
        tiny = torch.finfo(gram.dtype).tiny
        return gram.div_(torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny))

    monkeypatch.setattr(polar, "_normalised", plainly)
    matrix = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert row_polar_factor(1e-14 * matrix).isnan().any()


def test_zero_gradients_for_long_leave_finite_weights():
    """Adam's direction decays to next to nothing, and the polar factor is taken of it."""
    model = small_model(dtype=torch.float32, layers=1)
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, 3)
    for _ in range(500):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-24])
def test_tiny_gradients_everywhere_leave_finite_weights(scale):
    model = small_model(dtype=torch.float32, layers=1)
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    for tokens in batches(12):
        optimizer.zero_grad()
        (scale * loss_of(model, tokens)).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_that_overflow_when_squared_are_clipped():
    """Before Adam's square; without a limit to what float32 can square."""
    model = small_model(dtype=torch.float32, layers=1)
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = qo.QuotientAdam(model, lr=1e-2, max_grad_norm=1.0)
    other = qo.QuotientAdam(twin, lr=1e-2, max_grad_norm=1.0)
    for tokens in batches(3):
        for own, mine, scale in ((model, optimizer, 2.0**67), (twin, other, 2.0**20)):
            mine.zero_grad()
            (scale * loss_of(own, tokens)).backward()
            mine.step()
    tokens = next(batches(1, seed=9))
    assert abs(loss_of(model, tokens) - loss_of(twin, tokens)) < 1e-3
    assert abs(loss_of(model, tokens) - loss_of(start, tokens)) > 1e-2
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.isfinite().all() for own in optimizer.state.values() for v in own.values())
    model.head.weight.grad[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"of 'head\.weight' has NaN or inf.*nothing was updated"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_float16_parameters_train():
    """Plain ones too, whose squared gradients and ε are zero in float16."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layer": layer}).half()
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    data = torch.randn(4, 5, 16)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model["layer"](data.half()).float().square().mean()
        loss.backward()
        optimizer.step()
    gain = layer.norm1.weight
    assert optimizer.state[gain]["exp_avg_sq"].dtype == torch.float32
    assert "master" not in optimizer.state[gain]
    assert all(p.isfinite().all() and p.dtype == torch.float16 for p in model.parameters())
    assert not torch.equal(gain, torch.ones_like(gain))


# ---- parameters that change under way -----------------------------------------------------------


def test_replaced_plain_parameters_are_trained(make):
    parameter = nn.Parameter(torch.randn(5, 3))
    optimizer = make([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    new = nn.Parameter(parameter.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    before = new.detach().clone()
    new.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, new)


def test_parameters_moved_to_another_group_take_its_rate():
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = qo.QuotientAdam([{"params": [first], "lr": 1e-1}, {"params": [second], "lr": 1e-3}])
    for p in (first, second):
        p.grad = torch.ones(3)
    optimizer.step()
    groups = optimizer.param_groups
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    before = first.detach().clone()
    optimizer.step()
    assert (before - first).abs().max() < 2e-3


def test_replaced_factors_are_refused_by_name(make):
    model = small_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    name, old = next((n, p) for n, p in model.named_parameters() if "query" in n)
    parameters = optimizer.param_groups[0]["params"]
    place = next(i for i, p in enumerate(parameters) if p is old)
    parameters[place] = nn.Parameter(old.detach().clone())
    parameters[place].grad = old.grad.clone()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name}'.*not in the param groups any more"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_grown_matrix_is_not_trained_in_part():
    model = small_model(dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-2)
    grow = torch.randn(8, 32)
    model.head.weight.data = torch.cat([model.head.weight.data, grow])
    before = model.head.weight.detach().clone()
    train(model, optimizer, 3)
    moved = (model.head.weight - before).abs().amax(1) > 0
    assert moved.all()
    model.head.weight.data = torch.cat([model.head.weight.data, grow])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 40, 32\), expected \(1, 1, 48, 32\)"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("option", [{}, {"master_weights": True}, {"stochastic_rounding": True}])
@pytest.mark.parametrize(("start", "then"), [("float32", "bfloat16"), ("bfloat16", "float64")])
def test_a_model_that_changes_its_dtype_goes_on(start, then, option):
    model = small_model("llama", dtype=getattr(torch, start))
    optimizer = qo.QuotientAdam(model, lr=1e-3, **option)
    train(model, optimizer, 3)
    model.to(getattr(torch, then))
    losses = train(model, optimizer, 3)
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_slices_of_larger_tensors(make):
    """Weights that do not fill their memory, as those in a flat buffer with padding."""
    models = []
    for padded in (False, True):
        model = small_model(dtype=torch.float64)
        if padded:
            attention = model.blocks[0].attention
            for name in ("query", "value"):
                weight = getattr(attention, name).weight
                wide = torch.zeros(weight.size(0), weight.size(1) + 7, dtype=weight.dtype)
                wide[:, : weight.size(1)] = weight.detach()
                getattr(attention, name).weight = nn.Parameter(wide[:, : weight.size(1)])
        train(model, make(model), 4)
        models.append(model)
    assert not models[1].blocks[0].attention.query.weight.is_contiguous()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).norm() < 1e-10 * p.norm()


def test_complex_parameters_beside_real_ones(make):
    generator = torch.Generator().manual_seed(0)
    wave = nn.Parameter(torch.randn(3, dtype=torch.complex64, generator=generator))
    other = nn.Parameter(torch.randn(3, generator=generator))
    optimizer = make([wave, other])
    (wave.abs().square().sum() + other.square().sum()).backward()
    expected = torch.cat([torch.view_as_real(wave.grad).flatten(), other.grad]).norm()
    assert torch.allclose(qo.invariant_grad_norm([wave, other], ()), expected)
    before = wave.detach().clone()
    optimizer.step()
    assert not torch.equal(before, wave)


def test_parameters_without_symmetries_are_warned_of(make):
    """Someone who replaces AdamW(model.parameters()) word by word would get just that."""
    model = small_model(layers=1)
    with pytest.warns(UserWarning, match="knows no symmetries.*pass the model") as caught:
        make(model.parameters())
    assert caught[0].filename.endswith("test_drop_in.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(model)
        make(model.parameters(), symmetries=qo.find_symmetries(model))
        make(model.parameters(), symmetries=())


# ---- options and state of others ----------------------------------------------------------------


@pytest.mark.parametrize("option", ["amsgrad", "fused", "differentiable"])
def test_options_of_torch_are_not_ignored(make, option):
    with pytest.raises(ValueError, match=f"has no {option}; leave it out"):
        make([{"params": [nn.Parameter(torch.zeros(2))], option: True}])
    make([{"params": [nn.Parameter(torch.zeros(2))], option: False, "name": "mine"}])


def test_coupled_weight_decay_is_refused():
    group = {"params": [nn.Parameter(torch.zeros(2))], "decoupled_weight_decay": False}
    with pytest.raises(ValueError, match="always decoupled"):
        qo.QuotientAdam([group])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.Adagrad(p, lr=1e-2), "'sum'"),
    ],
)
def test_state_of_other_optimizers_is_refused(other, message):
    model = small_model()
    foreign = other(model.parameters())
    train(model, foreign, 1)
    optimizer = qo.QuotientAdam(model, lr=1e-2)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, own in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in own.items())


def test_state_dicts_with_impossible_options_change_nothing(make):
    model = small_model()
    optimizer = make(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = "x"
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, 1)


def test_replaced_second_moments_are_honoured():
    model = small_model()
    optimizer = qo.QuotientAdam(model, lr=1e-2)
    train(model, optimizer, 5)
    twin, other = copy.deepcopy((model, optimizer))
    for own in other.state.values():
        own["exp_avg_sq"] = torch.full_like(own["exp_avg_sq"], 1e-2)
    assert not torch.equal(train(model, optimizer, 3), train(twin, other, 3))


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it holds an optimizer and does not hand on its attributes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_wrapped_optimizers_are_looked_into():
    model = small_model()
    optimizer = qo.QuotientAdam(model, lr=1e-2)
    train(model, optimizer, 3)
    wrapper = Wrapper(optimizer)
    assert torch.equal(qo.invariant_grad_norm(wrapper), qo.invariant_grad_norm(optimizer))
    twin, other = copy.deepcopy((model, optimizer))
    qo.dress_(twin, optimizer=Wrapper(other))
    assert not torch.equal(
        twin.blocks[0].attention.query.weight, model.blocks[0].attention.query.weight
    )
    losses = train(model, optimizer, 3, seed=2) - train(twin, other, 3, seed=2)
    assert losses.abs().max() < 1e-10
