"""QuotientAdam keeps torch.optim's contracts."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import quotientopt as qo
from tests.optim.training import batches, loss_of, small_model, train


def quotient_adam(model, **options):
    return qo.QuotientAdam(model, **({"lr": 3e-3, "weight_decay": 0.1} | options))


def save_and_load(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat_parameters(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def snapshot(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def assert_unchanged(model, optimizer, before):
    weights, state = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    for index, values in state.items():
        assert values.keys() == now[index].keys()
        assert all(torch.equal(value, now[index][key]) for key, value in values.items())


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared", None])
def test_state_dict_round_trip_continues_bit_for_bit(name, residual_frame):
    model = small_model(name, dtype=torch.float32)
    optimizer = quotient_adam(model, residual_frame=residual_frame, nesterov=True)
    train(model, optimizer, 14)
    other = copy.deepcopy(model)
    restored = quotient_adam(other)  # options come from the checkpoint, as in torch
    restored.load_state_dict(save_and_load(optimizer.state_dict()))
    first, second = train(model, optimizer, 14, seed=4), train(other, restored, 14, seed=4)
    assert torch.equal(first, second)
    assert torch.equal(flat_parameters(model), flat_parameters(other))
    fresh = copy.deepcopy(other)
    forgetful = train(fresh, quotient_adam(fresh), 5, seed=6)
    assert not torch.equal(forgetful, train(other, restored, 5, seed=6))


def test_loading_does_not_tie_two_optimizers_together():
    model = small_model(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    restored = quotient_adam(other)
    restored.load_state_dict(optimizer.state_dict())
    before = snapshot(model, optimizer)
    train(other, restored, 3)
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike(carry):
    model = small_model(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 7)
    other, restored = carry((model, optimizer))
    assert torch.equal(train(model, optimizer, 7, seed=4), train(other, restored, 7, seed=4))


@pytest.mark.parametrize(
    ("row_frame", "heads", "rows"), [("per_head", 4, 8), ("per_matrix", 1, 32)]
)
def test_state_holds_tensors_only_and_is_filed_under_parameters(row_frame, heads, rows):
    model = small_model("llama", key_value_heads=4)
    optimizer = quotient_adam(model, row_frame=row_frame)
    train(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    for state in optimizer.state.values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    query = optimizer.state[model.blocks[0].attention.query.weight]
    assert query["exp_avg"].shape == (1, heads, rows, 32)
    assert query["head_frame"].shape == (heads, rows, rows)
    assert query["residual_frame"].shape == (32, 32)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_symmetries_it_is_adamw(foreach, maximize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    other = copy.deepcopy(model)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
    options |= {"foreach": foreach, "maximize": maximize}
    pairs = [
        (model, qo.QuotientAdam(model, nesterov=True, **options)),
        (other, torch.optim.AdamW(other.parameters(), **options)),
    ]
    for _ in range(10):
        data = torch.randn(5, 6)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            net(data).square().sum().backward()
            optimizer.step()
    assert torch.equal(flat_parameters(model), flat_parameters(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        ours, theirs = pairs[0][1].state[p], pairs[1][1].state[q]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_maximize_is_minimizing_the_negative():
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, opposite = quotient_adam(model), quotient_adam(other, maximize=True)
    for tokens in batches(12):
        for net, own, sign in ((model, optimizer, 1), (other, opposite, -1)):
            own.zero_grad()
            (sign * loss_of(net, tokens)).backward()
            own.step()
    assert torch.equal(flat_parameters(model), flat_parameters(other))


def test_closures_and_schedulers():
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, scheduled = quotient_adam(model), quotient_adam(other)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(scheduled, 20)
    for step, tokens in enumerate(batches(5)):
        optimizer.param_groups[0]["lr"] = scheduled.param_groups[0]["lr"]

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
    assert scheduled.param_groups[0]["lr"] < 3e-3
    assert torch.equal(flat_parameters(model), flat_parameters(other))


def test_tensor_learning_rate():
    model = small_model()
    other = copy.deepcopy(model)
    first = train(model, quotient_adam(model, lr=3e-3), 5)
    second = train(other, quotient_adam(other, lr=torch.tensor(3e-3, dtype=torch.float64)), 5)
    assert (first - second).abs().max() < 1e-12


def test_zero_lr_and_zero_gradients_change_nothing():
    model = small_model()
    optimizer = quotient_adam(model, lr=0.0)
    before = flat_parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(11):
        optimizer.step()
    assert torch.equal(before, flat_parameters(model))
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert all(value.isfinite().all() for value in state)


def test_grad_scaler():
    model = small_model(dtype=torch.float32)
    other = copy.deepcopy(model)
    optimizer, plain = quotient_adam(model), quotient_adam(other)
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
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    model.get_parameter(name).grad.view(-1)[5] = value
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    assert torch.isfinite(train(model, optimizer, 3)).all()


@pytest.mark.parametrize("scale", [1e12, 1e-15, 1e-20])
def test_huge_and_tiny_gradients_are_no_obstacle(scale):
    model = small_model(dtype=torch.float32)
    before = loss_of(model, next(batches(1))).item()
    optimizer = quotient_adam(model)
    for tokens in batches(30):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        optimizer.step()
    after = loss_of(model, next(batches(1))).item()
    assert after < before - 0.5 if scale > 1 else after < before + 1e-3


def test_low_precision_parameters_keep_float32_state():
    model = small_model(dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    optimizer = quotient_adam(model, lr=1e-2)
    losses = train(model, optimizer, 40)
    assert losses[-5:].mean() < losses[:5].mean() - 0.5
    weight = model.blocks[0].attention.query.weight
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    other = copy.deepcopy(model)
    restored = quotient_adam(other, lr=1e-2)
    restored.load_state_dict(save_and_load(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, 12), train(other, restored, 12))


def test_parameters_without_gradients_stay_and_rejoin():
    model = small_model()
    other = copy.deepcopy(model)
    optimizer, batched = quotient_adam(model), quotient_adam(other, foreach=False)
    for step, tokens in enumerate(batches(14)):
        for net, own in ((model, optimizer), (other, batched)):
            own.zero_grad()
            loss_of(net, tokens).backward()
            if step < 6:
                net.blocks[0].attention.query.weight.grad = None
                net.blocks[1].mlp.up.weight.grad = None
        idle = model.blocks[0].attention.query.weight.detach().clone()
        optimizer.step()
        batched.step()
        assert torch.equal(idle, model.blocks[0].attention.query.weight) == (step < 6)
    assert (flat_parameters(model) - flat_parameters(other)).abs().max() < 1e-9
    steps = {optimizer.state[p]["step"].item() for p in model.parameters()}
    assert steps == {8.0, 14.0}


def test_a_frozen_half_serves_as_geometry():
    model = small_model()
    frozen = model.blocks[0].attention.key.weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = quotient_adam(model)
    losses = train(model, optimizer, 12)
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(model, optimizer, 2)
    assert not torch.equal(frozen, before)
    assert losses[-1] < losses[0]


def test_param_groups():
    """Biases may sit in a group without weight decay, each group with its own hyperparameters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    symmetries = qo.find_symmetries(layer)
    groups = [
        {"params": [p for p in layer.parameters() if p.ndim == 2], "weight_decay": 0.5},
        {"params": [p for p in layer.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = qo.QuotientAdam(groups, lr=1e-2, symmetries=symmetries)
    data = torch.randn(3, 5, 16)
    for _ in range(3):
        optimizer.zero_grad()
        layer(data).square().mean().backward()
        optimizer.step()
    in_proj = optimizer.state[layer.self_attn.in_proj_weight]
    assert {"exp_avg.0", "exp_avg.1", "exp_avg.2"} <= set(in_proj)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    still = qo.QuotientAdam(groups, lr=1e-2, symmetries=symmetries)
    weight, bias = layer.linear1.weight.detach().clone(), layer.linear1.bias.detach().clone()
    still.step()
    assert torch.allclose(layer.linear1.weight, weight * (1 - 4 * 1e-2 * 0.5))
    assert torch.equal(layer.linear1.bias, bias)


def test_added_groups_join_and_splits_are_refused():
    model = small_model()
    symmetries = qo.find_symmetries(model)
    own = {id(p) for p in model.blocks[1].parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    optimizer = qo.QuotientAdam(rest, symmetries=symmetries)
    train(model, optimizer, 2)
    state = optimizer.state[model.head.weight]["exp_avg"].clone()
    optimizer.add_param_group({"params": [model.blocks[1].attention.query.weight]})
    with pytest.raises(ValueError, match="split over param groups"):
        optimizer.add_param_group({"params": [model.blocks[1].attention.key.weight]})
    assert torch.equal(state, optimizer.state[model.head.weight]["exp_avg"])
    del optimizer.param_groups[1:]
    optimizer.add_param_group({"params": list(model.blocks[1].parameters()), "lr": 1e-4})
    train(model, optimizer, 2)
    assert "head_frame" in optimizer.state[model.blocks[1].attention.query.weight]
    assert optimizer.state[model.head.weight]["step"] == 4


def test_a_split_pair_is_refused_and_names_both():
    model = small_model()
    query = model.blocks[0].attention.query.weight
    rest = [p for p in model.parameters() if p is not query]
    with pytest.raises(ValueError, match="split") as error:
        qo.QuotientAdam(
            [{"params": [query]}, {"params": rest}], symmetries=qo.find_symmetries(model)
        )
    for name in ("attention.query.weight", "attention.key.weight", "blocks.0.attention.qk"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_frame": "polar"}, "head_frame must be 'balanced', 'orthonormal', 'svd' or None"),
        ({"residual_frame": "layer"}, "residual_frame must be 'per_matrix', 'shared' or None"),
        ({"lr": -1.0}, "lr must be a finite number that is not negative"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": "1e-3"}, "lr must be a finite number"),
        ({"lr": torch.tensor(1e-3), "foreach": True}, "a tensor lr needs foreach"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"refresh_every": True}, "refresh_every must be a positive integer"),
        ({"foreach": "no"}, "foreach must be True, False or None"),
        ({"nesterov": 1}, "nesterov must be True or False"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"refresh_every": 0}, "refresh_every must be a positive integer"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        quotient_adam(small_model(), **options)


@pytest.mark.parametrize("head_frame", ["balanced", "orthonormal", "svd"])
def test_a_pair_of_rank_deficient_factors_does_not_stop_the_others(head_frame):
    model = small_model()
    with torch.no_grad():
        model.blocks[1].attention.output.weight.zero_()
        model.blocks[1].attention.value.weight[:8] = 0
    before = model.blocks[0].attention.query.weight.detach().clone()
    losses = train(model, quotient_adam(model, head_frame=head_frame), 20)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert not torch.equal(before, model.blocks[0].attention.query.weight)
    # What is not finite is no start for anything.
    with torch.no_grad():
        model.blocks[1].attention.value.weight[3, 2] = float("inf")
    optimizer = quotient_adam(model, head_frame=head_frame)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = flat_parameters(model)
    match = r"blocks\.1\.attention\.vo'.* right factor of head 0 is not finite.*value\.weight"
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert torch.equal(before, flat_parameters(model))


def test_what_symmetries_leave_uncovered_is_adamw():
    """nn.MultiheadAttention with a narrow key: only the value-output pair is claimed."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 2, kdim=4, vdim=32, batch_first=True)
    other = copy.deepcopy(layer)
    optimizer = qo.QuotientAdam(layer, lr=1e-2)
    assert [s.name for s in optimizer.symmetries.heads] == ["vo"]
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2)
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


def test_rest_that_is_not_whole_rows_is_refused():
    weight, other = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 4, 8))
    partly = qo.HeadSymmetry([weight[:, :, ::2]], [other], qo.groups.GL(4), name="pair")
    kept = qo.HeadSymmetry([weight[1:]], [other[1:]], qo.groups.GL(4), name="pair")
    qo.QuotientAdam([weight, other], symmetries=[kept])
    corner = qo.HeadSymmetry([weight[:2, :, :4]], [other[:2]], qo.groups.GL(4), name="pair")
    qo.QuotientAdam([weight, other], symmetries=[partly])
    with pytest.raises(ValueError, match="covered only partly"):
        qo.QuotientAdam([weight, other], symmetries=[corner])
    twice = qo.HeadSymmetry([weight], [weight], qo.groups.GL(4), name="pair")
    with pytest.raises(ValueError, match="covered more than once"):
        qo.QuotientAdam([weight, other], symmetries=[twice])


def test_symmetries_of_another_model_are_refused():
    with pytest.raises(ValueError, match="none of its parameters"):
        qo.QuotientAdam(
            list(small_model().parameters()), symmetries=qo.find_symmetries(small_model())
        )


@pytest.mark.parametrize("residual_frame", ["per_matrix", "shared"])
def test_freezing_and_thawing_keeps_frames_and_moments(residual_frame):
    """A parameter that files the frames of others is frozen, and comes back."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = quotient_adam(model, residual_frame=residual_frame, lr=1e-2)
    train(model, optimizer, 12)
    frozen = [model.embedding.weight, model.blocks[0].attention.query.weight]
    sizes = []
    for step, tokens in enumerate(batches(12, seed=5)):
        if step in (2, 6):
            for parameter in frozen:
                parameter.requires_grad_(step == 6)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        sizes.append({n: (p - before[n]).abs().mean().item() for n, p in model.named_parameters()})
    for name in before:
        thawed = name in ("embedding.weight", "blocks.0.attention.query.weight")
        own = [s[name] for i, s in enumerate(sizes) if not (thawed and 2 <= i < 6)]
        assert max(own) < 3 * min(own), name
        if thawed:
            assert all(s[name] == 0 for s in sizes[2:6])


def test_frozen_bias_owner():
    """Weight and bias of a side share frames; freezing the weight keeps the bias going."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    optimizer = qo.QuotientAdam(layer, lr=1e-2)

    def step():
        optimizer.zero_grad()
        layer(torch.randn(3, 5, 16)).pow(3).mean().backward()
        before = layer.self_attn.in_proj_bias.detach().clone()
        optimizer.step()
        return (layer.self_attn.in_proj_bias - before).abs().mean().item()

    step()  # Adam's first step is as large as any.
    sizes = [step() for _ in range(4)]
    layer.self_attn.in_proj_weight.requires_grad_(False)
    sizes += [step() for _ in range(4)]
    assert max(sizes) < 4 * min(sizes)


def test_cleared_and_replaced_state_is_honoured():
    model = small_model()
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    optimizer.state.clear()
    other = copy.deepcopy(model)
    assert torch.equal(
        train(model, optimizer, 3, seed=4), train(other, quotient_adam(other), 3, seed=4)
    )
    assert optimizer.state[model.head.weight]["step"] == 3
    zeroed = copy.deepcopy(optimizer.state[model.head.weight]["exp_avg"]) * 0
    optimizer.state[model.head.weight]["exp_avg"] = zeroed
    train(model, optimizer, 1, seed=9)
    assert optimizer.state[model.head.weight]["exp_avg"].abs().max() > 0
    model.double()
    train(model, optimizer, 1)


def test_dtype_change_between_steps():
    model = small_model(dtype=torch.float32)
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    model.double()
    assert torch.isfinite(train(model, optimizer, 3)).all()
    state = optimizer.state[model.head.weight]
    assert state["exp_avg"].dtype == torch.float64
    assert state["step"] == 6


def test_loading_what_does_not_fit_changes_nothing():
    model = small_model()
    optimizer = quotient_adam(model)
    train(model, optimizer, 3)
    before = snapshot(model, optimizer)
    stranger = torch.optim.AdamW(model.parameters())
    train(copy.deepcopy(model), stranger, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stranger.step()
    with pytest.raises(ValueError, match="not the state of a QuotientAdam"):
        optimizer.load_state_dict(stranger.state_dict())
    model.load_state_dict(before[0])
    assert_unchanged(model, optimizer, before)
    train(model, optimizer, 2)


def test_loading_casts_plain_state_as_torch_does_and_runs_hooks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    optimizer = qo.QuotientAdam(layer)
    data = torch.randn(3, 5, 16)
    layer(data).square().mean().backward()
    optimizer.step()
    low = copy.deepcopy(layer).bfloat16()
    restored = qo.QuotientAdam(low)
    seen = []
    restored.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    restored.register_load_state_dict_pre_hook(lambda o, s: seen.append(len(s["state"])))
    restored.load_state_dict(optimizer.state_dict())
    assert seen == [12, 12]
    assert restored.state[low.norm1.weight]["exp_avg"].dtype == torch.bfloat16
    assert restored.state[low.linear1.weight]["exp_avg"].dtype == torch.float32
    low(data.bfloat16()).square().mean().backward()
    restored.step()


def test_options_of_the_whole_optimizer_may_not_differ_between_groups():
    model = small_model()
    first, *rest = list(model.parameters())
    for option, value in (("refresh_every", 3), ("max_grad_norm", 1.0)):
        groups = [{"params": [first], option: value}, {"params": rest}]
        with pytest.raises(ValueError, match=f"{option} is one for all param groups"):
            qo.QuotientAdam(groups, symmetries=qo.find_symmetries(model))


def test_changing_frames_under_way_is_refused():
    model = small_model()
    optimizer = quotient_adam(model)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["residual_frame"] = None
    with pytest.raises(ValueError, match="make a new optimizer to change frames"):
        train(model, optimizer, 1)


def test_a_nearly_rank_deficient_factor_leans_on_its_partner():
    """What rounding of float32 leaves of a low-rank factor is no direction to divide by."""
    model = small_model(dtype=torch.float32)
    attention = model.blocks[0].attention
    with torch.no_grad():
        U, S, Vt = torch.linalg.svd(attention.key.weight[:8], full_matrices=False)
        S[5:] = 0
        attention.key.weight[:8] = U @ S.diag() @ Vt
    before = attention.query.weight.detach().clone()
    optimizer = quotient_adam(model)
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    step = (attention.query.weight.detach() - before).abs().max()
    assert 0 < step < 20 * optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        attention.query.weight[:8] = 0
        attention.key.weight[:8] = U @ S.diag() @ Vt
    # With no full factor to lean on, the head takes steps of AdamW's size.
    before = attention.query.weight.detach().clone()
    optimizer = quotient_adam(model)
    optimizer.step()
    step = (attention.query.weight.detach() - before).abs().max()
    assert 0 < step < 20 * optimizer.param_groups[0]["lr"]


def test_half_precision_clipping():
    """A norm of 9e4 is beyond float16, its clipping is not."""
    weight = nn.Parameter(torch.zeros(900, dtype=torch.float16))
    optimizer = qo.QuotientAdam([weight], lr=1.0, max_grad_norm=1.0, eps=1e-3)
    weight.grad = torch.full_like(weight, 3000.0)
    optimizer.step()
    assert weight.isfinite().all()
    assert (weight < -0.1).all()


def test_empty_parameters_are_no_obstacle():
    optimizer = qo.QuotientAdam([nn.Parameter(torch.zeros(0))])
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(0)
    optimizer.step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = qo.QuotientAdam(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of 'weight' is sparse"):
        optimizer.step()
