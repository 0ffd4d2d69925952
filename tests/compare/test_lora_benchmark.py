"""`benchmarks/lora.py` on tiny random models, without any of its data."""

import importlib
import io
import itertools
import json
import math
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quotientopt.compare.protocol import Run, Seconds, Timing, Trial, UsageError

pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("peft", reason="pip install peft")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    "adamw",
    "loraplus",
    "riemannian",
    "lora-rite",
    "muon",
    "quotient-adam",
    "quotient-adam-polar",
)
PNG = b"\x89PNG"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def encoded(script, kind, count, seed):
    """Random sentences; the target depends on their first token."""
    batches = script("lora_tasks")
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 9, (), generator=generator))
        tokens = torch.randint(1, 40, (length,), generator=generator).tolist()
        if kind == "replies":
            ignored = [batches.IGNORED]
            examples.append(batches.Encoded(tokens, [*ignored, *tokens[2:], *ignored]))
        else:
            target = tokens[0] / 10 if kind == "scores" else tokens[0] % 3
            examples.append(batches.Encoded(tokens, target))
    return examples


def tiny_task(script, kind):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    tasks = script("lora_tasks")
    torch.manual_seed(7)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    if kind == "replies":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
        encoder, output, matrices = model.model, model.lm_head, tasks.LLAMA_MATRICES
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = BertModel(BertConfig(**sizes, **dropout), add_pooling_layer=False)
        output, matrices = None, tasks.MINILM_MATRICES
    encoder.requires_grad_(False)
    if output is not None:
        output.requires_grad_(False)
    return tasks.Task(
        name="tiny",
        kind=kind,
        outputs={"scores": 1, "classes": 3, "replies": 0}[kind],
        encoder=encoder,
        output=output,
        matrices=matrices,
        training=encoded(script, kind, 40, seed=1),
        validation=encoded(script, kind, 10, seed=2),
    )


@pytest.fixture
def protocol(script):
    return script("lora_tasks").LoraProtocol(
        model="tiny",
        data="random",
        steps=6,
        batch=4,
        context=8,
        layers=2,
        width=16,
        evaluate_every=2,
        validation_batches=2,
        rank=2,
        alpha=4,
        autocast=False,
    )


# ---- data ---------------------------------------------------------------------------------------


def test_batches_are_the_same_for_the_same_seed_and_use_every_example_once(script):
    batches = script("lora_tasks")
    examples = [batches.Encoded([n + 1] * (1 + n % 7), float(n)) for n in range(40)]

    def first_epoch(seed):
        return list(itertools.islice(batches.training_batches(examples, 4, 0, seed), 10))

    one, again, other = first_epoch(3), first_epoch(3), first_epoch(4)
    for batch, twin in zip(one, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, twin, strict=True))
    assert any(not torch.equal(a.targets, b.targets) for a, b in zip(one, other, strict=True))
    assert sorted(torch.cat([batch.targets for batch in one]).tolist()) == list(range(40))
    lengths = [batch.mask.sum(1) for batch in one]
    assert all(
        length.max() == batch.tokens.size(1) for length, batch in zip(lengths, one, strict=True)
    )
    assert max(int(length.max() - length.min()) for length in lengths) <= 3


def test_too_few_examples_for_a_batch_are_refused(script):
    batches = script("lora_tasks")
    with pytest.raises(ValueError, match="3 examples do not fill a batch of 4"):
        next(batches.training_batches([batches.Encoded([1], 0.0)] * 3, 4, 0, 0))


def test_validation_spreads_over_the_whole_part(script):
    batches = script("lora_tasks")
    examples = [batches.Encoded([1] * (1 + n % 3), float(n)) for n in range(100)]
    found = batches.validation_batches(examples, 5, 0, 2)
    assert [len(batch.targets) for batch in found] == [5, 5]
    assert sorted(torch.cat([b.targets for b in found]).tolist()) == list(range(0, 100, 10))


def test_only_the_tokens_of_a_reply_are_predicted(script):
    reply_tokens = script("lora_tasks").reply_tokens
    ignored = script("lora_tasks").IGNORED
    whole = reply_tokens([1, 2, 3], [8, 9], 10)
    assert whole.tokens == [1, 2, 3, 8, 9]
    assert whole.target == [ignored, ignored, 8, 9, ignored]
    cut = reply_tokens([1, 2, 3, 4, 5, 6], [7, 8, 9], 6)
    assert cut.tokens == [4, 5, 6, 7, 8, 9]
    assert cut.target == [ignored, ignored, 7, 8, 9, ignored]
    long = reply_tokens([1, 2], [3, 4, 5, 6, 7, 8], 6)
    assert long.tokens == [1, 2, 3, 4, 5, 6]
    assert long.target == [ignored, 3, 4, 5, 6, ignored]


