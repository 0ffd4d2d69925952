"""QuotientSGD keeps torch.optim's contracts."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.groups import StructureGroup
from quotientopt.optim import GradientError, RankError
from quotientopt.optim.sgd.quotient_sgd import QuotientSGD
from tests.optim.training import batches, loss_of, small_model, train


def quotient_sgd(model, **options):
    options = {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1} | options
    return QuotientSGD(model, **options)


def save_and_load(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat_parameters(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def snapshot(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def assert_unchanged(model, optimizer, before):
    weights, saved = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    assert now["state"].keys() == saved["state"].keys()
    for index, values in saved["state"].items():
        assert values.keys() == now["state"][index].keys()
        assert all(torch.equal(v, now["state"][index][key]) for key, v in values.items())


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0.0, False, 0.0), (0.0, False, 0.3), (0.9, False, 0.3), (0.8, True, 0.1)],
)
def test_without_symmetries_it_is_sgd(momentum, nesterov, weight_decay, maximize, foreach):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    other = copy.deepcopy(model)
    options = {"lr": 1e-2, "momentum": momentum, "nesterov": nesterov}
    options |= {"weight_decay": weight_decay, "foreach": foreach, "maximize": maximize}
    ours = QuotientSGD(model, **options)
    theirs = torch.optim.SGD(other.parameters(), **options)
    for _ in range(10):
        data = torch.randn(5, 6)
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(data).sin().sum().backward()
            optimizer.step()
    assert torch.equal(flat_parameters(model), flat_parameters(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()
        if momentum:
            assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def test_sparse_gradients():
    """Plain parameters take them as in torch; those of a pair refuse them."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    other = copy.deepcopy(model)
    pairs = [(model, QuotientSGD(model, lr=0.1)), (other, torch.optim.SGD(other.parameters(), 0.1))]
    for net, optimizer in pairs:
        net(torch.tensor([1, 1, 7])).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight, other.weight)
    A, B = nn.Embedding(8, 12, sparse=True), nn.Parameter(torch.randn(8, 12))
    pair = qo.HeadSymmetry([A.weight.view(2, 4, 12)], [B.view(2, 4, 12)], qo.groups.GL(4), "pair")
    optimizer = QuotientSGD([A.weight, B], 0.1, symmetries=[pair])
    (A(torch.arange(3)).sum() + B.sum()).backward()
    before = A.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\].* is sparse"):
        optimizer.step()
    assert torch.equal(A.weight, before)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("metric", ["preconditioned", "right-invariant"])
def test_state_dict_round_trip_continues_bit_for_bit(name, metric):
    model = small_model(name, dtype=torch.float32)
    optimizer = quotient_sgd(model, metric=metric)
    train(model, optimizer, 6)
    other = copy.deepcopy(model)
    restored = QuotientSGD(other, lr=1.0)  # options come from the checkpoint, as in torch
    restored.load_state_dict(save_and_load(optimizer.state_dict()))
    first, second = train(model, optimizer, 6, seed=4), train(other, restored, 6, seed=4)
    assert torch.equal(first, second)
    assert torch.equal(flat_parameters(model), flat_parameters(other))
    fresh = copy.deepcopy(other)
    forgetful = train(fresh, quotient_sgd(fresh, metric=metric), 5, seed=6)
    assert not torch.equal(forgetful, train(other, restored, 5, seed=6))


def test_loading_does_not_tie_two_optimizers_together():
    model = small_model(dtype=torch.float32)
    optimizer = quotient_sgd(model)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    restored = quotient_sgd(other)
    restored.load_state_dict(optimizer.state_dict())
    before = snapshot(model, optimizer)
    train(other, restored, 3)
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike(carry):
    model = small_model(dtype=torch.float32)
    optimizer = quotient_sgd(model)
    train(model, optimizer, 5)
    other, restored = carry((model, optimizer))
    assert torch.equal(train(model, optimizer, 5, seed=4), train(other, restored, 5, seed=4))


