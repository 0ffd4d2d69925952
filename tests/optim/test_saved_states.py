"""States saved by version 0.1.0 are taken over, and training continues as it did then."""

from pathlib import Path

import pytest
import torch

import quotientopt as qo
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
def test_training_continues_from_a_state_of_the_first_version(case):
    saved = torch.load(STATES, weights_only=True)[case]
    deviation = (continued(case, saved) - saved["losses"]).abs().max().item()
    assert deviation < 1e-10
    # Control: without the moments it is another curve.
    assert (continued(case, saved, with_state=False) - saved["losses"]).abs().max() > 1e-5
