"""The examples of docs/dressed_tokens.md run."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "dressed_tokens.md"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 2
    exec("\n".join(examples), {})
