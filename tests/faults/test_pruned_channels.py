"""Channels of zeros, in training and before it: heads without a frame go on as torch steps them."""

import copy

import pytest
import torch

import quotientopt as qo
from tests.optim.low_rank_cases import Adapted, symmetries_of
from tests.optim.low_rank_cases import train as train_pairs
from tests.optim.training import batches, loss_of, random_gains_, small_model, train

HEAD = slice(8, 16)  # the second head of four, of width eight


def queries_of(attention, rows):
    """Rows of the query heads that read rows of key-value head 1."""
    group = attention.heads // attention.key_value_heads
    return [8 * (h - 1) + row for h in range(group, 2 * group) for row in rows]


def channel(attention):
    """One row of V and the columns of O that read it."""
    columns = queries_of(attention, [9])
    return [(attention.value.weight, (9,)), (attention.output.weight, (slice(None), columns))]


def head(attention):
    columns = queries_of(attention, range(8, 16))
    return [(attention.value.weight, (HEAD,)), (attention.output.weight, (slice(None), columns))]


def query_channel(attention):
    """One row of queries and keys; of rotated ones a plane, which is two rows."""
    rows = [9, 13] if attention.rotary else [9]
    return [
        (attention.query.weight, (queries_of(attention, rows),)),
        (attention.key.weight, (rows,)),
    ]


def outputs(attention):
    return [(attention.output.weight, ())]


def outputs_and_channel(attention):
    return outputs(attention) + channel(attention)[:1]


PRUNED = {
    "channel": channel,
    "head": head,
    "query channel": query_channel,
    "zero outputs": outputs,
    "zero outputs and a channel": outputs_and_channel,
}
OPTIMIZERS = {
    "adam": lambda m: qo.QuotientAdam(m, lr=2e-3),
    "per head": lambda m: qo.QuotientAdam(m, lr=2e-3, row_frame="per_head"),
    "step": lambda m: qo.QuotientAdam(m, lr=2e-3, row_frame="per_head", polar="step"),
    "no polar": lambda m: qo.QuotientAdam(m, lr=2e-3, polar=False, nesterov=False),
    "orthonormal": lambda m: qo.QuotientAdam(m, lr=2e-3, head_frame="orthonormal"),
    "svd": lambda m: qo.QuotientAdam(m, lr=2e-3, head_frame="svd"),
    "shared": lambda m: qo.QuotientAdam(m, lr=2e-3, residual_frame="shared"),
    "sgd": lambda m: qo.QuotientSGD(m, lr=0.03, momentum=0.9),
    "sgd, right-invariant": lambda m: qo.QuotientSGD(
        m, lr=0.03, momentum=0.9, metric="right-invariant"
    ),
}


MODELS = {
    "gpt": lambda: small_model("gpt"),
    "llama": lambda: small_model("llama", key_value_heads=4),
    "grouped": lambda: small_model("llama", key_value_heads=2),
}


@pytest.fixture(params=["gpt", "llama"])
def model(request):
    return MODELS[request.param]()


def prune_(places):
    with torch.no_grad():
        for weight, place in places:
            weight[place] = 0


def all_zero(places):
    return all(not weight[place].any() for weight, place in places)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pruned", PRUNED)
def test_training_goes_on(model, pruned, name):
    places = PRUNED[pruned](model.blocks[1].attention)
    prune_(places)
    optimizer = OPTIMIZERS[name](model)
    losses = train(model, optimizer, 13)
    assert losses.isfinite().all()
    assert losses[-4:].mean() < losses[:4].mean() - (0.0 if "sgd" in name else 0.1)
    # Without a gradient there is nothing to move, as in AdamW and SGD.
    if "outputs" not in pruned:
        assert all_zero(places)
    else:
        assert model.blocks[1].attention.output.weight.any()


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "once"])
@pytest.mark.parametrize(
    ("pruned", "name"),
    [("channel", name) for name in OPTIMIZERS]
    + [(pruned, name) for pruned in ("head", "query channel") for name in ("adam", "sgd")],
)
def test_pruning_in_mid_training(pruned, name, masked):
    """With the mask set after every step, as pruning does, or once: momentum then goes on."""
    model = small_model()
    optimizer = OPTIMIZERS[name](model)
    before = train(model, optimizer, 13)
    places = PRUNED[pruned](model.blocks[0].attention)
    prune_(places)
    if masked:
        optimizer.register_step_post_hook(lambda *_: prune_(places))
    after = train(model, optimizer, 13)
    assert after.isfinite().all()
    if name.startswith("sgd") and not masked:
        # What momentum leaves of a channel is small, and its metric large: no small steps then.
        assert after.max() < 1.2 * before.max()
    else:
        assert after[-5:].mean() < before[-5:].mean()  # on the same batches
    assert all_zero(places) == masked


