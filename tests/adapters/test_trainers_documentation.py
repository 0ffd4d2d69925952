"""What docs/trainers.md and docs/distributed.md say; tests/docs runs their other examples."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import quotientopt as qo
from tests.docs.pages import blocks

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.mark.parametrize("package", ["lightning", "timm"])
def test_blocks_that_need_a_package_run_where_it_is(package, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    (example,) = (b.code for b in blocks(PAGE) if b.not_run.startswith(f"needs {package}"))
    names = {"__name__": "example"}
    exec(example, names)
    assert hasattr(names["optimizer"], "symmetries") or hasattr(names["optimizer"], "optimizer")


def test_a_tensor_lr_is_copied_for_every_group():
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    optimizer = qo.integrations.make_optimizer(model, lr=torch.tensor(1e-3))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates) == 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_bad_models_are_refused():
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing of the Linear is trained"):
        qo.integrations.make_optimizer(frozen)


def test_the_table_of_bytes_is_the_computed_one(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    module = importlib.import_module("communication")
    rows = [module.bytes_sent(processes) for processes in (8, 64)]
    recorded = json.loads((root / "benchmarks/results/communication.json").read_text())
    assert recorded["gigabytes_per_gpu_and_step"] == rows
    assert module.table(rows) in (root / "docs/distributed.md").read_text(encoding="utf-8")
