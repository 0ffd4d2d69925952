"""Saved states are matched by the names of parameters, and checked before anything changes."""

import copy
import io

import pytest
import torch
from torch import nn

import quotientopt as qo
from tests.optim.training import small_model, train

OPTIMIZERS = {
    "adam": lambda model: qo.QuotientAdam(model, lr=2e-3),
    "sgd": lambda model: qo.QuotientSGD(model, lr=0.03, momentum=0.9),
}


@pytest.fixture(params=sorted(OPTIMIZERS))
def make(request):
    return OPTIMIZERS[request.param]


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(make, steps=7, name="llama"):
    model = small_model(name)
    optimizer = make(model)
    train(model, optimizer, steps)
    return model, optimizer


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def told(group):
    """A param group without what torch adds to any that it has loaded."""
    return {key: value for key, value in group.items() if key != "differentiable"}


def assert_unchanged(model, optimizer, before):
    assert all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())
    now = optimizer.state_dict()
    assert [told(group) for group in now["param_groups"]] == [
        told(group) for group in before[1]["param_groups"]
    ]
    assert now["state"].keys() == before[1]["state"].keys()
    for index, own in now["state"].items():
        assert own.keys() == before[1]["state"][index].keys()
        for key, value in own.items():
            assert torch.equal(value, before[1]["state"][index][key])


def reordered(model):
    """The same model with its modules registered the other way round."""
    for module in model.modules():
        children, parameters = list(module.named_children()), list(module._parameters.items())
        for table, items in ((module._modules, children), (module._parameters, parameters)):
            table.clear()
            table.update(reversed(items))
    if isinstance(model.blocks, nn.ModuleList):
        blocks = model.blocks._modules
        for name in sorted(blocks):
            blocks[name] = blocks.pop(name)
    return model


def test_a_model_in_another_order_goes_on_alike(make):
    model, optimizer = trained(make)
    other = reordered(copy.deepcopy(model))
    names = [name for name, _ in other.named_parameters()]
    assert names != [name for name, _ in model.named_parameters()]
    resumed = make(other)
    state = saved_and_loaded(optimizer.state_dict())
    resumed.load_state_dict(state)
    own = dict(model.named_parameters())
    for name, p in other.named_parameters():
        for key, value in optimizer.state[own[name]].items():
            assert torch.equal(value, resumed.state[p][key]), (name, key)
    assert (
        train(model, optimizer, 8, seed=3) - train(other, resumed, 8, seed=3)
    ).abs().max() < 1e-12
    # Control: in its order the state is another one, of which shapes tell.
    for group in state["param_groups"]:
        del group["param_names"]
    if isinstance(resumed, qo.QuotientAdam):
        with pytest.raises(ValueError, match="which these options leave out"):
            make(reordered(copy.deepcopy(model))).load_state_dict(state)


def groups_of(model, decayed):
    named = list(model.named_parameters())
    return [
        {"params": [pair for pair in named if decayed(pair)]},
        {"params": [pair for pair in named if not decayed(pair)], "weight_decay": 0.0},
    ]


def test_groups_in_another_order_keep_their_options():
    model = small_model("llama")
    found = qo.find_symmetries(model)
    groups = groups_of(model, lambda pair: "norm" not in pair[0])
    optimizer = qo.QuotientAdam(groups, lr=1e-2, symmetries=found)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    again = qo.QuotientAdam(
        groups_of(other, lambda pair: "norm" not in pair[0])[::-1],
        lr=1.0,
        symmetries=qo.find_symmetries(other),
    )
    again.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in again.param_groups] == [0.0, 1e-2]
    assert (train(model, optimizer, 3, 2) - train(other, again, 3, 2)).abs().max() < 1e-12


def test_other_groups_are_refused_by_name():
    model = small_model("llama")
    found = qo.find_symmetries(model)
    groups = groups_of(model, lambda pair: "norm" not in pair[0])
    optimizer = qo.QuotientAdam(groups, lr=1e-2, symmetries=found)
    train(model, optimizer, 3)
    moved = groups_of(model, lambda pair: "norm" not in pair[0] or pair[0] == "norm.weight")
    other = qo.QuotientAdam(moved, lr=1e-2, symmetries=found)
    before = snapshot(model, other)
    with pytest.raises(ValueError, match=r"'norm\.weight' is in param group 0, and in group 1 of"):
        other.load_state_dict(optimizer.state_dict())
    assert_unchanged(model, other, before)