def test_state_holds_tensors_only_and_is_filed_under_parameters():
    model = small_model("llama", key_value_heads=2)
    optimizer = quotient_sgd(model)
    train(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    for parameter, state in optimizer.state.items():
        assert state.keys() == {"momentum_buffer"}
        assert state["momentum_buffer"].shape == parameter.shape
    without = quotient_sgd(model, momentum=0.0, nesterov=False)
    train(model, without, 1)
    assert not any(without.state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][3].update(exp_avg=torch.zeros(3)), "has a 'exp_avg'"),
        (
            lambda saved: saved["state"][3].update(momentum_buffer=torch.zeros(3)),
            r"saved momentum of 'blocks\.0\.attention\.key\.weight' has shape \(3,\)",
        ),
        (lambda saved: saved["param_groups"][0].update(dampening=0.5), "dampening"),
        (lambda saved: saved["param_groups"][0].update(metric="flat"), "metric must be"),
    ],
)
def test_state_that_does_not_fit_is_refused(change, message):
    model = small_model(dtype=torch.float32)
    optimizer = quotient_sgd(model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(model, optimizer, before)
    train(model, optimizer, 1)


def test_maximize_is_minimizing_the_negative():
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, opposite = quotient_sgd(model), quotient_sgd(other, maximize=True)
    for tokens in batches(5):
        for net, own, sign in ((model, optimizer, 1), (other, opposite, -1)):
            own.zero_grad()
            (sign * loss_of(net, tokens)).backward()
            own.step()
    assert torch.equal(flat_parameters(model), flat_parameters(other))


def test_closures_and_schedulers():
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, scheduled = quotient_sgd(model), quotient_sgd(other)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(scheduled, 0.05, total_steps=40)
    for step, tokens in enumerate(batches(5)):
        for option in ("lr", "momentum"):
            optimizer.param_groups[0][option] = scheduled.param_groups[0][option]

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        scheduled.zero_grad()
        expected = loss_of(other, tokens)
        expected.backward()
        scheduled.step()
        scheduler.step()
        assert loss.item() == expected.item(), step
    assert 0 < scheduled.param_groups[0]["lr"] < 0.05
    assert scheduled.param_groups[0]["momentum"] < 0.95
    assert torch.equal(flat_parameters(model), flat_parameters(other))


def test_tensor_learning_rate():
    model = small_model()
    other = copy.deepcopy(model)
    first = train(model, quotient_sgd(model, lr=0.03), 5)
    second = train(other, quotient_sgd(other, lr=torch.tensor(0.03, dtype=torch.float64)), 5)
    assert (first - second).abs().max() < 1e-12


def test_zero_lr_and_zero_gradients_change_nothing():
    model = small_model()
    optimizer = quotient_sgd(model, lr=0.0)
    before = flat_parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(before, flat_parameters(model))
    train(model, optimizer, 2)
    assert torch.equal(before, flat_parameters(model))


def test_grad_scaler():
    model = small_model(dtype=torch.float32)
    other = copy.deepcopy(model)
    optimizer, plain = quotient_sgd(model), quotient_sgd(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for i, tokens in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, tokens)).backward()
        if i == 3:  # an overflow: the scaler skips the step
            model.head.weight.grad[0, 0] = float("inf")
            before = flat_parameters(model)
        scaler.step(optimizer)
        scaler.update()
        if i == 3:
            assert torch.equal(before, flat_parameters(model))
            assert scaler.get_scale() == 2.0**9
            continue
        plain.zero_grad()
        loss_of(other, tokens).backward()
        plain.step()
    # Powers of two only shift exponents.
    assert torch.equal(flat_parameters(model), flat_parameters(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.attention.key.weight", "norm.weight"])
def test_nonfinite_gradients_are_refused(name, value):
    model = small_model("llama")
    optimizer = quotient_sgd(model)
    train(model, optimizer, 3)
    model.get_parameter(name).grad.view(-1)[5] = value
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=name.replace(".", r"\.") + "' has NaN or infinite"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    assert torch.isfinite(train(model, optimizer, 3)).all()


def test_huge_gradients_are_refused_only_where_they_overflow():
    model = small_model(dtype=torch.float32)
    optimizer = quotient_sgd(model, lr=1e-30, momentum=0.0, nesterov=False)
    loss_of(model, next(batches(1))).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1e25)
    before = flat_parameters(model)
    optimizer.step()
    assert not torch.equal(before, flat_parameters(model))
    with torch.no_grad():
        model.blocks[0].attention.query.weight.mul_(1e-10)
    state = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"blocks\.0\.attention\.qk.*overflows"):
        optimizer.step()
    assert_unchanged(model, optimizer, state)