def test_a_new_optimizer_takes_the_old_state(model):
    optimizer = qo.QuotientAdam(model, lr=2e-3)
    train(model, optimizer, 14)
    prune_(channel(model.blocks[1].attention))
    other = copy.deepcopy(model)
    again = qo.QuotientAdam(other, lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.parameters_changed()  # what was written before its first step it cannot see
    assert torch.equal(train(model, optimizer, 13, 2), train(other, again, 13, 2))
    # And from a state in which a head has none.
    third = copy.deepcopy(model)
    fresh = qo.QuotientAdam(third, lr=1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, 13, 3), train(third, fresh, 13, 3))


TWINS = {
    "default": lambda m: qo.QuotientAdam(m, lr=7.5e-4, weight_decay=0.4),
    "step": lambda m: qo.QuotientAdam(m, lr=7.5e-4, row_frame="per_head", polar="step"),
    "False": lambda m: qo.QuotientAdam(m, lr=7.5e-4, row_frame="per_head", polar=False),
    "orthonormal": lambda m: qo.QuotientAdam(
        m, lr=7.5e-4, row_frame="per_head", head_frame="orthonormal", residual_frame=None
    ),
    "sgd": lambda m: qo.QuotientSGD(m, lr=0.03, momentum=0.9, weight_decay=0.1),
}


def twins(model, pruned):
    """Another gauge, of condition number 1000, of all heads but those that are pruned."""
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    element = symmetries.random_element(1000.0, generator=torch.Generator().manual_seed(2))
    element = {name: g for name, g in element.items() if name in {s.name for s in symmetries.heads}}
    names = {id(p): n for n, p in twin.named_parameters()}
    touched = {names[id(w)] for w, _ in pruned(twin.blocks[1].attention)}
    for symmetry in symmetries.heads:
        if touched & {block.name for block in symmetry.blocks}:
            element[symmetry.name][1] = torch.eye(symmetry.rank)
    symmetries.act_(element)
    return twin


def test_twins_of_the_other_heads(model):
    random_gains_(model)
    for pruned in (channel, query_channel):
        start = copy.deepcopy(model)
        prune_(pruned(start.blocks[1].attention))
        twin = twins(start, pruned)
        makes = TWINS if pruned is channel else {name: TWINS[name] for name in ("default", "sgd")}
        for name, make in makes.items():
            first, second = copy.deepcopy((start, twin))
            losses = train(first, make(first), 22) - train(second, make(second), 22)
            print(pruned.__name__, name, losses.abs().max())
            assert losses.abs().max() < 1e-10, (pruned.__name__, name)
        first, second = copy.deepcopy((start, twin))
        losses = train(first, plain(first), 25) - train(second, plain(second), 25)
        assert losses.abs().max() > 1e-4


def plain(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.mark.parametrize("row_frame", ["per_head", "per_matrix"])
def test_a_head_without_a_frame_takes_adamws_step(row_frame):
    model = small_model()
    prune_(channel(model.blocks[1].attention))
    twin = copy.deepcopy(model)
    options = {"lr": 3e-3, "weight_decay": 0.1}
    raw = {"residual_frame": None, "polar": False, "nesterov": False, "update_scale": 1.0}
    own = qo.QuotientAdam(model, row_frame=row_frame, **raw, **options)
    other = torch.optim.AdamW(twin.parameters(), **options)
    for tokens in batches(12):
        for net, optimizer in ((model, own), (twin, other)):
            optimizer.zero_grad()
            loss_of(net, tokens).backward()
            # The same gradients for both, whatever the other heads have become.
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        own.step()
        other.step()
    attention, mine = model.blocks[1].attention, twin.blocks[1].attention
    pairs = (
        (attention.value.weight, mine.value.weight),
        (attention.output.weight.mT, mine.output.weight.mT),
    )
    for p, q in pairs:
        assert (p[HEAD] - q[HEAD]).abs().max() < 1e-12
        assert (p[:8] - q[:8]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"row_frame": "per_head"}, {"capturable": True}])
