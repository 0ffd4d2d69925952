"""The examples of docs/pymanopt.md run."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymanopt", reason="pip install pymanopt")

PAGE = Path(__file__).parents[2] / "docs" / "pymanopt.md"


def test_examples_run():
    np.random.seed(0)  # noqa: NPY002 -- the generator that pymanopt uses
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 5
    exec("\n".join(examples), {})