@pytest.mark.parametrize("metric", ["preconditioned", "right-invariant"])
def test_a_rank_deficient_factor_takes_steps_of_sgd(metric):
    model = small_model()
    optimizer = quotient_sgd(model, metric=metric)
    train(model, optimizer, 2)
    with torch.no_grad():
        model.blocks[1].attention.output.weight[:, 8:16] = 0
    with torch.no_grad():
        model.blocks[1].attention.output.weight[3, 8] = float("inf")
    before = snapshot(model, optimizer)
    match = r"blocks\.1\.attention\.vo'.* left factor of head 1 is not finite"
    with pytest.raises(RankError, match=match):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    with torch.no_grad():
        model.blocks[1].attention.output.weight[3, 8] = 0
    # Both blocks of that head as torch's SGD, all others as without it.
    twin, other = copy.deepcopy((model, optimizer))
    plain = torch.optim.SGD(
        [model.blocks[1].attention.value.weight, model.blocks[1].attention.output.weight],
        lr=0.03,
        momentum=0.9,
        nesterov=True,
    )
    for parameter in plain.param_groups[0]["params"]:
        plain.state[parameter]["momentum_buffer"] = optimizer.state[parameter][
            "momentum_buffer"
        ].clone()
        parameter.data.mul_(1 - 0.03 * optimizer.param_groups[0]["weight_decay"])
    plain.step()
    twin_attention, attention = twin.blocks[1].attention, model.blocks[1].attention
    for p in (attention.value.weight, attention.output.weight):
        p.grad = p.grad.clone()
    for own, mine in zip(twin.parameters(), model.parameters(), strict=True):
        own.grad = mine.grad
    other.step()
    rows, rest = slice(8, 16), slice(16, 32)
    for own, mine in (
        (twin_attention.value.weight, attention.value.weight),
        (twin_attention.output.weight.mT, attention.output.weight.mT),
    ):
        assert torch.allclose(own[rows], mine[rows], rtol=0, atol=1e-13)
        assert not torch.allclose(own[rest], mine[rest], atol=1e-5)


def test_low_precision_parameters_keep_float32_state():
    model = small_model(dtype=torch.bfloat16)
    optimizer = quotient_sgd(model)
    losses = train(model, optimizer, 40)
    assert losses[-5:].mean() < losses[:5].mean() - 0.5
    weight = model.blocks[0].attention.query.weight
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    other = copy.deepcopy(model)
    restored = quotient_sgd(other)
    restored.load_state_dict(save_and_load(optimizer.state_dict()))
    restored_weight = other.blocks[0].attention.query.weight
    assert restored.state[restored_weight]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(train(model, optimizer, 12), train(other, restored, 12))


def test_momentum_laid_out_otherwise_is_taken_over():
    """Blocks are views by strides; a transposed buffer must not be written to in a copy."""
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, moved = quotient_sgd(model), quotient_sgd(other)
    train(model, optimizer, 2)
    train(other, moved, 2)
    for state in moved.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].mT.contiguous().mT
    assert torch.equal(train(model, optimizer, 4), train(other, moved, 4))


def test_parameters_without_gradients_stay_and_rejoin():
    model = small_model()
    optimizer = quotient_sgd(model)
    query, key = (getattr(model.blocks[0].attention, name).weight for name in ("query", "key"))
    for step, tokens in enumerate(batches(8)):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        idle, other = query.detach().clone(), key.detach().clone()
        if 2 <= step < 5:
            query.grad = None
            momentum = optimizer.state[query]["momentum_buffer"].clone()
        optimizer.step()
        assert torch.equal(idle, query) == (2 <= step < 5)
        assert not torch.equal(other, key)
        if 2 <= step < 5:
            assert torch.equal(momentum, optimizer.state[query]["momentum_buffer"])


def test_a_frozen_half_serves_as_geometry():
    """The step of the other half is S⁻¹∂, with no projection."""
    model = small_model()
    frozen, query = model.blocks[0].attention.key.weight, model.blocks[0].attention.query.weight
    frozen.requires_grad_(False)
    before, start = frozen.detach().clone(), query.detach().clone()
    optimizer = QuotientSGD(model, lr=0.1)
    train(model, optimizer, 1)
    B = before.unflatten(0, (4, 8))
    expected = torch.linalg.solve(B @ B.mT, query.grad.unflatten(0, (4, 8)))
    assert (start - query - 0.1 * expected.flatten(0, 1)).abs().max() < 1e-12
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(model, optimizer, 2)
    assert not torch.equal(frozen, before)


def attention_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def test_biases_may_sit_in_another_group():
    """With lr and weight decay of their own; what belongs to the pair must agree."""
    layer = attention_layer()
    symmetries = qo.find_symmetries(layer)
    weights = [p for p in layer.parameters() if p.ndim == 2]
    biases = [p for p in layer.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 1e-3}]
    optimizer = QuotientSGD(groups, lr=1e-2, momentum=0.9, symmetries=symmetries)
    layer(torch.randn(3, 5, 16)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.self_attn.in_proj_bias]["momentum_buffer"].any()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    still = QuotientSGD(groups, lr=1e-2, symmetries=symmetries)
    weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
    before = weight.detach().clone(), bias.detach().clone()
    still.step()
    assert torch.allclose(weight, before[0] * (1 - 1e-2 * 0.5))
    assert torch.equal(bias, before[1])
    optimizer.param_groups[1]["momentum"] = 0.5
    match = r"momentum is 0\.9 for 'self_attn\.in_proj_weight' and 0\.5 for"
    with pytest.raises(ValueError, match=match):
        optimizer.step()


