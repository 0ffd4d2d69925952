"""docs/relational_paper.md names what exists; its scripts run in tiny configurations."""

import importlib
import json
import re
from pathlib import Path

import pytest

import quotientopt as qo

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "relational_paper.md"


def test_what_the_table_names_exists():
    text = PAGE.read_text(encoding="utf-8")
    tests = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(tests) >= 15
    for path in [*tests, *(f"docs/{link}" for link in re.findall(r"\]\((\.\./[\w./-]+)\)", text))]:
        assert (ROOT / path).resolve().exists(), path
    table = text.split("What it leaves open")[0]
    names = re.findall(r"`(?:qo\.)?((?:nn|flow|groups|manifold)?\.?\w+)(?:\(.*?\))?`", table)
    found = 0
    for name in names:
        if name.startswith(("tests", "manifold.")):
            continue
        owners = (qo, qo.manifolds, qo.nn, qo)
        parts = name.split(".")
        value = next((getattr(o, parts[0]) for o in owners if hasattr(o, parts[0])), None)
        for part in parts[1:]:
            value = getattr(value, part)
        assert value is not None, name
        found += 1
    assert found >= 15


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    modules = [importlib.import_module(n) for n in ("reduced_training", "relational_object")]
    tiny = {"layers": 2, "width": 16, "heads": 2, "context": 12}
    for module in modules:
        monkeypatch.setattr(module, "MODEL", tiny)
        monkeypatch.setattr(module, "STEPS", 12)
    return modules


def run(script, monkeypatch, folder):
    monkeypatch.setattr("sys.argv", ["script.py", "--out", str(folder)])
    script.main()
    (record,) = folder.glob("*.json")
    assert record.with_suffix(".png").stat().st_size > 1000
    return json.loads(record.read_text()), record.with_suffix(".md").read_text()


def test_reduced_training(scripts, monkeypatch, tmp_path):
    script = scripts[0]
    for name, value in {"EVERY": 6, "SEEDS": (0, 1), "BATCH": 4}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "RATES", {name: rates[:1] for name, rates in script.RATES.items()})
    record, table = run(script, monkeypatch, tmp_path)
    for scheme, entry in record["schemes"].items():
        assert f"| {scheme} |" in table
        for trained in entry["runs"]:
            assert trained["loss"][-1] < trained["loss"][0] - 0.05
            assert trained["steps"] == [0, 6, 12]
            chart = scheme.startswith("invariant")
            assert (trained["gauge"] == 0) == chart == (trained["drift"][-1] is None)
    ordinary, chart = (
        record["schemes"][name]["runs"][0]
        for name in ("ordinary parameters, AdamW", "invariant parameters (chart), AdamW")
    )
    assert ordinary["parameters"] - ordinary["gauge"] == chart["parameters"]


def test_relational_object(scripts, monkeypatch, tmp_path):
    record, _ = run(scripts[1], monkeypatch, tmp_path)
    assert max(record["functions"].values()) < 1e-11
    assert record["numbers"]["ordinary"] > 1e-1
    assert max(record["numbers"][kind] for kind in ("canonical", "relational")) < 1e-9