def test_a_missing_package_is_named_with_the_command_that_installs_it(script):
    sources = script("lora_tasks")
    with pytest.raises(UsageError, match=r"pip install --no-deps nowhere-to-be-had==1\.0"):
        sources.installed(("nowhere-to-be-had==1.0", "inside"))
    with pytest.raises(UsageError, match=r"is version .*: pip install --no-deps pytest==0\.1"):
        sources.installed(("pytest==0.1", "inside"))


def test_snippets_come_out_of_the_source_distribution(script, tmp_path):
    sources = script("lora_tasks")
    with pytest.raises(UsageError, match=r"pip download --no-deps --dest .* vaderSentiment==0\.5"):
        sources.snippets(tmp_path)
    text = "\n".join(f"{n}\t{n / 4}\tcafé {n}" for n in range(20)).encode("latin-1")
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        member = tarfile.TarInfo(sources.SNIPPETS_FILE)
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as archive:
        archive.writestr(f"vaderSentiment-0.5/{sources.SNIPPETS_ARCHIVE}", inner.getvalue())
    split = sources.snippets(tmp_path)
    assert split.validation == [("café 0", 0.0), ("café 10", 2.5)]
    assert len(split.training) == 18
    assert split.training[0] == ("café 1", 0.25)


# ---- optimizers and training --------------------------------------------------------------------


def test_posts_come_after_a_head_and_a_blank_line(script, tmp_path, monkeypatch):
    sources = script("lora_tasks")
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    posts = {"train": "b\tone\na\ttwo\n", "test": "a\tthree\n"}
    for part, rows in posts.items():
        (tmp_path / f"20newsgroups-{part}.tab").write_text(head + rows)
    monkeypatch.setattr(sources, "installed", lambda package: tmp_path)
    split = sources.newsgroups()
    assert [(post.text, post.target) for post in split.training] == [("one", 1), ("two", 0)]
    assert [(post.text, post.target) for post in split.validation] == [("three", 0)]


def test_the_contenders_are_those_of_the_report(script):
    assert tuple(script("lora_training").CONTENDERS) == NAMES
    assert set(script("lora_report").STYLES) == set(NAMES)


def available(script, name):
    try:
        script("lora_training").available(script("lora_training").CONTENDERS[name])
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", ["scores", "classes", "replies"])
@pytest.mark.parametrize("name", NAMES)
def test_every_contender_trains_the_adapters_and_nothing_else(script, protocol, name, kind):
    available(script, name)
    task = tiny_task(script, kind)
    training = script("lora_training").Training(Trial(name, 1e-3), protocol, task)
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    reference = script("lora_training").Training(Trial("adamw", 1.0), protocol, task)
    assert training.step().loss == reference.step().loss
    for _ in range(protocol.steps - 1):
        training.step()
    for key, value in training.model.state_dict().items():
        trained = "lora_" in key or (key.startswith("head") and kind != "replies")
        assert torch.equal(value, before[key]) != trained, key
    ups = [up for _, up in script("lora_training").pairs_of(training.model.encoder)]
    assert len(ups) == 2 * len(task.matrices)


def test_a_run_lowers_the_loss_and_is_the_same_again(script, protocol):
    training = script("lora_training")
    task = tiny_task(script, "classes")
    longer = replace(protocol, steps=40)
    run = training.train(Trial("adamw", 1e-2), longer, task)
    again = training.train(Trial("adamw", 1e-2), longer, task)
    assert run.status == "finished"
    assert [point[0] for point in run.curve] == list(range(2, 41, 2))
    assert run.final_loss == run.curve[-1][2] < run.curve[0][2]
    assert 0 <= run.final_accuracy <= 1
    assert (run.training_losses, run.final_loss) == (again.training_losses, again.final_loss)
    assert Run.from_dict(json.loads(json.dumps(run.as_dict()))) == run
    other = training.train(Trial("adamw", 1e-2, seed=1), longer, task)
    assert other.training_losses != run.training_losses


