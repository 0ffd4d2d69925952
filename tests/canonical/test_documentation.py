"""The examples of docs/canonical.md run."""

import re
from pathlib import Path

import pytest

import quotientopt as qo
from quotientopt import canonical
from quotientopt.models import reference_model

PAGE = Path(__file__).parents[2] / "docs" / "canonical.md"


def test_examples_run(monkeypatch):
    pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
    for name in canonical.__all__:
        monkeypatch.setattr(qo, name, getattr(canonical, name), raising=False)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 6
    exec("\n".join(examples), {})


def test_the_table_of_the_redundancy_is_printed():
    model = reference_model("gpt", layers=2, width=32, heads=4)
    assert f"```text\n{canonical.redundancy(model)}\n```" in PAGE.read_text(encoding="utf-8")
