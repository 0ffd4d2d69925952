"""The ablations: runs are planned, kept, shared and reported."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quotientopt.compare.protocol import Protocol, Run, Trial, UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation
import ablation_records as records
import ablation_variants as variants


@pytest.fixture
def fake(monkeypatch, make_run):
    """Trials instead of trainings; the second rate is the better one."""
    made = []

    def train_variant(trial, protocol):
        made.append(trial)
        loss = 2.0 - 10 * trial.rate + 0.1 * trial.seed + 0.01 * len(trial.optimizer)
        run = make_run(trial.optimizer, trial.rate, (3.0, loss), seed=trial.seed)
        return replace(run, trial=trial)

    monkeypatch.setattr(ablation, "train_variant", train_variant)
    return made


CONDITIONS = records.Conditions(Protocol(steps=20), "0123")


@pytest.fixture
def ablations(tmp_path):
    def make(*questions, seeds=3, conditions=CONDITIONS, rates=(8e-3,), **options):
        return ablation.Ablations(
            questions, conditions, {"cores": 2}, rates, seeds, tmp_path, **options
        )

    return make


def test_rates_are_screened_on_the_first_seed(ablations, fake):
    plan = ablations("parts", rates=(2e-3,))
    assert plan.missing() == 2 * 1 + 2 * 5 + 4 * 2
    plan.run(1)
    assert len(fake) == len(set(map(str, fake))) == 20
    assert plan.missing() == 0
    assert [t.seed for t in fake] == [0] * 12 + [1, 2] * 4
    assert {t.rate for t in fake if t.optimizer == "without polar" and t.seed} == {8e-3}
    assert {t.rate for t in fake if t.optimizer == "without Nesterov"} == {2e-3}


def test_variants_run_at_the_best_rate_of_the_default(ablations, fake):
    plan = ablations("betas", seeds=2, rates=(2e-3, 8e-3, 4e-3))
    assert plan.missing() == 3 + 1 + 3 * 2
    assert {trial.optimizer for trial in plan.wanted()} == {"default"}
    plan.run(1)
    assert plan.missing() == 0
    assert [t.rate for t in fake if t.optimizer == "default"] == [2e-3, 8e-3, 4e-3, 8e-3]
    assert {t.rate for t in fake if t.optimizer != "default"} == {8e-3}


def test_without_a_best_rate_of_the_default_there_is_nothing_to_do(
    ablations, monkeypatch, make_run
):
    def train_variant(trial, protocol):
        return replace(make_run(losses=()), trial=trial)

    monkeypatch.setattr(ablation, "train_variant", train_variant)
    plan = ablations("betas", seeds=2)
    plan.run(1)
    assert plan.missing() == 0
    assert [run.trial.optimizer for run in plan.records[0].runs] == ["default"]


def test_a_best_rate_on_the_edge_is_said(ablations, fake):
    for rates, said in (((2e-3, 4e-3), True), ((4e-3,), False)):
        plan = ablations("betas", seeds=1, rates=rates, redo=True)
        plan.run(1)
        rows = variants.summarise("betas", plan.records[0].runs)
        remark = "lies on the edge of those tried, and a better one may exist: Decay of the moments"
        assert (remark in records.markdown(plan.records, {"betas": rows})) == said


def test_runs_are_not_repeated(ablations, fake):
    first = ablations("betas", seeds=1, command="first")
    first.run(1)
    assert len(fake) == 4
    again = ablations("betas", seeds=2, command="second")
    assert again.missing() == 4
    again.run(1)
    assert [trial.seed for trial in fake] == [0] * 4 + [1] * 4
    assert again.records[0].commands == ["first", "second"]


def test_the_default_is_shared(ablations, fake, tmp_path):
    ablations("betas", "horizontal", seeds=1).run(1)
    assert sorted(t.optimizer for t in fake).count("default") == 1
    for question in ("betas", "horizontal"):
        runs = json.loads((tmp_path / f"{question}.json").read_text())["runs"]
        assert "default" in [run["trial"]["optimizer"] for run in runs]
    later = ablations("second-moment", seeds=1)
    of_question = len(variants.QUESTIONS["second-moment"].variants)
    assert later.missing() == of_question - 1
    other_code = replace(CONDITIONS, code="4567")
    assert ablations("second-moment", seeds=1, conditions=other_code).missing() == of_question


def test_records_of_other_conditions_are_refused(ablations, fake, tmp_path):
    ablations("betas", seeds=1).run(1)
    before = (tmp_path / "betas.json").read_bytes()
    longer = replace(CONDITIONS, protocol=Protocol(steps=30))
    with pytest.raises(UsageError, match=r"betas\.json was made with steps=20, not 30: --redo"):
        ablations("betas", conditions=longer)
    other = replace(CONDITIONS, code="4567")
    with pytest.raises(UsageError, match="code='0123', not '4567'"):
        ablations("betas", conditions=other)
    with pytest.raises(UsageError, match="steps=20, not 30"):
        ablations("betas", conditions=longer, keep=True)
    assert (tmp_path / "betas.json").read_bytes() == before
    kept = ablations("betas", seeds=1, conditions=other, keep=True)
    assert (kept.missing(), kept.records[0].codes) == (0, ["0123", "4567"])
    anew = ablations("betas", seeds=1, conditions=other, redo=True)
    assert anew.missing() == 4
    anew.run(1)
    assert records.load(tmp_path, "betas").codes == ["4567"]


def test_records_of_changed_variants_and_broken_files_are_refused(
    ablations, fake, tmp_path, monkeypatch
):
    ablations("betas", seeds=1).run(1)
    changed = variants.Variant("betas 0.9, 0.98", {"betas": (0.9, 0.99)})
    monkeypatch.setitem(variants.VARIANTS, changed.name, changed)
    with pytest.raises(UsageError, match=r"runs of 'betas 0\.9, 0\.98', which has changed"):
        ablations("betas")
    (tmp_path / "betas.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*betas\.json: JSONDecodeError"):
        ablations("betas")
    assert ablations("horizontal", seeds=1).missing() == 2


def test_a_variant_that_diverges_is_not_repeated(ablations, monkeypatch, make_run):
    def train_variant(trial, protocol):
        losses = () if trial.optimizer == "horizontal updates" else (2.0,)
        return replace(make_run(losses=losses), trial=trial)

    monkeypatch.setattr(ablation, "train_variant", train_variant)
    plan = ablations("horizontal", seeds=3)
    plan.run(1)
    assert plan.missing() == 0
    default, horizontal = variants.summarise("horizontal", plan.records[0].runs)
    assert (default.seeds, default.diverged) == (3, 0)
    assert (horizontal.seeds, horizontal.diverged, horizontal.loss) == (1, 1, None)
    assert horizontal.difference is None
    assert "| horizontal component | 0.008 | 1 | diverged | – | – |" in records.markdown(
        plan.records, {"horizontal": [default, horizontal]}
    )


def test_differences_are_taken_seed_by_seed(make_run):
    losses = {"default": (1.0, 1.4), "second moment kept": (1.1, 1.52)}
    runs = [
        replace(make_run(losses=(value,)), trial=Trial(name, 8e-3, {}, seed))
        for name, values in losses.items()
        for seed, value in enumerate(values)
    ]
    default, kept = variants.summarise("second-moment", runs)
    assert default.default
    assert default.difference is None
    assert default.standard_error == pytest.approx(0.2)
    assert kept.difference == pytest.approx(0.11)
    assert kept.difference_error == pytest.approx(0.01)
    # Optimizer time: 0.1 s in the hand-made runs; none for a patch.
    assert (default.milliseconds, kept.milliseconds) == (pytest.approx(100), None)


def test_every_question_has_the_default_and_names_are_unique():
    listed = [v for q in variants.QUESTIONS.values() for v in q.variants.values()]
    assert len({v.name for v in listed}) == len({id(v) for v in listed})
    for question in variants.QUESTIONS.values():
        assert list(question.variants.values()).count(variants.DEFAULT) == 1
    described = json.dumps([variant.describe() for variant in listed])
    assert "pooled_residual_frames(layer_and_direction)" in described
    assert "fixed_update_size(constant_size(size=0.2))" in described


# ---- fingerprint --------------------------------------------------------------------------------


def test_fingerprint_covers_the_optimizer_and_ignores_words(tmp_path, monkeypatch):
    behind = records.modules_behind(records.ROOTS)
    assert {"quotientopt.optim.buckets", "quotientopt.models.gpt"} <= set(behind)
    assert "quotientopt.sections.factor" in behind
    assert not any(name.startswith("quotientopt.compare") for name in behind)
    own = tmp_path / "own.py"
    monkeypatch.setattr(records, "OWN", (str(own),))
    digests = []
    for text in ('"""Doc."""\nx = 1\n', "# Words.\nx = 1\n", "x = 2\n"):
        own.write_text(text)
        digests.append(records.code_digest())
    assert digests[0] == digests[1] != digests[2]


# ---- command line -------------------------------------------------------------------------------


@pytest.fixture
def tiny(text_file, tmp_path):
    sizes = {"steps": 3, "batch": 2, "context": 16, "layers": 1, "width": 32}
    given = [f"--{name}={value}" for name, value in sizes.items()]
    return [*given, f"--data={text_file}", f"--out={tmp_path / 'out'}"]


def test_runs_in_two_processes_and_a_report(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ablation.main(["horizontal", "--rates=4e-3", "--seeds=2", "--jobs=2", "--report", *tiny])
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "ablation.png",
        "horizontal.json",
    ]
    document = json.loads((folder / "horizontal.json").read_text())
    runs = [Run.from_dict(run) for run in document["runs"]]
    assert {(run.trial.optimizer, run.trial.seed) for run in runs} == {
        (name, seed) for name in ("default", "horizontal updates") for seed in (0, 1)
    }
    assert document["protocol"]["data_digest"]
    assert document["commands"][0].startswith("python benchmarks/ablation.py horizontal")
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    assert "## Updates of head pairs" in text
    assert "**as they are** (default)" in text
    output = capsys.readouterr().out
    assert "4 runs made" in output
    assert "0 runs to go" in output
    arguments = ["horizontal", "--rates=4e-3", "--seeds=3", "--jobs=2", "--estimate", *tiny]
    ablation.main(arguments)
    assert capsys.readouterr().out == "2 runs of 3 steps\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gauge"], "unknown question 'gauge'; known: residual-frame,"),
        ([], "name a question"),
        (["betas", "--rates=fast"], "--rates: could not convert"),
        (["betas", "--rates=0"], "--rates: learning rates must be positive numbers"),
        (["betas", "--seeds=0"], "--seeds must be at least 1, got 0"),
        (["betas", "--redo", "--keep"], "choose --redo or --keep, not both"),
        (["betas", "--data=/nowhere"], "/nowhere"),
        (["--report", "--out=/nowhere"], "no runs in /nowhere"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_report_refuses_to_mix_protocols(tmp_path, ablations, fake):
    ablations("betas", seeds=1).run(1)
    longer = replace(CONDITIONS, protocol=Protocol(steps=30))
    ablations("horizontal", seeds=1, conditions=longer).run(1)
    with pytest.raises(UsageError, match="horizontal and betas were made under different"):
        records.write_report(records.load_all(tmp_path), tmp_path)
    assert not (tmp_path / "README.md").exists()
