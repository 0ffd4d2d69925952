"""Noether charges: what gradient flow conserves, and what Adam does not."""

import copy
import itertools

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.canonical import ChargeLog, dress_, noether_charges
from quotientopt.groups import GL
from tests.canonical.models import example, hand_made
from tests.optim.training import batches, loss_of, small_model
from tests.symmetries.architectures import small_gpt, values

TOKENS = next(iter(batches(1)))


def factors(symmetry):
    return tuple(torch.cat(side, dim=-1) for side in (symmetry.left, symmetry.right))


def gradients(symmetry):
    return tuple(
        torch.cat([block.view(block.parameter.grad) for block in blocks], dim=-1)
        for blocks in (symmetry.left_blocks, symmetry.right_blocks)
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-multi-query", "attention-bias-kv"])
def test_values(name):
    model, _ = example(name)
    charges = noether_charges(model)
    for symmetry in qo.find_symmetries(model).heads:
        A, B = factors(symmetry)
        C, found = A @ A.mT - B @ B.mT, charges[symmetry.name]
        assert found.shape == (symmetry.heads, symmetry.rank, symmetry.rank)
        if isinstance(symmetry.group, GL):
            assert torch.allclose(found, C, atol=1e-12)
            continue
        squares = A.square().sum(-1) - B.square().sum(-1)
        planes = (squares[:, :4] + squares[:, 4:]) / 2
        assert torch.allclose(found, torch.diag_embed(planes.repeat(1, 2)), atol=1e-12)


def train_on(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, TOKENS).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_step_of_gradient_descent_changes_them_to_second_order(name):
    """By η² (∂_A ∂_Aᵀ − ∂_B ∂_Bᵀ), exactly."""
    model = small_model(name)
    before, rate = noether_charges(model), 0.5
    train_on(model, torch.optim.SGD(model.parameters(), lr=rate), 1)
    for symmetry in qo.find_symmetries(model).heads:
        left, right = gradients(symmetry)
        change = rate**2 * symmetry.group.algebra_projection(left @ left.mT - right @ right.mT)
        found = noether_charges(model)[symmetry.name] - before[symmetry.name]
        assert change.abs().max() > 1e-7
        assert torch.allclose(found, change, atol=1e-14)


def drift_over_time(make, rate, time=2.0):
    """Largest drift after training up to a fixed time, and how far the weights went."""
    model = small_model(layers=1)
    start = copy.deepcopy(model)
    optimizer = make(model.parameters(), rate)
    with ChargeLog(model, optimizer) as log:
        train_on(model, optimizer, round(time / rate))
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    path = sum((p - q).square().sum().item() for p, q in pairs) ** 0.5
    return max(log.records[-1].drift.values()), path


def sgd(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate)


def test_gradient_flow_conserves_them():
    """Per step O(η²), over a fixed time O(η): towards the flow the drift vanishes."""
    found = [drift_over_time(sgd, rate, time=0.5) for rate in (0.02, 0.01, 0.005)]
    for (coarse, _), (fine, _) in itertools.pairwise(found):
        assert 1.6 < coarse / fine < 2.4
    drift, path = found[-1]
    assert drift < 1e-4
    assert path > 0.5


def test_adam_does_not_conserve_them():
    """At the same path length the drift stays, however small the steps."""

    def adam(parameters, rate):
        return torch.optim.Adam(parameters, lr=rate)

    found = [drift_over_time(adam, rate, time=0.02) for rate in (1e-3, 5e-4)]
    (coarse, path), (fine, _) = found
    assert 0.9 < coarse / fine < 1.1
    slow, same_path = drift_over_time(sgd, 0.0125)
    assert coarse / path > 80 * slow / same_path


def test_the_skew_parts_have_no_charge():
    """O(r): nothing is conserved by symmetry but the vanishing of skew(Ȧ Aᵀ + Ḃ Bᵀ)."""
    model, _ = hand_made("normalized")
    charges = noether_charges(model, symmetries=model.symmetries())
    assert torch.equal(charges["qk"], torch.zeros(3, 8, 8, dtype=torch.float64))
    model(values(2, 6, 20).double()).square().sum().backward()
    qk = model.symmetries().heads[0]
    (A, B), (dA, dB) = factors(qk), gradients(qk)
    momentum = dA @ A.mT + dB @ B.mT
    assert (momentum - momentum.mT).abs().max() < 1e-12
    assert momentum.abs().max() > 1e-2
    # The rate of A Aᵀ − B Bᵀ along the flow: it is no charge of O(r).
    rate = dA @ A.mT - dB @ B.mT
    assert (rate + rate.mT).abs().max() > 1e-2


def test_gl_charges_of_rotary_heads_are_not_conserved():
    model = small_model("llama")
    qk = qo.find_symmetries(model).heads[0]
    wrong = qo.HeadSymmetry(qk.left_blocks, qk.right_blocks, GL(qk.rank), "qk")
    right = qo.HeadSymmetry(qk.left_blocks, qk.right_blocks, qk.group, "qk")
    found = {}
    for name, symmetry in (("wrong", wrong), ("right", right)):
        trained = copy.deepcopy(model)
        own = qo.find_symmetries(trained).heads[0]
        own = qo.HeadSymmetry(own.left_blocks, own.right_blocks, symmetry.group, "qk")
        optimizer = sgd(trained.parameters(), 0.05)
        with ChargeLog(trained, optimizer, symmetries=[own]) as log:
            train_on(trained, optimizer, 10)
        found[name] = log.records[-1].drift["qk"]
    assert found["wrong"] > 5 * found["right"]


def test_weight_decay_shrinks_them():
    """Decoupled decay without a gradient: C ↦ (1 − ηλ)² C."""
    model = small_gpt().double()
    before = noether_charges(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, charge in noether_charges(model).items():
        assert torch.allclose(charge, 0.95**2 * before[name], atol=1e-12)


def test_balanced_gauges_have_none():
    model = small_gpt().double()
    assert noether_charges(model)["blocks.0.attention.qk"].abs().max() > 0.1
    dress_(model, "balanced")
    assert max(charge.abs().max() for charge in noether_charges(model).values()) < 1e-12


# ---- the log ------------------------------------------------------------------------------------


def test_the_log_counts_steps_and_can_be_removed():
    model = small_model(layers=1)
    optimizer = sgd(model.parameters(), 0.1)
    log = ChargeLog(model, optimizer, every=3)
    train_on(model, optimizer, 7)
    assert [record.step for record in log.records] == [0, 3, 6]
    assert set(log.records[0].drift.values()) == {0.0}
    charges = noether_charges(model)
    train_on(model, optimizer, 2)
    log.remove()
    train_on(model, optimizer, 6)
    assert len(log.records) == 4
    name = "blocks.0.attention.vo"
    assert log.records[0].norm[name] != log.records[-1].norm[name]
    assert noether_charges(model)[name].ne(charges[name]).any()


def test_norm_and_drift():
    model = small_model(layers=1)
    start = noether_charges(model)
    sizes = {
        s.name: sum(torch.linalg.matrix_norm(X @ X.mT) for X in factors(s)).norm()
        for s in qo.find_symmetries(model).heads
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with ChargeLog(model, optimizer) as log:
        train_on(model, optimizer, 3)
    for name, charge in noether_charges(model).items():
        assert log.records[-1].norm[name] == pytest.approx(charge.norm().item(), rel=1e-12)
        drift = ((charge - start[name]).norm() / sizes[name]).item()
        assert log.records[-1].drift[name] == pytest.approx(drift, rel=1e-12)


def test_quotient_adam_and_schedulers_carry_the_hook():
    model = small_model(layers=1)
    optimizer = qo.QuotientAdam(model)
    with ChargeLog(model, optimizer) as log:
        train_on(model, optimizer, 2)
    assert len(log.records) == 3


def test_refusals():
    model = small_gpt()
    optimizer = sgd(model.parameters(), 0.1)
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every must be a positive integer"):
            ChargeLog(model, optimizer, every=every)
    with pytest.raises(TypeError, match="object has no register_step_post_hook"):
        ChargeLog(model, object())
    with pytest.raises(ValueError, match="no head symmetry of Linear"):
        ChargeLog(nn.Linear(2, 2), optimizer)
