"""benchmarks/alignment.py in a tiny configuration."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("alignment")


def test_it_measures_what_it_says(script, monkeypatch, tmp_path):
    shape = {"layers": 1, "width": 16, "heads": 2, "context": 8}
    tiny = {"SHAPE": shape, "SEEDS": (0, 1), "STEPS": 20, "BATCH": 8, "POINTS": 5}
    for name, value in tiny.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("sys.argv", ["alignment.py", "--out", str(tmp_path)])
    script.main()
    rows = json.loads((tmp_path / "alignment.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 4
    twins = {r["stage"]: r for r in rows if r["pair"] == "twins" and r["seed"] == 0}
    assert twins["as trained"]["weights_apart"] > 0.5
    last = twins["gauge, head order, residual stream"]
    assert last["weights_apart"] < 1e-3
    assert abs(last["barrier"]) < 1e-4
    assert last["losses"][0] == pytest.approx(twins["as trained"]["losses"][-1], abs=1e-4)
    table = (tmp_path / "alignment.md").read_text()
    assert table.count("\n| ") == 1 + 3 * 4
    assert (tmp_path / "alignment.png").read_bytes()[:4] == b"\x89PNG"


def test_barrier(script):
    assert script.barrier([1.0, 2.0, 3.0]) == 0
    assert script.barrier([1.0, 4.0, 3.0]) == 2
