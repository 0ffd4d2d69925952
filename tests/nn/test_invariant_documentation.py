"""The examples of docs/invariant_attention.md run."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "invariant_attention.md"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 7
    exec("\n".join(examples), {})
