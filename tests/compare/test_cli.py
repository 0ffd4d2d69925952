"""The command from end to end, and one line for every mistake."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from quotientopt.cli import main
from quotientopt.compare import comparison, data, optimizers
from quotientopt.compare.data import IMAGE_DATA, MODEL_DEFAULTS, PIXELS, Images, Labelled
from quotientopt.compare.optimizers import DEFAULT_OPTIMIZERS, OPTIMIZERS

pytest.importorskip("matplotlib")

FILES = ["compare.json", "compare.md", "compare.png"]


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    monkeypatch.setattr(comparison, "available_cores", lambda: 1)


@pytest.fixture
def arguments(text_file, tmp_path):
    return [
        "compare", "--optimizers", "adamw", "--data", str(text_file), "--device", "cpu",
        "--steps", "4", "--batch", "2", "--context", "16", "--lr-grid", "1e-3,2e-3",
        "--jobs", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def read(folder):
    return json.loads((folder / "compare.json").read_text())


def test_compare_from_end_to_end(arguments, tmp_path, capsys):
    assert main([*arguments, "--seeds", "2"]) == 0
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    document = read(folder)
    # Two rates times three beta2, and the best again on seed 1.
    assert len(document["runs"]) == 7
    assert [row["seeds"] for row in document["summary"]] == [2]
    assert document["protocol"]["steps"] == 4
    assert document["environment"]["cores"] >= 1
    assert "--seeds 2" in document["command"]
    output = capsys.readouterr().out
    assert "| adamw |" in output
    assert "compare.png" in output


def test_several_jobs_give_the_same_losses_and_time_alone(arguments, tmp_path):
    assert main([*arguments, "--lr-grid", "adamw=1e-3"]) == 0
    serial = read(tmp_path / "out")
    assert serial["timings"] == {}
    assert main([*arguments, "--lr-grid", "adamw=1e-3", "--jobs", "2", "--overwrite"]) == 0
    parallel = read(tmp_path / "out")
    assert set(parallel["timings"]) == {"adamw"}

    def losses(document):
        runs = sorted(document["runs"], key=lambda run: run["trial"]["settings"]["beta2"])
        return [run["final_loss"] for run in runs]

    assert losses(serial) == pytest.approx(losses(parallel), abs=1e-5)


def test_resume_makes_the_missing_runs_only(arguments, tmp_path, monkeypatch):
    assert main(arguments) == 0
    before = read(tmp_path / "out")["runs"]
    made = count_runs(monkeypatch)
    assert main([*arguments, "--resume", "--lr-grid", "1e-3,2e-3,4e-3"]) == 0
    assert read(tmp_path / "out")["runs"][: len(before)] == before
    assert len(made) == 3


def test_resume_with_more_optimizers_makes_theirs_only(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--width", "32", "--layers", "1"]
    assert main([*arguments, "--seeds", "2"]) == 0
    before = read(tmp_path / "out")
    assert before["protocol"]["width"] == 32
    made = count_runs(monkeypatch)
    both = ["--optimizers", "adamw,quotient-adam", "--seeds", "2", "--resume"]
    assert main([*arguments, *both]) == 0
    after = read(tmp_path / "out")
    assert after["runs"][: len(before["runs"])] == before["runs"]
    assert [run.trial.optimizer for (run,) in made] == ["quotient-adam"] * 7
    assert [row["optimizer"] for row in after["summary"]] == ["adamw", "quotient-adam"]
    assert after["earlier_commands"] == [before["command"]]
    # Runs from different days: every optimizer is timed again, under the same conditions.
    assert set(after["timings"]) == {"adamw", "quotient-adam"}


def test_redo_replaces_the_runs_of_one_optimizer(arguments, tmp_path, monkeypatch):
    both = [*arguments, "--optimizers", "adamw,quotient-adam", "--lr-grid", "1e-3"]
    assert main(both) == 0
    before = read(tmp_path / "out")["runs"]
    made = count_runs(monkeypatch)
    assert main([*both, "--resume", "--redo", "quotient-adam", "--lr-grid", "2e-3"]) == 0
    kept = [run for run in before if run["trial"]["optimizer"] == "adamw"]
    after = read(tmp_path / "out")["runs"]
    assert after[: len(kept)] == kept
    rates = [r["trial"]["rate"] for r in after if r["trial"]["optimizer"] == "quotient-adam"]
    # One for each of its settings.
    assert rates == [2e-3] * 3
    assert len(made) == 3 + 3


def test_resume_needs_the_recorded_optimizers(arguments, tmp_path, monkeypatch, capsys):
    assert main([*arguments, "--optimizers", "quotient-adam", "--lr-grid", "1e-3"]) == 0
    monkeypatch.setattr(optimizers, "OPTIMIZERS", {"adamw": OPTIMIZERS["adamw"]})
    with pytest.raises(SystemExit):
        main([*arguments, "--resume"])
    assert "unknown optimizer 'quotient-adam'" in capsys.readouterr().err


def test_compare_on_images(arguments, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64, dtype=torch.uint8) % 10
    values = torch.randint(256, (64, PIXELS), generator=generator, dtype=torch.uint8)
    part = Labelled(bytes(values.flatten().tolist()), bytes(labels.tolist()))
    monkeypatch.setattr(data, "_fashion_mnist", lambda: Images("fashion-mnist", part, part))
    start = arguments.index("--data")
    del arguments[start : start + 2]
    start = arguments.index("--context")
    del arguments[start : start + 2]
    sizes = ["--model", "vit", "--width", "16", "--layers", "1", "--optimizers", "adamw,muon"]
    assert main([*arguments, *sizes, "--batch", "8", "--lr-grid", "1e-3"]) == 0
    document = read(tmp_path / "out")
    assert document["protocol"]["data"] == "fashion-mnist"
    assert (document["protocol"]["batch"], document["protocol"]["context"]) == (8, 49)
    assert all(0 <= run["final_accuracy"] <= 1 for run in document["runs"])
    assert "nats per image" in (tmp_path / "out" / "compare.md").read_text()


def count_runs(monkeypatch, stop_after=None):
    made = []
    collect = comparison.SerialWorkers.collect

    def counted(workers):
        if stop_after is not None and len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(collect(workers))
        return made[-1]

    monkeypatch.setattr(comparison.SerialWorkers, "collect", counted)
    return made


@pytest.mark.parametrize("finished", [0, 2])
def test_interrupt_leaves_what_was_measured(arguments, tmp_path, monkeypatch, capsys, finished):
    count_runs(monkeypatch, stop_after=finished)
    assert main(arguments) == 130
    folder = tmp_path / "out"
    assert len(read(folder)["runs"]) == finished
    written = FILES if finished else FILES[:2]
    assert sorted(path.name for path in folder.iterdir()) == written
    error = capsys.readouterr().err
    assert error == f"quotientopt: interrupted, {finished} runs are reported in {folder}\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--optimizers", "adamw,sgd"], "unknown optimizer 'sgd'; known: adamw, quotient-adam"),
        (["--optimizers", ""], "unknown optimizer ''"),
        (["--optimizers", "adamw,adamw"], "optimizer 'adamw' is named twice"),
        (["--model", "bert"], "unknown model 'bert'; known: gpt, llama, vit"),
        (["--model", "vit"], "--context is for texts; model 'vit' reads images"),
        (["--data", "mnist-5k"], "model 'gpt' reads text, but data 'mnist-5k' is images"),
        (["--width", "30"], "model 'gpt': width 30 is not a multiple of heads 4"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--redo", "adamw"], "--redo needs --resume"),
        (["--resume", "--redo", "soap"], "--redo 'soap': not among the optimizers"),
        (["--data", "absent.txt"], "data 'absent.txt' is neither 'stdlib', 'shakespeare' nor"),
        (["--data", "text\0"], "nor a readable file"),
        (["--context", "5000"], "too short"),
        (["--device", "tpu"], "unknown device 'tpu'; known: auto, cpu, cuda"),
        (["--lr-grid", "fast"], "bad --lr-grid 'fast'"),
        (["--lr-grid", "soap=1e-3"], "bad --lr-grid 'soap=1e-3'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--out", "/dev/null/folder"], "cannot write in '/dev/null/folder'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_one_line(arguments, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *extra])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("quotientopt: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib", "pytorch_optimizer"])
def test_missing_package_names_the_install_command(arguments, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main([*arguments, "--optimizers", "soap"])
    error = capsys.readouterr().err
    assert f"{package} is not installed: pip install '{package}>=" in error


def test_old_torch_has_no_muon(arguments, monkeypatch, capsys):
    monkeypatch.delattr("torch.optim.Muon", raising=False)
    with pytest.raises(SystemExit):
        main([*arguments, "--optimizers", "muon"])
    assert "muon needs torch 2.9 or later" in capsys.readouterr().err


def test_resume_refuses_another_protocol(arguments, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main([*arguments, "--lr-grid", "1e-3"]) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit):
        main([*arguments, "--resume", "--steps", "5"])
    assert "it was made with steps=4, not 5" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_version_and_module():
    command = [sys.executable, "-m", "quotientopt"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("quotientopt ")
    bare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert bare.stderr.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in fields(comparison.Request):
        if field.name != "command":
            assert f"--{field.name.replace('_', '-')}" in text
    for name in (*OPTIMIZERS, *MODEL_DEFAULTS, *IMAGE_DATA, DEFAULT_OPTIMIZERS):
        assert name in "".join(text.split())  # lines break after hyphens
