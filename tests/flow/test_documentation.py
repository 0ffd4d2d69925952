"""The examples of docs/flow.md run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "flow.md"


def test_examples_run():
    pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 4
    exec("\n".join(examples), {})