def test_parameters_that_are_missing_are_refused_by_name(make):
    model, optimizer = trained(make, 2)
    before = snapshot(model, optimizer)
    state = saved_and_loaded(optimizer.state_dict())
    names = state["param_groups"][0]["param_names"]
    names[names.index("norm.weight")] = "final_norm.weight"
    match = r"has no parameter 'norm\.weight', but one of 'final_norm\.weight'"
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)
    # The way out that it names: as torch takes it, in its order.
    del state["param_groups"][0]["param_names"]
    optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)


def test_unnamed_parameters_that_stand_elsewhere_are_refused():
    model, optimizer = trained(OPTIMIZERS["adam"], 2)
    found = optimizer.symmetries
    parameters = list(model.parameters())
    in_order = qo.QuotientAdam(parameters, symmetries=found)
    in_order.load_state_dict(optimizer.state_dict())
    names = [name for name, _ in model.named_parameters()]
    i, j = (names.index(f"blocks.{k}.attention.query.weight") for k in range(2))
    parameters[i], parameters[j] = parameters[j], parameters[i]
    swapped = qo.QuotientAdam(parameters, symmetries=found)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.query.* stands where .*blocks\.0"):
        swapped.load_state_dict(optimizer.state_dict())
    assert not swapped.state


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.ModuleList])
def test_wrappers_do_not_change_names(make, wrap):
    model, optimizer = trained(make, 3)
    own = copy.deepcopy(model)
    wrapped = wrap([own]) if wrap is nn.ModuleList else wrap(own)
    symmetries = qo.find_symmetries(own)
    kind = type(optimizer)
    other = kind(list(wrapped.named_parameters()), lr=1.0, symmetries=symmetries)
    other.load_state_dict(optimizer.state_dict())
    names = other.state_dict()["param_groups"][0]["param_names"]
    assert names == [name for name, _ in wrapped.named_parameters()]
    again = make(copy.deepcopy(model))
    again.load_state_dict(other.state_dict())
    losses = train(model, optimizer, 3, 2) - train(own, other, 3, 2)
    assert losses.abs().max() < 1e-12