def test_a_run_whose_loss_is_not_finite_has_diverged(script, protocol):
    task = tiny_task(script, "scores")
    run = script("lora_training").train(Trial("adamw", 1e30), protocol, task)
    assert (run.status, run.final_loss) == ("diverged", None)
    assert len(run.training_losses) < protocol.steps


def test_autocast_leaves_factors_and_losses_in_float32(script, protocol):
    task = tiny_task(script, "scores")
    loose = script("lora_training").Training(
        Trial("adamw", 1e-3), replace(protocol, autocast=True), task
    )
    tight = script("lora_training").Training(Trial("adamw", 1e-3), protocol, task)
    batch = task.validation_batches(protocol)[0]
    losses = [training.model.losses(batch) for training in (loose, tight)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert not torch.equal(*losses)
    assert torch.allclose(*losses, rtol=0.1, atol=0.05)
    loose.step()
    assert {p.dtype for p in loose.model.parameters()} == {torch.float32}


# ---- learning rates -----------------------------------------------------------------------------


def drive(search, answer):
    """What a search asks for, each answered, and what it returns."""
    asked = [next(search)]
    while True:
        try:
            asked.append(search.send(answer(asked[-1])))
        except StopIteration as stop:
            return asked, stop.value


def valley(rate):
    return 0.01 * math.log2(rate / 64) ** 2


def test_the_search_goes_on_until_the_best_rate_is_interior(script):
    search = script("lora_summary").search
    tried, losses = drive(search((4.0, 8.0, 16.0), 2.0, cover=False), valley)
    assert tried == [4, 8, 16, 32, 64, 128]
    assert min(losses, key=losses.get) == 64


def test_covering_goes_on_until_both_ends_are_worse(script):
    planning = script("lora_summary")
    tried, losses = drive(planning.search((64.0, 128.0, 32.0), 2.0, cover=True), valley)
    assert tried == [64, 128, 32, 256, 16]
    for end in (min(losses), max(losses)):
        assert losses[end] > planning.TOLERANCE
    endless, _ = drive(planning.search((1.0, 2.0), 2.0, cover=True), lambda rate: 0.0)
    assert len(endless) == planning.MOST_RATES


def test_the_best_rate_is_run_on_the_other_seeds(script):
    finished = []
    plan = script("lora_summary").plan(
        "adamw", (4.0, 8.0, 16.0), finished, settings={}, factor=4.0, cover=False, seeds=3
    )

    def train(trial):
        finished.append(fake_run(trial.rate, [valley(trial.rate)], trial.seed))
        return finished[-1]

    drive(plan, train)
    assert [(run.trial.rate, run.trial.seed) for run in finished] == [
        (4, 0),
        (8, 0),
        (16, 0),
        (64, 0),
        (256, 0),
        (64, 1),
        (64, 2),
    ]


def test_all_rates_are_run_on_all_seeds_on_request(script):
    """The search goes by the mean: on seed 0 alone the smallest rate would be best."""
    finished = []
    plan = script("lora_summary").plan(
        "adamw",
        (32.0, 64.0),
        finished,
        settings={},
        factor=2.0,
        cover=False,
        seeds=2,
        all_seeds=True,
    )

    def train(trial):
        loss = valley(trial.rate) if trial.seed else 1e-3 * trial.rate
        finished.append(fake_run(trial.rate, [loss], trial.seed))
        return finished[-1]

    drive(plan, train)
    tried = [(run.trial.rate, run.trial.seed) for run in finished]
    assert tried == [(rate, seed) for rate in (32, 64, 16) for seed in (0, 1)]
    summary = script("lora_summary")
    row = summary.figures(finished)[0]
    assert row.tuning_seeds == row.seeds == 2
    assert row.rate == 32
    assert row.losses[64] == pytest.approx(0.032)
    assert summary.seeds_of([row]) == "mean over 2 seeds"
    assert summary.figures(finished[:-1])[0].tuning_seeds == 1


def test_rates_given_without_a_search_are_run_alone(script):
    finished = []
    plan = script("lora_summary").plan(
        "adamw", (4.0,), finished, settings={}, factor=1, cover=False, seeds=2
    )

    def train(trial):
        finished.append(fake_run(trial.rate, [1.0], trial.seed))
        return finished[-1]

    drive(plan, train)
    assert [(run.trial.rate, run.trial.seed) for run in finished] == [(4, 0), (4, 1)]


# ---- figures ------------------------------------------------------------------------------------


def fake_run(rate, losses, seed=0, name="adamw"):
    """A run whose validation losses, every ten steps, are given; none: it diverged."""
    seconds = Seconds(0.001, 0.002)
    return Run(
        trial=Trial(name, rate, {}, seed),
        status="finished" if losses else "diverged",
        final_loss=losses[-1] if losses else None,
        curve=[[10 * (i + 1), i + 1.0, loss] for i, loss in enumerate(losses)],
        training_losses=[1.0],
        timing=Timing(seconds, seconds),
        state_bytes=8,
        parameters=2,
        hyperparameters={},
    )


def test_the_range_of_good_rates_is_interpolated(script):
    rate_range = script("lora_summary").rate_range
    found = rate_range({1.0: 0.54, 2.0: 0.5, 4.0: 0.51, 8.0: 0.53})
    assert (found.open_low, found.open_high, found.open) == (False, False, False)
    assert found.low == pytest.approx(2 * 0.5**0.5)
    assert found.high == pytest.approx(4 * 2**0.5)
    assert found.width == pytest.approx(4)
    ended = rate_range({1.0: 0.51, 2.0: 0.5, 4.0: None})
    assert (ended.open_low, ended.open_high) == (True, False)
    assert ended.low == 1
    assert ended.high == pytest.approx(2 * 2**0.02)
    assert rate_range({1.0: None}) is None


def test_steps_count_to_the_best_loss_of_adamw_from_the_same_seed(script):
    runs = [
        fake_run(1e-3, [2.0, 1.0, 1.2]),
        fake_run(1e-3, [2.0, 1.4, 1.3], seed=1),
        fake_run(2e-3, [2.0, 1.5, 1.4]),
        fake_run(1e-2, [1.5, 0.5, 0.4], name="muon"),
        fake_run(1e-2, [2.3, 1.8, 1.4], seed=1, name="muon"),
        fake_run(2e-2, [], name="muon"),
    ]
    adamw, muon = script("lora_summary").figures(runs)
    assert (adamw.rate, adamw.seeds, adamw.best.value) == (1e-3, 2, pytest.approx(1.15))
    assert adamw.final.value == pytest.approx(1.25)
    assert adamw.final.error == pytest.approx(0.05)
    assert adamw.steps_to_target.value == pytest.approx(25)
    # Half way between steps 10 and 20; from seed 1 its loss is never as low as AdamW's 1.3.
    assert muon.steps_to_target.value == pytest.approx(15)
    assert (muon.reached, muon.compared, muon.interior) == (1, 2, False)
    assert muon.losses == {1e-2: 0.4, 2e-2: None}
    assert [point[2] for point in muon.curve] == pytest.approx([1.9, 1.15, 0.9])


def test_runs_of_fewer_steps_are_held_against_the_best_loss_of_full_ones(script):
    full = [fake_run(1e-3, [2.0, 1.0, 1.2]), fake_run(1e-3, [2.0, 1.4, 1.3], seed=1)]
    short = [
        fake_run(1e-2, [1.1], name="muon"),
        fake_run(1e-2, [1.2], seed=1, name="muon"),
        fake_run(1e-2, [0.9], name="lora-rite"),
    ]
    (muon,) = script("lora_summary").shorter_budgets(short, full, 8, 10, 30)
    assert (muon.optimizer, muon.share, muon.rate) == ("muon", pytest.approx(1 / 3), 1e-2)
    assert muon.final.value == pytest.approx(1.15)
    assert muon.excess.value == pytest.approx(0.0)
    assert muon.excess.error == pytest.approx(0.1)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(script, protocol, monkeypatch, tmp_path):
    """`main` on a tiny task, with what it writes in a folder."""
    tasks = script("lora_tasks")
    task = tiny_task(script, "classes")
    recipe = tasks.Recipe(lambda protocol: task, protocol, "tiny", "nats")
    monkeypatch.setitem(tasks.TASKS, "snippets", recipe)

    def run(*arguments):
        script("lora").main([*arguments, "--out", str(tmp_path)])
        return tmp_path

    return run


def test_the_command_records_reports_and_resumes(script, command, monkeypatch, capsys):
    rates = ("--rates", "1e-3,1e-2", "--factor", "1")
    folder = command("--rank", "2", "--optimizers", "adamw,muon", *rates, "--seeds", "2")
    record = json.loads((folder / "rank-2" / "compare.json").read_text())
    trials = [(run["trial"]["optimizer"], run["trial"]["seed"]) for run in record["runs"]]
    assert sorted(trials) == [("adamw", 0)] * 2 + [("adamw", 1)] + [("muon", 0)] * 2 + [("muon", 1)]
    assert record["protocol"]["rank"] == 2
    assert record["environment"]["peft"]
    training = script("lora").train
    made = []
    monkeypatch.setattr(script("lora"), "train", lambda *a: made.append(a[0]) or training(*a))
    names = ("--optimizers", "adamw,muon,loraplus")
    command("--rank", "2", *names, *rates)
    assert [(trial.optimizer, trial.rate) for trial in made] == [
        ("loraplus", 1e-3),
        ("loraplus", 1e-2),
    ]
    command("--rank", "3", "--optimizers", "adamw", *rates)
    report = json.loads((folder / "lora.json").read_text())
    assert list(report["ranks"]) == ["2", "3"]
    assert [row["optimizer"] for row in report["ranks"]["2"]["optimizers"]] == [
        "adamw",
        "loraplus",
        "muon",
    ]
    text = (folder / "lora.md").read_text()
    assert text.count("## Rank") == 2
    assert text.count("| Muon |") == 2
    assert all(
        (folder / f"{name}.png").read_bytes().startswith(PNG)
        for name in ("curves", "learning-rates")
    )
    made.clear()
    command(
        "--rank", "2", "--optimizers", "muon", "--redo", "muon", "--rates", "1e-2", "--factor", "1"
    )
    assert [trial.optimizer for trial in made] == ["muon"]
    redone = json.loads((folder / "rank-2" / "compare.json").read_text())["runs"]
    assert [run["trial"]["rate"] for run in redone if run["trial"]["optimizer"] == "muon"] == [1e-2]


def test_the_report_tells_of_runs_of_fewer_steps_next_to_it(script, command, tmp_path):
    arguments = ("--rank", "2", "--optimizers", "adamw", "--rates", "1e-2", "--factor", "1")
    folder = command(*arguments)
    assert "fewer steps" not in (folder / "lora.md").read_text()
    shorter = tmp_path.with_name(f"{tmp_path.name}-4")
    script("lora").main([*arguments, "--steps", "4", "--out", str(shorter)])
    (folder / "notes.md").write_text("## Left out\n")
    command("--report")
    assert (folder / "lora.md").read_text().endswith("\n## Left out\n")
    assert "| AdamW | 2 | 0.01 | 4 | 67 | 1 |" in (folder / "lora.md").read_text()
    (row,) = json.loads((folder / "lora.json").read_text())["fewer steps"]
    losses = [
        json.loads((path / "rank-2" / "compare.json").read_text())["runs"][0]["curve"]
        for path in (shorter, folder)
    ]
    best = min(point[2] for point in losses[1])
    assert row["excess"]["value"] == pytest.approx(losses[0][-1][2] - best)


def test_a_run_added_meanwhile_by_another_process_is_kept(script, command, monkeypatch):
    rates = ("--rank", "2", "--rates", "1e-3", "--factor", "1")
    training = script("lora").train
    folder = command(*rates, "--optimizers", "adamw")

    def meanwhile(trial, *others):
        if trial.optimizer == "muon":
            monkeypatch.setattr(script("lora"), "train", training)
            command(*rates, "--optimizers", "loraplus")
        return training(trial, *others)

    monkeypatch.setattr(script("lora"), "train", meanwhile)
    command(*rates, "--optimizers", "muon")
    runs = json.loads((folder / "rank-2" / "compare.json").read_text())["runs"]
    assert {run["trial"]["optimizer"] for run in runs} == {"adamw", "loraplus", "muon"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--optimizers", "adam"], "unknown 'adam'"),
        (["--optimizers", "adamw,adamw"], "names 'adamw' twice"),
        (["--rates", "fast"], "needs numbers"),
        (["--rates=-1"], "needs positive numbers"),
        (["--factor", "0.5"], "--factor must be at least 1"),
        (["--factor", "1"], "give --rates"),
        (["--settings", "gamma=1"], "unknown 'gamma'"),
        (["--settings", "beta2"], "NAME=NUMBER"),
        (["--report"], "no record in"),
    ],
)
def test_bad_requests_are_refused_in_one_line(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_record_of_another_protocol_is_not_added_to(command, capsys):
    arguments = ("--optimizers", "adamw", "--rates", "1e-3", "--factor", "1", "--rank", "2")
    command(*arguments)
    with pytest.raises(SystemExit):
        command(*arguments, "--steps", "4")
    assert "it was made with steps=6, not 4" in capsys.readouterr().err
