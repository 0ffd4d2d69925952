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


def test_what_the_parts_are_worth():
    expected = {}
    for section in page("benchmarks/results/ablation/README.md").split("\n## ")[1:]:
        title = section.splitlines()[0]
        for label, _, _, _, difference, *_ in (r for r in rows_of(section) if len(r) == 6):
            if set(label) - set("-") and difference != "–":
                expected[f"{title}: {label}"] = difference.replace("-", "−")
    assert len(expected) > 20
    text = page("docs/quotient_adam.md").split("**Part by part**")[1].split("\n## ")[0]
    listed = {row[0]: row[1] for row in rows_of(text) if ": " in row[0]}
    assert listed == expected


def test_what_wraps_around_the_optimizer():
    found = {row[0]: row[1:] for row in rows_of(page("benchmarks/results/wrappers/wrappers.md"))}
    text = page("docs/quotient_adam.md").split("**What wraps around any optimizer**")[1]
    listed = {row[0]: row[1:] for row in rows_of(text.split("The others are not built in")[0])}
    rows = {
        "averaged weights: decay 0.95 over the last 40 % of the steps": (
            "as it is, averaged weights"
        ),
        "an outer step with Nesterov momentum every ten steps": (
            "outer Nesterov step (every, momentum, rate): 10, 0.5, 0.8"
        ),
        "cautious weight decay: where the update is towards zero, 0.2": (
            "cautious weight decay (decay): 0.2"
        ),
        "matrices whose norm stays what it was, a relative rate of 0.06": (
            "matrices of fixed norm (rate): 0.06"
        ),
    }
    assert listed.keys() - {"", "---"} == rows.keys()
    for own, key in rows.items():
        seeds, _, difference = found[key]
        assert listed[own] == [seeds, difference.replace("-", "−")], own
    for name in (
        "SOAP-Muon",
        "SOAP-Muon, averaged weights",
        "matrices of fixed norm (rate): 0.06",
    ):
        assert found[name][1] in " ".join(text.split()), name
    seed_0 = [float(found[f"matrices of fixed norm (rate): {rate}"][2]) for rate in (0.045, 0.12)]
    assert min(seed_0) > 0


def test_cost_on_a_gpu():
    record = json.loads((RESULTS / "gpu" / "gpu.json").read_text())
    names = {
        "AdamW (fused)": ("adamw", None),
        "Muon (torch, bfloat16 products)": ("muon", None),
        "SOAP-Muon (plain)": ("soap-muon", None),
        "QuotientAdam": ("quotient-adam", "highest"),
        'QuotientAdam, `precision="high"` (TF32)': ("quotient-adam", "high"),
        'QuotientAdam, `precision="fast"` (bfloat16)': ("quotient-adam", "fast"),
    }
    text = page("docs/cost.md").split("## On a GPU")[1].split("## ")[0]
    listed = [row for row in rows_of(text) if row[0] in names]
    assert len(listed) == len(names)
    found = {(r["shape"], r["optimizer"], r.get("precision")): r for r in record["step times"]}
    for row in listed:
        expected = []
        for shape in ("gpt2-small", "llama-1b"):
            own = found.get((shape, *names[row[0]]), {})
            if "step" not in own:
                expected += ["", "", ""]
                continue
            launches = str(own["on the device"]["launches"]) if "on the device" in own else ""
            state = f"{own['state bytes'] / 4 / own['parameters']:.1f}"
            expected += [f"{1e3 * own['step']['mean']:.1f}", launches, state]
        assert row[1:] == expected, row
    waits = [r["waits"] for r in record["step times"] if "waits" in r]
    assert all(w["steps refused in error mode"] == 0 for w in waits)
    assert record["graph"]["largest difference of weights"] == 0.0
    assert record["tests"]["status"] == 0
    seconds = record["training"]["seconds per step"]
    sentence = " ".join(text.split())
    assert (
        f"{1e3 * seconds['adamw']:.0f} ms per iteration with AdamW, "
        f"{1e3 * seconds['quotient-adam']:.0f} with QuotientAdam in TF32, "
        f"{1e3 * seconds['muon']:.0f} with Muon and {1e3 * seconds['soap-muon']:.0f} with SOAP-Muon"
    ) in sentence


