"""Steps do not depend on autocast, the precision of float32 products or the default dtype."""

import contextlib
import copy

import pytest
import torch

import quotientopt as qo
from tests.optim import low_rank_cases
from tests.optim.training import batches, loss_of, small_model


@contextlib.contextmanager
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def narrow_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.bfloat16
        torch.set_default_dtype(torch.float32)


SWITCHES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "medium": medium_precision,
    "default dtype": narrow_default,
}


def adam(model):
    return qo.QuotientAdam(model, lr=8e-3, refresh_every=3)


def adam_over_all_heads(model):
    return qo.QuotientAdam(model, lr=8e-3, refresh_every=3, row_frame="per_matrix")


def sgd(model):
    return qo.QuotientSGD(model, lr=0.05, momentum=0.9)


def weights_after(model, optimizer, context, step):
    for k in range(5):
        optimizer.zero_grad()
        step(model, k).backward()
        with context():
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("make", [adam, adam_over_all_heads, sgd])
def test_switches_change_no_bit(make, switch):
    tokens = list(batches(5))
    model = small_model(dtype=torch.float32)
    twins = [copy.deepcopy(model) for _ in range(2)]
    results = [
        weights_after(m, make(m), context, lambda m, k: loss_of(m, tokens[k]))
        for m, context in zip(twins, (contextlib.nullcontext, SWITCHES[switch]), strict=True)
    ]
    assert torch.equal(*results)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (results[0] - start).abs().max() > 1e-3


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_change_no_bit_of_low_rank_pairs(switch):
    results = []
    for context in (contextlib.nullcontext, SWITCHES[switch]):
        model = low_rank_cases.Adapted(start="zero", dtype=torch.float32)
        found = low_rank_cases.symmetries_of(model)
        optimizer = qo.QuotientAdam(model, lr=1e-2, symmetries=found)
        generator = torch.Generator().manual_seed(1)
        results.append(
            weights_after(
                model, optimizer, context, lambda m, k, g=generator: low_rank_cases.loss_of(m, g)
            )
        )
    assert torch.equal(*results)


def test_the_clipping_norm_does_not_see_autocast():
    model = small_model(dtype=torch.float32)
    loss_of(model, next(iter(batches(1)))).backward()
    expected = qo.invariant_grad_norm(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qo.invariant_grad_norm(model), expected)
        # Control: autocast does round products here.
        gradient = model.blocks[0].mlp.up.weight.grad
        assert (gradient @ gradient.mT).dtype == torch.bfloat16
