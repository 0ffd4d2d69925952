"""Parameters that others write to: frames follow where they no longer fit, and only there."""

import copy
from itertools import pairwise

import pytest
import torch

import quotientopt as qo
from tests.optim import low_rank_cases as pairs
from tests.optim.test_host_traffic import Traffic
from tests.optim.training import GROWN, batches, loss_of, small_model, train

BY = 30.0
CHECKS = "quotientopt.optim.bookkeeping.checks"


def through_data(parameter, change):
    parameter.data.copy_(change(parameter.data))


def through_numpy(parameter, change):
    array = parameter.detach().numpy()
    array[...] = change(array)


def under_no_grad(parameter, change):
    with torch.no_grad():
        parameter.copy_(change(parameter))


def replaced(parameter, change):
    parameter.data = change(parameter.data).clone()


WRITES = [through_data, through_numpy, under_no_grad, replaced]
HEADS = {
    "balanced": {},
    "orthonormal": {"head_frame": "orthonormal"},
    "svd": {"head_frame": "svd"},
    "per head": {"row_frame": "per_head", "polar": "step"},
}


def trained_heads(options, steps=GROWN + 1):
    model = small_model()
    optimizer = qo.QuotientAdam(model, lr=2e-3, **options)
    train(model, optimizer, steps)
    return model, optimizer


def regauge_(model, write, factor=BY):
    for block in model.blocks:
        write(block.attention.value.weight, lambda w: w * factor)
        write(block.attention.output.weight, lambda w: w / factor)


def twins(run, model, optimizer):
    """A copy that has taken a step: what is written before the first one, nobody can tell."""
    twin, other = copy.deepcopy((model, optimizer))
    assert torch.equal(run(model, optimizer, 1), run(twin, other, 1))
    return twin, other


def as_on_an_accelerator(optimizer):
    """The host does not wait for the device between fresh frames."""
    optimizer._nonfinite.is_needed = bool


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("write", WRITES)
def test_another_gauge_of_the_heads_is_seen_at_once(write, options):
    model, optimizer = trained_heads(options)
    twin, other = twins(train, model, optimizer)
    regauge_(twin, write)
    expected, losses = train(model, optimizer, 8, 3), train(twin, other, 8, 3)
    print((losses - expected).abs().max())
    assert (losses - expected).abs().max() < 0.05


def test_control_of_writes_to_heads(monkeypatch):
    model, optimizer = trained_heads({})
    twin, other = twins(train, model, optimizer)
    monkeypatch.setattr(f"{CHECKS}.WatchedFactors.were_written", lambda *_: False)
    regauge_(twin, through_data)
    assert (train(twin, other, 8, 3) - train(model, optimizer, 8, 3)).max() > 1.0


@pytest.mark.parametrize("write", [through_data, through_numpy])
def test_on_an_accelerator_a_word_is_needed(write):
    """Of such writes torch tells nothing, and looking at values would make the host wait."""
    deviations = {}
    for told in (True, False):
        model, optimizer = trained_heads({})
        as_on_an_accelerator(optimizer)
        twin, other = copy.deepcopy((model, optimizer))
        as_on_an_accelerator(other)
        assert torch.equal(train(twin, other, 1), train(model, optimizer, 1))
        regauge_(twin, write)
        if told:
            other.parameters_changed()
        deviations[told] = (train(twin, other, 6, 3) - train(model, optimizer, 6, 3)).max()
    print(deviations)
    assert deviations[True] < 0.15 < 1.0 < deviations[False]


def test_nothing_is_read_where_nothing_was_written():
    model, optimizer = trained_heads({})
    as_on_an_accelerator(optimizer)
    train(model, optimizer, 1)

    def traffic():
        optimizer.zero_grad()
        loss_of(model, next(iter(batches(1)))).backward()
        with Traffic() as found:
            optimizer.step()
        return found.counts

    assert not traffic()
    under_no_grad(model.blocks[0].attention.query.weight, lambda w: w * 1.0)
    assert traffic()
    assert not traffic()


def swap(model, averages):
    for parameter, average in zip(model.parameters(), averages, strict=True):
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", ["heads", "pairs"])
def test_an_average_swapped_in_and_out_leaves_the_path(kind, told):
    if kind == "heads":
        model, run = small_model(), train
        optimizer = qo.QuotientAdam(model, lr=2e-3)
    else:
        model, run = pairs.Adapted(start="random"), pairs.train
        found = pairs.symmetries_of(model)
        optimizer = qo.QuotientAdam(model, lr=3e-3, symmetries=found)
    run(model, optimizer, 33)
    twin, other = copy.deepcopy((model, optimizer))
    for seed in range(2, 9):
        run(model, optimizer, 3, seed)
        run(twin, other, 3, seed)
        averages = [100 * p.detach() for p in twin.parameters()]
        swap(twin, averages)
        swap(twin, averages)
        if told:
            other.parameters_changed()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
    for own, mine in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(own[key], mine[key]) for key in own)


