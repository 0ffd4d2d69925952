"""torch.compile around a step: the optimizer runs as it is, and nothing is compiled anew."""

import pytest
import torch
from torch.nn import functional

from quotientopt import QuotientAdam, QuotientSGD
from quotientopt.models import GPT


@pytest.mark.parametrize("kind", [QuotientAdam, QuotientSGD])
def test_a_compiled_step_is_the_step(kind):
    tokens = torch.randint(32, (4, 9))
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = GPT(32, 2, 16, 2, 8, generator=torch.Generator().manual_seed(0)).double()
        optimizer = kind(model, lr=1e-2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            out = model(tokens[:, :-1])
            functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0
    assert all(map(torch.equal, *weights))


def test_a_compiled_training_step_breaks_at_the_optimizer_alone():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = GPT(32, 2, 16, 2, 8)
    optimizer = QuotientAdam(model, lr=1e-2)
    tokens = torch.randint(32, (4, 9))

    @torch.compile(backend="eager")
    def train():
        out = model(tokens[:, :-1])
        loss = functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [float(train()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10
