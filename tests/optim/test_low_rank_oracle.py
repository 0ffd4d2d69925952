"""LoRA pairs: the batched path against the plainest form of the algorithm, and one by one."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.optim.reference import PlainLowRankAdam
from tests.optim.low_rank_cases import Adapted, loss_of, symmetries_of, train

# Coordinates are made every step, then every second, every third.
STEPS = 35
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def optimizer_of(model, **options):
    return qo.QuotientAdam(
        model, symmetries=symmetries_of(model), **({"nesterov": False} | SETTINGS | options)
    )


def oracle_losses(model, steps=STEPS, **options):
    """Losses, and the parameters of the pairs in the end."""
    parameters = list(zip(model.lora_B, model.lora_A, strict=True))
    pairs = [(B.detach().T.clone(), A.detach().clone()) for B, A in parameters]
    oracle = PlainLowRankAdam(pairs, **SETTINGS, **options)
    other = torch.optim.AdamW([model.bias], **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = loss_of(model, generator)
        loss.backward()
        losses.append(loss.item())
        oracle.step([(B.grad.T, A.grad) for B, A in parameters])
        other.step()
        with torch.no_grad():
            for (B, A), (X, Y) in zip(parameters, pairs, strict=True):
                B.copy_(X.T)
                A.copy_(Y)
    return torch.tensor(losses, dtype=torch.float64)


def apart(model, other):
    """Largest relative distance of two models' parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(((p - q).norm() / q.norm()).item() for p, q in pairs)


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(
    ("nesterov", "polar"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_equals_the_oracle_in_float64(start, nesterov, polar):
    model = Adapted(start=start)
    plain = copy.deepcopy(model)
    expected = oracle_losses(plain, nesterov=nesterov, polar=polar)
    for foreach in (None, True, False):
        fast = copy.deepcopy(model)
        optimizer = optimizer_of(fast, nesterov=nesterov, lora_polar=polar, foreach=foreach)
        losses = train(fast, optimizer, STEPS)
        assert ((losses - expected).abs() / expected).max() < 1e-12
        assert apart(fast, plain) < 1e-10


@pytest.mark.parametrize("start", ["zero", "random"])
def test_equals_the_oracle_in_float32(start):
    model = Adapted(start=start, dtype=torch.float32)
    expected = oracle_losses(copy.deepcopy(model), nesterov=False)
    losses = train(model, optimizer_of(model), STEPS)
    assert ((losses - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize("option", [{"refresh": 7}, {"nesterov": True}, {"polar": True}])
def test_other_settings_are_seen(option):
    """The control: with another option the oracle goes elsewhere."""
    model = Adapted()
    expected = oracle_losses(copy.deepcopy(model), **({"nesterov": False} | option))
    losses = train(model, optimizer_of(model), STEPS)
    assert ((losses - expected).abs() / expected).max() > 1e-6


def test_one_by_one_is_the_same():
    model = Adapted(start="random")
    losses = []
    for foreach in (True, False):
        own = copy.deepcopy(model)
        losses.append(train(own, optimizer_of(own, foreach=foreach), STEPS))
    assert (losses[0] - losses[1]).abs().max() < 1e-12
