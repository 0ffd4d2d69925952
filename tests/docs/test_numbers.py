"""Numbers that pages quote are those of the committed records."""

import json
import re

import pytest

from tests.docs.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def rows_of(text: str) -> list[list[str]]:
    """Cells of the lines of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_cost_by_width():
    record = json.loads((RESULTS / "step-time-width" / "step-time-cpu.json").read_text())
    found = {}
    for row in record["rows"]:
        found.setdefault(row["setting"]["model"], {})[row["optimizer"]] = row
    listed = [row for row in rows_of(page("docs/cost.md")) if row[0].isdigit()]
    assert [row[0] for row in listed] == ["128", "256", "512"]
    for row, rows in zip(listed, found.values(), strict=True):
        adamw, muon, ours = (rows[n] for n in ("adamw-fused", "muon", "quotient-adam"))
        iteration = ours["iteration"]
        seconds = iteration["optimizer seconds"]
        shares = [
            seconds / (seconds + iteration[k])
            for k in ("model seconds as measured", "model seconds")
        ]
        assert row[1:] == [
            f"{ours['parameters']:,}",
            f"{1e3 * adamw['step']['mean']:.1f}",
            f"{1e3 * muon['step']['mean']:.0f}",
            f"{1e3 * ours['step']['mean']:.0f}",
            f"{shares[0]:.0%}",
            f"{shares[1]:.1%}",
            *(f"{r['state bytes'] / 4 / r['parameters']:.1f}" for r in (adamw, ours)),
        ]


def test_the_table_of_the_readme():
    """Losses, times and states; QuotientAdam's row like the others'."""
    names = {
        "AdamW (fused)": "adamw",
        "SOAP": "soap",
        "Muon": "muon",
        "SOAP-Muon (plain)": "soap-muon",
        "QuotientAdam": "quotient-adam",
    }
    folders = ("gpt-stdlib-600", "llama-shakespeare-400", "vit-fashion-mnist-200")
    records = [json.loads((RESULTS / name / "compare.json").read_text()) for name in folders]
    listed = [row for row in rows_of(page("README.md").replace("**", "")) if row[0] in names]
    assert len(listed) == len(names)
    for row in listed:
        own = [next(r for r in x["summary"] if r["optimizer"] == names[row[0]]) for x in records]
        losses = [f"{r['loss']:.3f} ± {r['standard_error']:.3f}" for r in own]
        assert row[1:7:2] == losses, row
        shares = [f"{100 * (r['steps_fraction'] or 1):.0f} %" for r in own]
        assert row[2:7:2] == shares, row
        assert row[7] == f"{1e3 * records[0]['timings'][names[row[0]]]['optimizer']['mean']:.1f} ms"


@pytest.mark.parametrize(
    "line",
    [row for row in rows_of((ROOT / "docs" / "limitations.md").read_text()) if "](" in row[1]],
    ids=lambda row: row[0][:30],
)
def test_what_is_not_ahead(line):
    record = (ROOT / "docs" / re.search(r"\]\(([^)]*)\)", line[1])[1]).resolve().read_text()
    numbers = re.findall(r"\d\.\d+(?: ± \d\.\d+)?", " ".join(line[2:]))
    assert len(numbers) >= 2
    for number in numbers:
        assert number in record, number
