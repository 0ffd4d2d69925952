"""benchmarks/canonical_forms.py on the smallest model, and the record that the documents quote."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.symmetries.families import transformers
from tests.symmetries.trained import ENCODERS, located

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "canonical-forms.json"
OPERATIONS = [
    "dress_ svd",
    "dress_ balanced",
    "dress_ orthonormal",
    "dress_ triangular",
    "align_",
    "invariants",
    "spectra",
    "distance",
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("canonical_forms")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc/self/status")
def test_the_script(script, tmp_path, capsys):
    transformers()
    located(*ENCODERS["albert"][1:])
    out = tmp_path / "found.json"
    script.main(["--models", "ALBERT (rxnmapper)", "--repeats", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())["models"]
    assert (row["head_symmetries"], row["heads"], row["repeats"]) == (2, 16, 1)
    assert [operation["operation"] for operation in row["operations"]] == OPERATIONS
    for operation in row["operations"]:
        assert operation["seconds"]["median"] > 0
        assert operation["peak_growth_bytes"] > 0
    assert capsys.readouterr().out.count("| `") == len(OPERATIONS)
    with pytest.raises(SystemExit, match="2"):
        script.main(["--repeats", "0"])


def test_the_table_in_the_documents_is_that_of_the_record(script):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert script.table(record) in (ROOT / "docs" / "canonical.md").read_text(encoding="utf-8")
    *_, last = record["models"]
    assert last["weights"] == "weights are 4-bit, dequantised to float32"
    dressing = [row for row in last["operations"] if row["operation"].startswith("dress_")]
    assert all(row["peak_over_checkpoint"] < 2 for row in dressing)
