"""Between fresh frames a step reads nothing from the device and copies nothing to it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quotientopt as qo
from tests.optim.training import batches, loss_of, small_model, train

# A number read on the host, and a tensor made from numbers of the host.
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
COPIES = {"aten.lift_fresh.default"}


class Traffic(TorchDispatchMode):
    """Counts what would make the host wait, or copy, on an accelerator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in READS | COPIES:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def traffic_of_a_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model, next(iter(batches(1)))).backward()
    with Traffic() as traffic:
        optimizer.step()
    return traffic.counts


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_an_ordinary_step_has_no_traffic(name, capturable):
    model = small_model(name, dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-3, capturable=capturable)
    # As on an accelerator, where gradients that are not finite are found without waiting.
    optimizer._nonfinite.is_needed = bool
    train(model, optimizer, 2)
    # The third step takes no covariances, the fourth does.
    for _ in range(2):
        assert not traffic_of_a_step(model, optimizer)
    train(model, optimizer, 5)
    # Control: the tenth makes frames, and looks.
    assert traffic_of_a_step(model, optimizer)
