"""The short form of the comparison: fewer steps than tuned AdamW on a toy language."""

import copy

import pytest
import torch

import quotientopt as qo
from tests.optim.training import small_model, train

STEPS = 60
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def best_curve(model, make):
    """The curve with the lowest end over learning rates, and its learning rate."""
    curves = {}
    for rate in RATES:
        own = copy.deepcopy(model)
        curves[rate] = train(own, make(own, rate), STEPS)
    rate = min(curves, key=lambda rate: curves[rate][-5:].mean())
    return curves[rate], rate


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_reaches_adamws_loss_in_fewer_steps(name):
    model = small_model(name, dtype=torch.float32)
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    baseline, _ = best_curve(
        model, lambda m, rate: torch.optim.AdamW(m.parameters(), lr=rate, **options)
    )
    curve, _ = best_curve(model, lambda m, rate: qo.QuotientAdam(m, lr=rate, **options))
    target = baseline[-5:].mean()
    smooth = curve.unfold(0, 5, 1).mean(1)
    reached = int((smooth <= target).nonzero()[0]) + 5
    assert reached <= 0.8 * STEPS
