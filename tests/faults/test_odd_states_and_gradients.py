"""What an optimizer is given in training: gradients of any size, states and shapes by others."""

import copy

import pytest
import torch

import quotientopt as qo
from tests.optim import low_rank_cases as pairs
from tests.optim.training import batches, loss_of, small_model, train

OPTIMIZERS = {
    "adam": lambda model: qo.QuotientAdam(model, lr=2e-3),
    "sgd": lambda model: qo.QuotientSGD(model, lr=0.03, momentum=0.9),
}


def train_scaled(model, optimizer, scale, steps=20):
    losses = []
    for tokens in batches(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_huge_gradients_train(name, size):
    """In float32 their squares, or the sums of them, overflow."""
    model = small_model(name, dtype=torch.float32)
    loss_of(model, next(iter(batches(1)))).backward()
    scale = size / max(p.grad.abs().max().item() for p in model.parameters())
    model.zero_grad()
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS["adam"](model)
    losses = train_scaled(model, optimizer, scale)
    usual = train_scaled(twin, OPTIMIZERS["adam"](twin), 1.0)
    print(losses[-5:].mean(), usual[-5:].mean())
    assert losses[-5:].mean() < usual[-5:].mean() + 0.2 < usual[0] - 0.5
    assert all(v.isfinite().all() for own in optimizer.state.values() for v in own.values())
    # Where AdamW trains at all.
    plain = torch.optim.AdamW(third.parameters(), lr=8e-3)
    others = train_scaled(third, plain, scale)
    assert (others[-5:].mean() < others[0] - 0.5) == (size < 1e30)


def test_one_huge_gradient_in_training():
    model = small_model(dtype=torch.float32)
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_scaled(model, optimizer, 1e21, 1)
    moved = max((p.detach() - before[name]).abs().max() for name, p in model.named_parameters())
    assert 1e-3 < moved < 0.1
    assert train(model, optimizer, 5).isfinite().all()


def test_huge_gradients_of_low_rank_pairs():
    model = pairs.Adapted(dtype=torch.float32, start="random")
    optimizer = qo.QuotientAdam(model, lr=3e-3, symmetries=pairs.symmetries_of(model))

    def scaled(own):
        for parameter in own.parameters():
            parameter.grad.mul_(1e20)

    losses = pairs.train(model, optimizer, 60, after=scaled)
    assert losses[-10:].mean() < losses[:10].mean()
    assert all(v.isfinite().all() for own in optimizer.state.values() for v in own.values())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_that_are_not_finite_are_named(make, value):
    model = small_model(dtype=torch.float32)
    optimizer = make(model)
    train(model, optimizer, 2)
    for parameter in model.parameters():
        parameter.grad.fill_(1e20)
    model.head.weight.grad[3, 4] = float(value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient of 'head\.weight' has NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_factors_that_are_not_finite_are_named(make):
    model = small_model()
    optimizer = make(model)
    train(model, optimizer, 9)
    with torch.no_grad():
        model.blocks[1].attention.value.weight[3, 0] = float("inf")
    assert_refused(model, optimizer, r"blocks\.1\.attention\.vo.*right factor of head 0 is not fin")


def test_low_rank_factors_that_are_not_finite_are_named():
    model = pairs.Adapted(start="random")
    optimizer = qo.QuotientAdam(model, lr=3e-3, symmetries=pairs.symmetries_of(model))
    pairs.train(model, optimizer, 33)
    with torch.no_grad():
        model.lora_A[1][0, 0] = float("inf")
    assert_refused(model, optimizer, r"layers\.1\.lora.*right factor is not finite.*a checkpoint")


def gradients_of_ones(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def assert_refused(model, optimizer, match):
    gradients_of_ones(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=match) as refusal:
        optimizer.step()
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


NAMES = {
    "blocks.0.attention.query.weight": "find the model's symmetries again",
    "blocks.1.attention.output.weight": "find the model's symmetries again",
    "blocks.0.mlp.up.weight": "shape",
    "head.weight": "shape",
    "norm.weight": "shape",
}


@pytest.mark.parametrize("cut", ["rows", "columns", "copied"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_parameter_that_shrinks_is_named(make, name, cut):
    model = small_model("llama")
    optimizer = make(model)
    train(model, optimizer, 2)
    parameter = dict(model.named_parameters())[name]
    part = parameter.data[..., :8] if cut == "columns" else parameter.data[:8]
    parameter.data = part.clone() if cut == "copied" else part
    assert_refused(model, optimizer, f"{name}.*{NAMES[name]}")


def test_symmetries_do_not_act_on_what_was_cut_away():
    """The rows are still in memory, behind the parameter's end."""
    model = small_model()
    symmetries = qo.find_symmetries(model)
    query = model.blocks[0].attention.query.weight
    whole = query.data
    query.data = whole[:8]
    before = whole.clone()
    with pytest.raises(ValueError, match="find the model's symmetries again"):
        symmetries.act_(symmetries.random_element())
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("step", "7", "is '7', expected a number"),
        ("step", torch.tensor(float("nan")), "has NaN"),
        ("step", torch.tensor(-1.0), "has negative"),
        ("step", torch.ones(3), ".*expected one number"),
        ("exp_avg", "none", "is 'none', expected a number or a tensor"),
        ("exp_avg_sq", torch.zeros(2), r"has shape \(2,\), expected \(32,\)"),
        ("exp_avg_sq", None, "is missing"),
    ],
)
def test_state_put_in_by_hand_is_named(key, value, match):
    model = small_model("llama")
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 2)
    own = optimizer.state[model.norm.weight]
    kept = own.pop(key)
    if value is not None:
        own[key] = value
    if isinstance(value, torch.Tensor) and key == "step":
        # Looked at when it is loaded: between steps the host would have to read it.
        with pytest.raises(ValueError, match=f"'step' of 'norm.weight' {match}"):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        assert_refused(model, optimizer, f"'{key}' of 'norm.weight' {match}")
    own[key] = kept
    train(model, optimizer, 1)


def test_a_count_may_be_a_number():
    model = small_model("llama")
    optimizer = OPTIMIZERS["adam"](model)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own["step"] = float(own["step"])
    other.load_state_dict(state)
    assert torch.equal(train(model, optimizer, 3, 2), train(twin, other, 3, 2))
