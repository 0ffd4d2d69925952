"""Between fresh frames a step reads nothing from the device and copies nothing to it."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quotientopt as qo
from quotientopt.models import reference_model
from tests.optim.training import GROWN, batches, loss_of, small_model, train

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
    train(model, optimizer, GROWN)
    # The first step takes no covariances, the second does.
    for _ in range(2):
        assert not traffic_of_a_step(model, optimizer)
    train(model, optimizer, 7)
    # Control: the tenth makes frames, and looks.
    assert traffic_of_a_step(model, optimizer)


class Launches(TorchDispatchMode):
    """Counts the operations that compute: on an accelerator each of them is at least one kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [value.alias_info for value in func._schema.returns]
        # A view returns what it was given without writing to it.
        view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"second_moment": "factored", "head_frame": "svd"}])
def test_launches_do_not_grow_with_layers(options, monkeypatch):
    """268 of the four layers of the reference GPT are what version 0.1.0 took."""
    monkeypatch.setattr("quotientopt.optim.buckets.CHUNK", 1 << 40)  # stacks whole, as elsewhere
    counts = []
    for layers in (2, 4):
        model = reference_model("gpt", 0, layers=layers, width=64, vocabulary=48, context=16)
        optimizer = qo.QuotientAdam(model, lr=1e-3, **options)
        for _ in range(GROWN + 2):
            optimizer.zero_grad()
            loss_of(model, next(iter(batches(1)))).backward()
            with Launches() as launches:
                optimizer.step()
        counts.append(launches.count)
    assert counts[0] == counts[1] <= 268
    # The control: torch's Muon goes matrix by matrix.
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.")]
    muon = torch.optim.Muon(matrices, lr=1e-3)
    with Launches() as launches:
        muon.step()
    assert launches.count > 2 * counts[1]


def files_of_a_step(model, optimizer):
    """The package's files that a step calls into."""
    optimizer.zero_grad()
    loss_of(model, next(iter(batches(1)))).backward()
    root, files = Path(qo.__file__).parent, set()

    def note(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(root):
            files.add(file.relative_to(root).as_posix())

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return files


def test_an_ordinary_step_passes_through_six_files():
    """What a reader has to open to follow one from top to bottom."""
    model = small_model(dtype=torch.float32)
    optimizer = qo.QuotientAdam(model, lr=1e-3)
    train(model, optimizer, GROWN)
    names = ("quotient_adam", "bookkeeping/checks", "engine", "buckets", "update", "polar")
    # The first step takes no covariances, the second does.
    for _ in range(2):
        assert files_of_a_step(model, optimizer) == {f"optim/{name}.py" for name in names}
    train(model, optimizer, 7)
    # Control: the tenth makes frames.
    assert len(files_of_a_step(model, optimizer)) > 10
