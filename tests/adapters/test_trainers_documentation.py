"""The examples of docs/trainers.md run, with AdamW's line and with the one that takes its place."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import quotientopt as qo

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
EXAMPLES = re.findall(
    r"<!-- needs: (.*?) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def importable(package):
    return pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)


def chosen(line):
    """A line of a diff that is kept: added ones without their mark."""
    if not line.startswith("+"):
        return line
    return f" {line[1:]}" if line.startswith("+  ") else line[2:]


@pytest.mark.parametrize(("packages", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_examples_run(packages, example, tmp_path, monkeypatch):
    for package in packages.split():
        importable(package)
    lines = [chosen(line) for line in example.splitlines() if not line.startswith("-")]
    names = {"output_dir": str(tmp_path), "__name__": "example"}
    exec("\n".join(lines), names)
    made = [v for v in names.values() if hasattr(v, "symmetries") or hasattr(v, "optimizer")]
    assert made or "optimizers" in names


def test_every_example_is_run():
    text = PAGE.read_text(encoding="utf-8")
    assert len(EXAMPLES) == text.count("```python") == 6


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
