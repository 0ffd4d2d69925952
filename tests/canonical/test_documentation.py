"""The tables of docs/canonical.md are what the code prints."""

from pathlib import Path

from quotientopt import canonical
from quotientopt.models import reference_model

PAGE = Path(__file__).parents[2] / "docs" / "canonical.md"


def test_the_table_of_the_redundancy_is_printed():
    model = reference_model("gpt", layers=2, width=32, heads=4)
    assert f"```text\n{canonical.redundancy(model)}\n```" in PAGE.read_text(encoding="utf-8")
