"""What ``--overwrite`` replaces, what it keeps, and what kills and other runs leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from quotientopt import _system
from quotientopt.checkpoints import CheckpointError, dress_checkpoint, writing
from quotientopt.cli import main
from tests.faults.conftest import snapshot


def dress(source, out, *more):
    return main([str(part) for part in ("dress", source, "--out", out, *more)])


# ---- nothing is removed that is no checkpoint's -------------------------------------------------


def test_a_folder_that_is_no_checkpoint_is_refused(source, tmp_path, refused):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "thesis.tex").write_text("ten years")
    arguments = ("dress", source, "--overwrite", "--out", out)
    refused(tmp_path, *arguments, match=("is no checkpoint", "choose another --out"))
    (out / "config.json").write_text('{"editor": "vi"}')  # of something else
    (out / "model.safetensors").write_text("a name alone")
    refused(tmp_path, *arguments, match="is no checkpoint")
    (out / "config.json").write_text("[" * 100_000)
    refused(tmp_path, *arguments, match="is no checkpoint")


def test_a_checkpoint_is_replaced_and_other_files_stay(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "sub" / "empty").mkdir(parents=True)
    (out / "sub" / "thesis.tex").write_text("ten years")
    (out / "notes.txt").write_text("mine")
    (out / "link").symlink_to("sub/thesis.tex")
    (out / "folder").symlink_to("sub")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier copy")
    (out / "model.safetensors.index.json").write_text("{}")
    weights = (out / "model.safetensors").read_bytes()
    assert dress(source, out, "--overwrite") == 0
    assert (out / "sub" / "thesis.tex").read_text() == "ten years"
    assert (out / "sub" / "empty").is_dir()
    assert (out / "notes.txt").read_text() == "mine"
    assert os.readlink(out / "link") == "sub/thesis.tex"
    assert os.readlink(out / "folder") == "sub"
    assert (out / "model.safetensors").read_bytes() != weights
    assert not list(out.glob("model*index.json")) + list(out.glob("model-0*"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_a_file_system_without_hard_links(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "notes.txt").write_text("mine")

    def without(*_, **__):
        raise OSError(38, "not here")

    monkeypatch.setattr(writing.os, "link", without)
    assert dress(source, out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_another_file_of_the_same_name_is_not_replaced(source, tmp_path, refused):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (source / "notes.txt").write_text("the model's")
    (out / "notes.txt").write_text("mine")
    arguments = ("dress", source, "--overwrite", "--out", out)
    refused(tmp_path, *arguments, match=("out/notes.txt", "no file of a checkpoint"))
    (out / "notes.txt").write_text("the model's")
    assert dress(source, out, "--overwrite") == 0


@pytest.mark.parametrize("name", ["optimizer.pt", "global_step100", "adapter_config.json"])
def test_a_training_run_or_an_adapter_at_the_target(source, tmp_path, refused, name):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / name).write_text("{}")
    arguments = ("dress", source, "--overwrite", "--out", out)
    refused(tmp_path, *arguments, match=(name, "belongs to the weights"))


def test_a_single_file_that_holds_no_weights(source, tmp_path, refused):
    weights, out = source / "model.safetensors", tmp_path / "out.safetensors"
    out.write_text("a thesis under an odd name")
    config = ("--config", source / "config.json")
    arguments = ("dress", weights, *config, "--overwrite", "--out", out)
    refused(tmp_path, *arguments, match="replaces weights only")
    shutil.copyfile(weights, out)
    assert main([str(part) for part in arguments]) == 0
    assert out.read_bytes() != weights.read_bytes()


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_records_replace_no_other_file(source, tmp_path, refused, option):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    target = tmp_path / "thesis.png"
    for content in (b"ten years", b"\x89PNG\r\n\x1a\n of a cat", b'{"mine": 1}'):
        target.write_bytes(content)
        arguments = ("inspect", source, "--no-verify", option, target)
        refused(tmp_path, *arguments, match=("thesis.png", "another file"))
    target.unlink()
    arguments = [str(part) for part in arguments]
    assert main(arguments) == 0
    first = target.read_bytes()
    assert main(arguments) == 0  # its own it replaces
    assert len(target.read_bytes()) == len(first)


# ---- links --------------------------------------------------------------------------------------


def test_a_link_stands_for_its_folder(source, tmp_path):
    shutil.copytree(source, tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    before = (tmp_path / "there" / "model.safetensors").read_bytes()
    assert dress(source, tmp_path / "link", "--overwrite") == 0
    assert os.readlink(tmp_path / "link") == "there"
    assert (tmp_path / "there" / "model.safetensors").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link", "source"}


def test_a_link_stands_for_its_file(source, tmp_path):
    weights, config = source / "model.safetensors", source / "config.json"
    shutil.copyfile(weights, tmp_path / "there.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to("there.safetensors")
    assert dress(weights, link, "--overwrite", "--config", config) == 0
    assert link.is_symlink()
    assert (tmp_path / "there.safetensors").read_bytes() != weights.read_bytes()


def test_links_to_nothing_and_round_in_circles(source, tmp_path, refused):
    for name, to in (("dangling", "nowhere"), ("one", "other"), ("other", "one")):
        (tmp_path / name).symlink_to(to)
    for name in ("dangling", "one"):
        refused(tmp_path, "dress", source, "--out", tmp_path / name, match="is a link to nothing")
        refused(tmp_path, "dress", tmp_path / name, "--out", tmp_path / "out", match=name)
        refused(tmp_path, "inspect", tmp_path / name, match=name)


def test_links_inside_the_source(source, tmp_path, refused):
    for to, match in ((".", "leads back"), ("..", "leads back"), ("nowhere", "leads to nothing")):
        (source / "link").symlink_to(to)
        refused(tmp_path, "dress", source, "--out", tmp_path / "out", match=("link", match))
        (source / "link").unlink()
    os.mkfifo(source / "pipe")
    match = ("pipe", "neither a file nor a folder")
    refused(tmp_path, "dress", source, "--out", tmp_path / "out", match=match)


# ---- kills, and two at once ---------------------------------------------------------------------

KILLED = """
import os, signal, sys
from quotientopt.checkpoints import writing
from quotientopt.cli import main

