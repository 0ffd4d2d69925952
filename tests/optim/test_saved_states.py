"""States saved by version 0.1.0 are taken over, and training continues as it did then."""

import copy
from pathlib import Path

import pytest
import torch

import quotientopt as qo
from quotientopt.optim import engine
from quotientopt.optim.update import Sampling
from tests.optim import low_rank_cases
from tests.optim.training import small_model, train

# Of small models after six steps, and the losses of the six steps that followed.
STATES = Path(__file__).parent / "data" / "states_0_1_0.pt"
CASES = ("gpt, default", "gpt, shared", "llama, default", "lora", "sgd")


def continued(case, saved, *, with_state=True):
    """Losses after loading the weights and, if wanted, the state of an optimizer."""
    if case == "lora":
        model, step = low_rank_cases.Adapted(start="zero"), low_rank_cases.train
        found = low_rank_cases.symmetries_of(model)
        optimizer = qo.QuotientAdam(model, lr=1.0, symmetries=found)
    else:
        name = "llama" if case.startswith("llama") else "gpt"
        model, step = small_model(name, layers=1, width=8, heads=2, seed=1), train
        if case == "sgd":
            optimizer = qo.QuotientSGD(model, lr=1.0)
        else:
            optimizer = qo.QuotientAdam(model, **saved["options"])
    model.load_state_dict(saved["model"])
    if with_state:
        optimizer.load_state_dict(saved["optimizer"])
    else:
        for group, own in zip(
            optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True
        ):
            group.update({key: value for key, value in own.items() if key != "params"})
    return step(model, optimizer, 6, seed=2)


@pytest.mark.parametrize("case", CASES)
def test_training_continues_from_a_state_of_the_first_version(case, monkeypatch):
    """With that version's schedule, which was of one interval at any age."""

    def due(extent, group):
        return extent[0] == 0 or (extent[1] + 1) % group["refresh_every"] == 0

    def sampling(most, group):
        return Sampling(2, 0.9)

    monkeypatch.setattr(engine, "frames_are_due", due)
    monkeypatch.setattr(engine, "sampling", sampling)
    saved = torch.load(STATES, weights_only=True)[case]
    deviation = (continued(case, saved) - saved["losses"]).abs().max().item()
    assert deviation < 1e-10
    # Control: without the moments it is another curve.
    assert (continued(case, saved, with_state=False) - saved["losses"]).abs().max() > 1e-5


def framed_and_saved():
    model = small_model("gpt", layers=1, width=8, heads=2)
    optimizer = qo.QuotientAdam(model, lr=8e-3)
    train(model, optimizer, 2)
    name = "blocks.0.attention.query.weight"
    place = [own for own, _ in model.named_parameters()].index(name)
    return model, optimizer, copy.deepcopy(optimizer.state_dict()), place


def without(own, key):
    del own[key]


def spoiled(own, key, value):
    own[key] = own[key].clone()
    own[key].view(-1)[0] = value


@pytest.mark.parametrize(
    ("key", "damage", "problem"),
    [
        ("exp_avg_sq", without, "is missing"),
        ("exp_avg", without, "is missing"),
        ("head_frame", without, "is missing"),
        ("exp_avg_sq", lambda own, key: spoiled(own, key, -1.0), "negative"),
        ("exp_avg", lambda own, key: spoiled(own, key, float("nan")), "NaN"),
        (
            "residual_covariance",
            lambda own, key: spoiled(own, key, float("inf")),
            "NaN or infinite",
        ),
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(key, damage, problem):
    model, optimizer, saved, place = framed_and_saved()
    before = {p: dict(own) for p, own in optimizer.state.items()}
    weights = [p.detach().clone() for p in model.parameters()]
    damage(saved["state"][place], key)
    with pytest.raises(ValueError, match=f"{key}.*query.*{problem}"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for p, own in before.items():
        assert own.keys() == optimizer.state[p].keys()
        assert all(torch.equal(own[k], optimizer.state[p][k]) for k in own)
    train(model, optimizer, 1)
