"""The examples of docs/geoopt.md run."""

import re
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    pytest.importorskip("geoopt", reason="pip install geoopt")

PAGE = Path(__file__).parents[2] / "docs" / "geoopt.md"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    exec("\n".join(examples), {})