def test_torchs_own_optimizers_load_it_and_groups_can_be_added(make):
    model, optimizer = trained(make, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    state = optimizer.state_dict()
    assert "param_names" not in state["param_groups"][0]  # not all are known
    kind = {qo.QuotientAdam: torch.optim.AdamW, qo.QuotientSGD: torch.optim.SGD}[type(optimizer)]
    plain = kind(model.parameters(), lr=1.0)
    plain.load_state_dict(make(model).state_dict())
    assert plain.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_distributed_checkpoints(make, tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, optimizer = trained(make)
    state = checkpoint.get_optimizer_state_dict(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert state["param_groups"][0]["params"] == names
    other = reordered(copy.deepcopy(model))
    resumed = make(other)
    checkpoint.set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    assert told(resumed.param_groups[0]).keys() == make(model).param_groups[0].keys()
    # By way of files, where the model in that order comes with random weights.
    whole = checkpoint.get_state_dict(model, optimizer)
    torch.distributed.checkpoint.save(dict(enumerate(whole)), checkpoint_id=tmp_path)
    third = reordered(small_model("llama", seed=3))
    again = make(third)
    parts = checkpoint.get_state_dict(third, again)
    torch.distributed.checkpoint.load(dict(enumerate(parts)), checkpoint_id=tmp_path)
    checkpoint.set_state_dict(third, again, model_state_dict=parts[0], optim_state_dict=parts[1])
    losses = train(model, optimizer, 8, 3)
    assert (losses - train(other, resumed, 8, 3)).abs().max() < 1e-12
    assert (losses - train(third, again, 8, 3)).abs().max() < 1e-12


DAMAGE = {
    "missing": (lambda own, key: own.pop(key), "is missing"),
    "shape": (lambda own, key: own.update({key: torch.zeros(3)}), "shape|one number"),
    "NaN": (lambda own, key: own[key].view(-1)[:1].fill_(float("nan")), "has NaN"),
    "infinite": (lambda own, key: own[key].view(-1)[:1].fill_(float("inf")), "infinite"),
    "text": (lambda own, key: own.update({key: "7"}), "is '7', expected a number or a tensor"),
    "negative": (lambda own, key: own[key].view(-1)[:1].fill_(-1.0), "has negative entries"),
    "zero": (lambda own, key: own[key].view(-1, *own[key].shape[-1:])[:1].zero_(), "singular|orth"),
}
PLACES = {
    "plain": ("llama", "norm.weight", ("step", "exp_avg", "exp_avg_sq")),
    "framed": (
        "gpt",
        "blocks.1.attention.query.weight",
        ("step", "exp_avg", "exp_avg_sq", "head_frame", "residual_frame", "head_covariance"),
    ),
    "residual": ("gpt", "head.weight", ("step", "exp_avg", "exp_avg_sq", "residual_frame")),
}
CASES = [
    (place, key, damage)
    for place, (*_, keys) in PLACES.items()
    for key in keys
    for damage in DAMAGE
    if damage != "negative" or key in ("step", "exp_avg_sq")
    if damage != "zero" or key in ("head_frame", "residual_frame")
    if (damage, key) != ("missing", "step") or place == "plain"
]


@pytest.mark.parametrize(("place", "key", "damage"), CASES, ids="-".join)
def test_damaged_entries_are_refused_in_one_line(place, key, damage):
    kind, name, _ = PLACES[place]
    model, optimizer = trained(OPTIMIZERS["adam"], 3, kind)
    before = snapshot(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    index = state["param_groups"][0]["param_names"].index(name)
    spoil, message = DAMAGE[damage]
    spoil(state["state"][index], key)
    with pytest.raises(ValueError, match=message) as refusal:
        optimizer.load_state_dict(state)
    line = str(refusal.value)
    assert name in line
    assert key in line
    assert "\n" not in line
    assert_unchanged(model, optimizer, before)
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS["adam"](small_model(kind)).load_state_dict(state)
    train(model, optimizer, 1)


@pytest.mark.parametrize("damage", ["shape", "NaN", "infinite", "text"])
@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.attention.value.weight"])
def test_damaged_momenta_are_refused_in_one_line(name, damage):
    model, optimizer = trained(OPTIMIZERS["sgd"], 3)
    before = snapshot(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    index = state["param_groups"][0]["param_names"].index(name)
    spoil, message = DAMAGE[damage]
    spoil(state["state"][index], "momentum_buffer")
    with pytest.raises(ValueError, match=message) as refusal:
        optimizer.load_state_dict(state)
    assert name in str(refusal.value)
    assert_unchanged(model, optimizer, before)


def test_entries_that_were_lost_or_are_of_nothing_are_refused(make):
    model, optimizer = trained(make, 3)
    before = snapshot(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    own = state["state"].pop(state["param_groups"][0]["param_names"].index("norm.weight"))
    with pytest.raises(ValueError, match=r"state of 'norm\.weight' is missing"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][99] = own
    with pytest.raises(ValueError, match="an entry 99 that is of no parameter"):
        optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)


def test_a_parameter_that_never_had_state_needs_none(make):
    model = small_model("llama")
    optimizer = make(model)
    model.norm.weight.requires_grad_(False)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert (train(model, optimizer, 3, 2) - train(other, resumed, 3, 2)).abs().max() == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_options_of_other_optimizers_are_not_taken(make, momentum):
    """A fresh SGD has no entries by which it could be told, and options of the same names."""
    model, optimizer = trained(make, 2)
    before = snapshot(model, optimizer)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    strangers = [
        sgd,
        torch.optim.Adagrad(model.parameters()),
        torch.optim.Rprop(model.parameters()),
    ]
    strangers += [OPTIMIZERS[name](model) for name in OPTIMIZERS if OPTIMIZERS[name] is not make]
    for stranger in strangers:
        with pytest.raises(ValueError, match=f"not the state of a {type(optimizer).__name__}"):
            optimizer.load_state_dict(stranger.state_dict())
    nothing = [None, [], {}, {"state": {}}, {"state": [], "param_groups": []}]
    for key, value in (("params", 3), ("param_names", [1, 2]), ("has_state", "yes")):
        nothing.append(copy.deepcopy(optimizer.state_dict()))
        nothing[-1]["param_groups"][0][key] = value
    for state in nothing:
        with pytest.raises(ValueError, match=f"not the state of a {type(optimizer).__name__}"):
            optimizer.load_state_dict(state)
    assert_unchanged(model, optimizer, before)


def test_states_of_torch_are_taken_where_they_mean_the_same():
    layer, data = nn.Linear(3, 2), torch.randn(5, 3)
    for kind, torchs, options in (
        (qo.QuotientAdam, torch.optim.AdamW, {}),
        (qo.QuotientSGD, torch.optim.SGD, {"momentum": 0.9}),
    ):
        own, other = copy.deepcopy(layer), copy.deepcopy(layer)
        before = torchs(own.parameters(), lr=0.1, **options)
        own(data).square().sum().backward()
        before.step()
        other.load_state_dict(own.state_dict())
        after = kind(other.parameters(), lr=1.0, symmetries=(), **options)
        after.load_state_dict(before.state_dict())
        for net, optimizer in ((own, before), (other, after)):
            optimizer.zero_grad()
            net(data).square().sum().backward()
            optimizer.step()
        assert torch.equal(own.weight, other.weight)