def trained_pairs(steps=102):
    model = pairs.Adapted()
    optimizer = qo.QuotientAdam(model, lr=3e-3, symmetries=pairs.symmetries_of(model))
    pairs.train(model, optimizer, steps)
    return model, optimizer


def rescale_(model, write, factor=1000.0):
    for B, A in zip(model.lora_B, model.lora_A, strict=True):
        write(B, lambda w: w * factor)
        write(A, lambda w: w / factor)


@pytest.mark.parametrize("write", WRITES)
def test_another_gauge_of_low_rank_pairs_is_seen_at_once(write):
    model, optimizer = trained_pairs()
    twin, other = twins(pairs.train, model, optimizer)
    rescale_(twin, write)
    losses = pairs.train(model, optimizer, 9, 3) - pairs.train(twin, other, 9, 3)
    print(losses.abs().max())
    assert losses.abs().max() < 0.01


def test_low_rank_pairs_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(f"{CHECKS}.NonfiniteGate.is_needed", staticmethod(bool))
    deviations = {}
    for told in (True, False):
        model, optimizer = trained_pairs()
        twin, other = twins(pairs.train, model, optimizer)
        rescale_(twin, through_data)
        if told:
            other.parameters_changed()
        losses = pairs.train(twin, other, 9, 3) - pairs.train(model, optimizer, 9, 3)
        deviations[told] = losses.max()
    print(deviations)
    assert deviations[True] < 0.01 < 1.0 < deviations[False]


def test_a_new_interval_is_honoured_at_once():
    for model, optimizer, run, frame_of in (
        (*trained_pairs(), pairs.train, lambda m: m.lora_A[0]),
        (*trained_heads({}, GROWN), train, lambda m: m.blocks[0].attention.query.weight),
    ):
        run(model, optimizer, 1)
        own = frame_of(model)
        frames = []
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0]["refresh_every"] = 1
            frames.append(optimizer.state[own]["head_frame"].clone())
            run(model, optimizer, 1, seed=step)
        same = [torch.equal(a, b) for a, b in pairwise(frames)]
        assert same == [True, True, True, False, False]


@pytest.mark.parametrize("value", [0, 2.5, None, "often"])
def test_an_interval_that_is_none_is_refused(value):
    model, optimizer = trained_heads({}, 3)
    optimizer.param_groups[0]["refresh_every"] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="refresh_every must be a positive integer"):
        train(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_intervals_that_differ_between_groups_are_refused():
    model = small_model()
    first, *rest = model.parameters()
    groups = [{"params": [first]}, {"params": rest}]
    optimizer = qo.QuotientAdam(groups, symmetries=qo.find_symmetries(model))
    train(model, optimizer, 2)
    optimizer.param_groups[1]["refresh_every"] = 3
    with pytest.raises(ValueError, match="refresh_every is one for all param groups"):
        train(model, optimizer, 1)


def test_gradient_descent_needs_no_word():
    """Its metric is made of the factors as they are in every step."""
    model = small_model()
    optimizer = qo.QuotientSGD(model, lr=0.03)
    train(model, optimizer, 5)
    twin, other = copy.deepcopy((model, optimizer))
    regauge_(twin, through_data)
    other.parameters_changed()
    losses = train(model, optimizer, 8, 3) - train(twin, other, 8, 3)
    assert losses.abs().max() < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:16].clone(), r"query.weight' has shape \(16, 32\) now, less than"),
        (lambda tensor: tensor.mT.contiguous().mT, "memory layout of parameter .*query.weight"),
    ],
)
def test_parameters_that_do_not_fit_their_blocks_are_refused(change, message):
    """Before anything is stepped, also where the gradient has the layout of the block."""
    model = small_model("gpt", dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, 2)
    loss_of(model, next(iter(batches(1)))).backward()
    weight = model.blocks[0].attention.query.weight
    before, given = weight.data, weight.grad
    weight.data = change(weight.data)
    if weight.shape != given.shape:
        weight.grad = given[:16].clone()
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [own["exp_avg"].clone() for own in optimizer.state.values()]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
    kept = [own["exp_avg"] for own in optimizer.state.values()]
    assert all(map(torch.equal, kept, moments))
    # The control: as it was, it is stepped.
    weight.data, weight.grad = before, None
    weight.grad = given
    optimizer.step()
    assert not all(map(torch.equal, [own["exp_avg"] for own in optimizer.state.values()], moments))