def test_the_longest_step_on_a_gpu():
    record = json.loads((RESULTS / "gpu" / "gpu.json").read_text())
    laps = {
        (r["shape"], r["optimizer"]): sorted(1e3 * lap for lap in r["step"]["periods"][0])
        for r in record["step times"]
        if "step" in r and r.get("precision") in (None, "highest")
    }
    text = " ".join(page("docs/cost.md").split("## What the state holds")[1].split())
    own, llama, soap_muon = (
        laps[key]
        for key in (
            ("gpt2-small", "quotient-adam"),
            ("llama-1b", "quotient-adam"),
            ("gpt2-small", "soap-muon"),
        )
    )
    for sentence in (
        f"{own[-1]:.0f} ms of GPT-2 small, where the others take {own[0]:.0f} to {own[-2]:.0f}",
        f"{llama[-1]:.0f} ms of the Llama, where they take {llama[0]:.0f} to {llama[-2]:.0f}",
        f"plain form {soap_muon[-1]:.0f} and {soap_muon[0]:.0f} ms of GPT-2 small",
    ):
        assert sentence in text, sentence


def test_rates_of_embeddings():
    """The table of the page, and what it is said to show of the built-in rule."""
    report = (RESULTS / "embedding-rates" / "embedding-rates.md").read_text()
    table = rows_of(report)
    text = page("docs/learning_rate.md").split("## Embeddings and head")[1]
    assert [row for row in rows_of(text) if row[0] != "---"] == [r for r in table if r[0] != "---"]
    assert re.findall(r"(?:ends at|and at) (\d\.\d+)", " ".join(text.split())) == re.findall(
        r"AdamW's \S+: (\d\.\d+)", report
    )
    ratios = {"128": 2.0, "256": 1.0, "512": 0.5}
    for width, rate, *losses in table[2:]:
        if rate == "0.002":
            rule = losses[(2.0, 1.0, 0.5, 0.25).index(ratios[width])]
            assert rule == min(losses)


def test_losses_of_experts():
    report = rows_of((RESULTS / "experts" / "experts.md").read_text())
    losses = {row[0]: row[-1] for row in report[2:]}
    text = " ".join(page("docs/quotient_adam.md").split())
    wanted = [losses[n] for n in ("QuotientAdam", "QuotientAdam, experts by AdamW", "AdamW")]
    assert (
        "ends at {} after 150 steps, with AdamW for its experts at {}, under AdamW at {} (".format(
            *wanted
        )
        in text
    )
    assert {row[2] for row in report[2:]} == {"3"}
    changes = " ".join(page("CHANGELOG.md").split())
    assert "ends at {:.5} instead of {:.5} nats".format(*wanted) in changes


def test_the_table_of_the_readme():
    """Losses, times and states; QuotientAdam's rows like the others'."""
    names = {
        "AdamW (fused)": "adamw",
        "SOAP": "soap",
        "Muon": "muon",
        "SOAP-Muon (plain)": "soap-muon",
        "QuotientAdam": "quotient-adam",
        "QuotientAdam, leading frames": "quotient-adam-leading",
        "QuotientAdam, all frames": "quotient-adam-full",
    }
    folders = ("gpt-stdlib-600", "llama-shakespeare-400", "vit-fashion-mnist-200")
    records = [json.loads((RESULTS / name / "compare.json").read_text()) for name in folders]
    listed = [row for row in rows_of(page("README.md").replace("**", "")) if row[0] in names]
    assert len(listed) == len(names)
    for row in listed:
        own = [
            next((r for r in x["summary"] if r["optimizer"] == names[row[0]]), None)
            for x in records
        ]
        assert own[0] is not None
        losses = [f"{r['loss']:.3f} ± {r['standard_error']:.3f}" if r else "–" for r in own]
        assert row[1:7:2] == losses, row
        shares = [f"{100 * (r['steps_fraction'] or 1):.0f} %" if r else "–" for r in own]
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