def die(*_):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

where = writing.Destination if sys.argv[2] == "commit" else writing
setattr(where, sys.argv[2], die)
raise SystemExit(main(sys.argv[3:]))
"""


def killed(kind, where, source, out):
    arguments = ("dress", str(source), "--out", str(out), "--overwrite")
    return subprocess.run(
        [sys.executable, "-c", KILLED, kind, where, *arguments], capture_output=True, text=True
    )


def test_a_kill_leaves_a_copy_that_the_next_run_removes(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    before = snapshot(out)
    done = killed("SIGKILL", "commit", source, out)
    assert done.returncode == -signal.SIGKILL
    assert snapshot(out) == before
    assert (tmp_path / ".out.quotientopt" / "new" / "model.safetensors").is_file()
    assert dress(source, tmp_path / "elsewhere") == 0  # the next run, wherever it writes
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source", "elsewhere"}


def test_an_orderly_kill_leaves_nothing(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    before = snapshot(tmp_path)
    done = killed("SIGTERM", "commit", source, out)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "quotientopt: terminated"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("renamed", [False, True], ids=["between the renames", "after them"])
def test_a_kill_while_a_checkpoint_is_replaced(source, tmp_path, renamed):
    """The old one is put back, or its remains removed, and nothing of others with them."""
    out, work = tmp_path / "out", tmp_path / ".out.quotientopt"
    shutil.copytree(source, out)
    (out / "notes.txt").write_text("mine")
    work.mkdir()
    (work / "lock").touch()
    if renamed:
        shutil.copytree(out, work / "old")
    else:
        os.rename(out, work / "old")
    shutil.copytree(source, work / "new")
    before = (work / "old" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="there already"):
        dress_checkpoint(source, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() == before
    assert not work.exists()


def test_files_that_only_an_interrupted_run_holds_are_not_removed(source, tmp_path, refused):
    out, work = tmp_path / "out", tmp_path / ".out.quotientopt"
    shutil.copytree(source, out)
    (work / "old").mkdir(parents=True)
    (work / "old" / "notes.txt").write_text("mine")
    (work / "lock").touch()
    arguments = ("dress", source, "--out", out, "--overwrite")
    with pytest.raises(SystemExit):
        main([str(part) for part in arguments])
    assert (work / "old" / "notes.txt").read_text() == "mine"


def test_two_runs_at_once(source, tmp_path, refused):
    out = tmp_path / "out"
    work = tmp_path / ".out.quotientopt"
    work.mkdir()
    with _system.locked(work / "lock"):
        refused(tmp_path, "dress", source, "--out", out, match="another run is writing")
        assert dress(source, tmp_path / "elsewhere") == 0
    work.rmdir()
    assert dress(source, out) == 0


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    """Eight threads that take it in turn: never two inside, and no file left."""
    inside, worst, turns = [0], [0], [0]
    end = time.monotonic() + 1.0

    def work():
        while time.monotonic() < end:
            try:
                with _system.locked(tmp_path / "lock"):
                    inside[0] += 1
                    worst[0] = max(worst[0], inside[0])
                    time.sleep(0.001)
                    inside[0] -= 1
                    turns[0] += 1
            except _system.LockedError:
                time.sleep(0.0002)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst[0] == 1
    assert turns[0] > 10
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_through_links(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    _system.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


# ---- odd folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inspect", "dress"])
def test_odd_folders_are_named(source, tmp_path, refused, name):
    more = ("--out", tmp_path / "out") if name == "dress" else ("--no-verify",)
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    refused(tmp_path, name, source, *more, match=("adapter beside a model", "merge_and_unload"))
    (source / "adapter_config.json").unlink()
    config = (source / "config.json").read_text()
    (source / "config.json").unlink()
    (source / "model_index.json").write_text("{}")
    refused(tmp_path, name, source, *more, match="a pipeline of diffusers")
    (source / "model_index.json").unlink()
    (source / "checkpoint-500").mkdir()
    (source / "checkpoint-500" / "config.json").write_text(config)
    refused(tmp_path, name, source, *more, match="checkpoint-500 in it has")
    (source / "config.json").mkdir()
    refused(tmp_path, name, source, *more, match=("config.json", "it is a folder"))
    (source / "config.json").rmdir()
    (source / "config.json").symlink_to("nowhere")
    refused(tmp_path, name, source, *more, match=("config.json", "a link to nothing"))
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(json.loads(config)))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refused(tmp_path, name, source, *more, match=("model.safetensors", "it is a folder"))


def test_a_refusal_makes_no_folders(source, tmp_path, refused):
    (source / "model.safetensors").write_bytes(b"nonsense")
    refused(tmp_path, "dress", source, "--out", tmp_path / "a" / "b" / "c", match="cannot read")
    refused(tmp_path, "dress", source, "--out", tmp_path / "source.x" / "c", match="cannot read")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_names_of_the_hub_are_not_fetched(tmp_path, refused, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "inspect", name, match=("no such file or folder", "hub are not fetched"))
