"""benchmarks/invariant_attention.py in a tiny configuration."""

import importlib
import json
from pathlib import Path

import pytest

from quotientopt.compare.optimizers import OPTIMIZERS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    known = dict(OPTIMIZERS)
    yield importlib.import_module("invariant_attention")
    OPTIMIZERS.clear()
    OPTIMIZERS.update(known)


def test_it_measures_what_it_says(script, monkeypatch, tmp_path):
    arguments = ["--steps", "3", "--layers", "1", "--width", "16", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["invariant_attention.py", *arguments, "--out", str(tmp_path)])
    script.main()
    record = json.loads((tmp_path / "invariant-attention.json").read_text())
    runs = {
        (run["trial"]["optimizer"], run["trial"]["rate"], run["trial"]["seed"]): run
        for run in record["runs"]
    }
    ordinary, chart = (runs[f"{name}, AdamW", 4e-3, 0] for name in ("ordinary", "chart"))
    pair, point = (runs[f"{n}, QuotientAdam", 1.6e-2, 0] for n in ("ordinary", "fixed-rank"))
    for one, two in ((chart, ordinary), (point, pair)):
        # One function to start from.
        assert one["training_losses"][0] == pytest.approx(two["training_losses"][0], abs=1e-5)
        assert one["status"] == "finished"
    heads, rank = 4, 4
    assert ordinary["parameters"] - chart["parameters"] == 2 * heads * rank**2
    assert point["parameters"] == pair["parameters"] == ordinary["parameters"]
    assert {seed for _, _, seed in runs} == {0, 1}
    path = ["invariant_attention.py", "--float64-path", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", path)
    script.main()
    differences = json.loads((tmp_path / "invariant-attention.json").read_text())["float64_path"]
    assert len(differences["differences"]) == 4
    assert max(differences["differences"]) < 1e-9
    table = (tmp_path / "invariant-attention.md").read_text()
    assert table.count("| fixed-rank, QuotientAdam |") == 1 + 2 + 1
    assert "over the first 4 steps of seed 0" in table
    assert "| chart, AdamW lr=0.004 seed=0 |" in table
