"""The tables of docs/lora.md are the recorded ones."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="needs peft: pip install peft")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "lora.md"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("script", "record", "write"),
    [
        ("lora_twins", "lora-twins.json", lambda m, r: m.as_text(r["rows"])),
        ("lora_step_time", "lora-step-time.json", lambda m, r: m.table(r["results"])),
    ],
)
def test_tables_are_the_recorded_ones(script, record, write, monkeypatch):
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer: pip install it")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(script)
    recorded = json.loads((RESULTS / record).read_text(encoding="utf-8"))
    assert write(module, recorded) in PAGE.read_text(encoding="utf-8")


def test_the_measurement_of_step_times_in_small(monkeypatch):
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer: pip install it")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("lora_step_time")
    monkeypatch.setattr(module, "LAYERS", 1)
    monkeypatch.setattr(module, "SHAPES", {"q": (12, 10), "v": (12, 6)})
    import torch

    rows = module.measure(module.build_optimizers(2, torch.float32), 2)
    module.add_ratios(rows)
    assert [row["optimizer"] for row in rows][:3] == [
        "AdamW (foreach)",
        "AdamW (fused)",
        "QuotientAdam",
    ]
    assert rows[0]["over_adamw_foreach"] == 1
    assert all(row["processor_milliseconds"]["median"] > 0 for row in rows)
    numbers = 2 * (12 + 10 + 12 + 6)
    assert rows[0]["state_bytes"] == 4 * (2 * numbers + 4)
    small = 4 * (2 * 2 * 2 + 1 + 2)
    assert rows[2]["state_bytes"] == 4 * 3 * numbers + 4 * small
    early = module.measure_early(2, torch.float32, 2)
    assert early["state_bytes"] == rows[2]["state_bytes"]