def test_a_split_pair_is_refused_and_names_both():
    model = small_model()
    query = model.blocks[0].attention.query.weight
    rest = [p for p in model.parameters() if p is not query]
    with pytest.raises(ValueError, match="split") as error:
        QuotientSGD(
            [{"params": [query]}, {"params": rest}], 0.1, symmetries=qo.find_symmetries(model)
        )
    for name in ("attention.query.weight", "attention.key.weight", "blocks.0.attention.qk"):
        assert name in str(error.value)


def test_added_groups_join_and_splits_are_refused():
    model = small_model()
    symmetries = qo.find_symmetries(model)
    own = {id(p) for p in model.blocks[1].parameters()}
    optimizer = QuotientSGD(
        [p for p in model.parameters() if id(p) not in own], 0.03, 0.9, symmetries=symmetries
    )
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": [model.blocks[1].attention.query.weight]})
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="split over param groups"):
        optimizer.add_param_group({"params": [model.blocks[1].attention.key.weight]})
    with pytest.raises(ValueError, match="metric must be"):
        optimizer.add_param_group({"params": [model.blocks[1].mlp.up.weight], "metric": "l2"})
    assert_unchanged(model, optimizer, before)
    del optimizer.param_groups[1:]
    optimizer.add_param_group({"params": list(model.blocks[1].parameters()), "lr": 1e-4})
    train(model, optimizer, 2)
    assert optimizer.state[model.blocks[1].attention.key.weight]["momentum_buffer"].any()


def test_what_symmetries_leave_uncovered_is_sgd():
    """nn.MultiheadAttention with a narrow key: only the value-output pair is claimed."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 2, kdim=4, vdim=32, batch_first=True)
    other = copy.deepcopy(layer)
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    optimizer = QuotientSGD(layer, **options)
    assert [s.name for s in optimizer.symmetries.heads] == ["vo"]
    plain = torch.optim.SGD(other.parameters(), **options)
    for _ in range(3):
        query, key, value = torch.randn(2, 5, 32), torch.randn(2, 5, 4), torch.randn(2, 5, 32)
        with torch.no_grad():
            for p, q in zip(layer.parameters(), other.parameters(), strict=True):
                q.copy_(p)
        for net, own in ((layer, optimizer), (other, plain)):
            own.zero_grad()
            net(query, key, value)[0].square().sum().backward()
            own.step()
    assert torch.allclose(layer.in_proj_bias[:64], other.in_proj_bias[:64], atol=1e-7)
    assert torch.equal(layer.k_proj_weight, other.k_proj_weight)
    assert not torch.allclose(layer.in_proj_bias[64:], other.in_proj_bias[64:], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number that is not negative"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": "1e-3"}, "lr must be a finite number"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ({"momentum": -0.1}, "momentum must be a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"metric": "euclidean"}, "metric must be 'preconditioned' or 'right-invariant'"),
        ({"nesterov": 1}, "nesterov must be True or False"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True needs a momentum above zero"),
        ({"maximize": "yes"}, "maximize must be True or False"),
        ({"foreach": "no"}, "foreach must be True, False or None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        quotient_sgd(small_model(), **options)


def test_symmetries_of_another_model_are_refused():
    with pytest.raises(ValueError, match="none of its parameters"):
        QuotientSGD(small_model().parameters(), 0.1, symmetries=qo.find_symmetries(small_model()))


def test_groups_and_metrics_without_a_projection_are_refused():
    A, B = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(2, 4, 6))
    pair = qo.HeadSymmetry([A], [B], qo.groups.O(4), name="pair")
    QuotientSGD([A, B], 0.1, symmetries=[pair])
    with pytest.raises(ValueError, match=r"'pair': under O\(r\) the right-invariant metric"):
        QuotientSGD([A, B], 0.1, symmetries=[pair], metric="right-invariant")

    class Other(StructureGroup):
        dim = 0
        random = algebra_projection = check_element = None

    odd = qo.HeadSymmetry([A], [B], Other(4), name="odd")
    with pytest.raises(ValueError, match="'odd': no invariant metric is known"):
        QuotientSGD([A, B], 0.1, symmetries=[odd])
