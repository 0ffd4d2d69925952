"""benchmarks/flow_charges.py in a tiny configuration."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("flow_charges")


def test_it_measures_what_it_says(script, monkeypatch, tmp_path):
    tiny = {"WIDTH": 6, "LENGTH": 4, "BATCH": 4, "TIME": 0.2, "REACH": 0.1, "SEEDS": (0,)}
    for name, value in {**tiny, "RATES": (0.01, 0.005), "POINTS": 6}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("sys.argv", ["flow_charges.py", "--out", str(tmp_path)])
    script.main()
    (entry,) = json.loads((tmp_path / "flow-charges.json").read_text())["seeds"]
    flow, runs, powers = entry["flow"], entry["runs"], entry["exponents"]
    assert flow["loss"][-1] < flow["loss"][0]
    assert flow["loss"] == sorted(flow["loss"], reverse=True)
    assert max(flow["drift"]) < 1e-9
    assert flow["charges"][0] == pytest.approx(flow["charges"][-1], rel=1e-8)
    # SGD per step to second order and over a time to first; Adam to first order and not at all.
    assert powers["SGD"]["one step"] == pytest.approx(2, abs=1e-6)
    assert powers["SGD"]["whole run"] == pytest.approx(1, abs=0.15)
    assert powers["Adam"]["one step"] == pytest.approx(1, abs=0.15)
    assert powers["Adam"]["whole run"] == pytest.approx(0, abs=0.25)
    assert max(run["vertical_share"] for run in runs["SGD"]) < 1e-20
    assert min(run["vertical_share"] for run in runs["Adam"]) > 1e-2
    assert min(run["drift"][-1] for run in runs["Adam"]) > 1e-3
    assert runs["SGD"][0]["steps"] == 20
    assert runs["Adam"][1]["kept"] == [0, 4, 8, 12, 16, 20]
    table = (tmp_path / "flow-charges.md").read_text()
    assert table.count("\n| ") == 1 + 1 + 3 * 2 + 1 + 3
    assert (tmp_path / "flow-charges.png").read_bytes()[:4] == b"\x89PNG"


def test_exponent(script):
    assert script.exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2)