def test_narrow_parameters(dtype, options):
    model = small_model(dtype=dtype)
    places = [*channel(model.blocks[0].attention), *query_channel(model.blocks[1].attention)]
    prune_(places)
    optimizer = qo.QuotientAdam(model, lr=2e-3, **options)
    losses = train(model, optimizer, 25)
    assert losses[-5:].mean() < losses[:5].mean() - 0.1
    assert all_zero(places)


def test_grouped_queries():
    for pruned in (channel, head, query_channel):
        model = MODELS["grouped"]()
        places = pruned(model.blocks[1].attention)
        prune_(places)
        losses = train(model, qo.QuotientAdam(model, lr=2e-3), 13)
        assert losses[-4:].mean() < losses[:4].mean() - 0.1
        assert all_zero(places)


def test_pruned_hidden_units():
    model = small_model("llama")
    mlp = model.blocks[0].mlp
    places = [(mlp.up.weight, (3,)), (mlp.down.weight, (slice(None), 3))]
    prune_(places)
    optimizer = qo.QuotientAdam(model, lr=2e-3, hidden_units=True, polar=True)
    assert any(s.rank == 1 for s in optimizer.symmetries.heads)
    losses = train(model, optimizer, 25)
    assert losses[-5:].mean() < losses[:5].mean() - 0.1
    assert all_zero(places)


def test_a_low_rank_pair_of_zeros_waits():
    model = Adapted(start="random")
    optimizer = qo.QuotientAdam(model, lr=3e-3, symmetries=symmetries_of(model))
    train_pairs(model, optimizer, 15)
    pair = optimizer.symmetries.heads[0].blocks
    others = [b for s in optimizer.symmetries.heads[1:] for b in s.blocks]
    with torch.no_grad():
        for block in pair:
            block.parameter.zero_()
    before = [block.parameter.detach().clone() for block in others]
    assert train_pairs(model, optimizer, 15).isfinite().all()
    assert not any(block.parameter.any() for block in pair)
    assert not any(torch.equal(b.parameter, old) for b, old in zip(others, before, strict=True))
    with torch.no_grad():
        pair[0].parameter.add_(0.1 * torch.randn(pair[0].parameter.shape))
    train_pairs(model, optimizer, 15)
    assert pair[1].parameter.any()


@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-25])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_channels_that_are_nearly_zero(name, size):
    """Of full rank row by row, but their frame or metric would be of any size."""
    model = small_model(dtype=torch.float32)
    places = channel(model.blocks[1].attention)
    with torch.no_grad():
        for weight, place in places:
            weight[place] *= size
    losses = train(model, OPTIMIZERS[name](model), 13)
    assert losses.isfinite().all()
    assert losses[-4:].mean() < losses[:4].mean() - (0.0 if "sgd" in name else 0.1)
    assert max(weight[place].abs().max() for weight, place in places) < 3.0


def test_control_of_channels_that_are_nearly_zero(monkeypatch):
    monkeypatch.setattr("quotientopt.optim.dressing.LEAST_RATIO", 0.0)
    model = small_model()
    places = channel(model.blocks[1].attention)
    with torch.no_grad():
        for weight, place in places:
            weight[place] *= 1e-20
    train(model, OPTIMIZERS["adam"](model), 13)
    assert max(weight[place].abs().max() for weight, place in places) > 100


def test_pruning_on_an_accelerator():
    """Where the host does not wait between frames, no step is skipped."""
    model = small_model(dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=2e-3)
    optimizer._nonfinite.is_needed = bool
    before = train(model, optimizer, 13)
    places = channel(model.blocks[0].attention)
    prune_(places)
    optimizer.register_step_post_hook(lambda *_: prune_(places))
    after = train(model, optimizer, 13)
    assert after[-5:].mean() < before[-5:].mean()
    assert {float(own["step"]) for own in optimizer.state.values()} == {26.0}
