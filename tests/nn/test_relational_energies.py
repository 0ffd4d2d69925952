"""benchmarks/relational_energies.py in a tiny configuration."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("relational_energies")


def test_it_measures_what_it_says(script, monkeypatch, tmp_path):
    tiny = {"SEEDS": (0, 1), "RATES": (5e-3,), "STEPS": 30, "TRAINING": 300, "TEST": 100}
    for name, value in {**tiny, "ANGLES": (0, 90)}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("sys.argv", ["relational_energies.py", "--out", str(tmp_path)])
    script.main()
    rows = json.loads((tmp_path / "relational-energies.json").read_text())["rows"]
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["by_angle"][0] == pytest.approx(row["unrotated"], rel=1e-12)
        assert row["dressed"] == pytest.approx(row["unrotated"], rel=1e-8)
        assert row["unrotated"] < row["standard_deviation_of_energies"]
        change = abs(row["rotated"] / row["unrotated"] - 1)
        if row["model"] == "relational":
            assert change < 1e-10
        elif row["model"] == "ordinary":
            assert change > 1e-2
    sizes = {row["parameters"] for row in rows}
    assert max(sizes) < 1.02 * min(sizes)
    table = (tmp_path / "relational-energies.md").read_text()
    assert table.count("\n| ") == 1 + 3
    assert (tmp_path / "relational-energies.png").read_bytes()[:4] == b"\x89PNG"


def test_configurations(script):
    X, charges, energies = script.configurations(50, 0)
    apart = torch.cdist(X, X) + 2 * torch.eye(script.PARTICLES, dtype=X.dtype)
    assert apart.min() > script.CLOSEST
    axes = X.mT @ X
    assert (axes - torch.diag_embed(axes.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-10
    assert (charges.sum(-1) == sum(script.CHARGES)).all()
    assert energies.std() > 0.1
    assert not torch.equal(X, script.configurations(50, 1)[0])


def test_energy_of_two(script):
    X = torch.tensor([[0.0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    repelling = script.energy(X, torch.tensor([1.0, 1.0], dtype=torch.float64))
    attracting = script.energy(X, torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert repelling - attracting == pytest.approx(1.0)
    assert repelling + attracting == pytest.approx(2 * 4 * 0.25 * (2.0**-12 - 2.0**-6))


@pytest.mark.parametrize("angle", [0, 90, 180])
def test_turns(script, angle):
    Q = script.turns(20, angle, 0)
    identity = torch.eye(3, dtype=torch.float64)
    assert (Q @ Q.mT - identity).abs().max() < 1e-12
    traces = Q.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = 1 + 2 * torch.tensor(angle).double().deg2rad().cos()
    assert (traces - expected).abs().max() < 1e-12
