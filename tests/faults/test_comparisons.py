"""Comparisons that share a folder, are interrupted, run out of disk or lose a worker."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quotientopt import _system
from quotientopt.cli import main
from quotientopt.compare import comparison, record
from quotientopt.compare.protocol import RunFailedError, Trial
from quotientopt.compare.record import crossing
from quotientopt.compare.train import ParallelWorkers
from tests.compare.conftest import corpus, protocol, text_file  # noqa: F401
from tests.faults.conftest import snapshot

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    monkeypatch.setattr(comparison, "available_cores", lambda: 1)


@pytest.fixture
def arguments(text_file, tmp_path):  # noqa: F811
    return [
        "compare", "--optimizers", "adamw", "--data", str(text_file), "--device", "cpu",
        "--steps", "4", "--batch", "2", "--context", "16", "--layers", "1", "--width", "16",
        "--lr-grid", "1e-3", "--jobs", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def read(folder):
    return json.loads((folder / "compare.json").read_text())


def test_a_folder_with_a_comparison_needs_a_word(arguments, tmp_path, refused):
    out = tmp_path / "out"
    assert main(arguments) == 0
    first = read(out)
    refused(tmp_path, *arguments, match=("a comparison of 3 runs", "--resume", "--overwrite"))
    match = "take one"
    refused(tmp_path, *arguments, "--resume", "--overwrite", match=match)
    (out / "notes.txt").write_text("mine")
    assert main([*arguments, "--overwrite", "--lr-grid", "2e-3"]) == 0
    assert {run["trial"]["rate"] for run in read(out)["runs"]} == {2e-3}
    assert read(out)["earlier_commands"] == []
    assert {run["trial"]["rate"] for run in first["runs"]} == {1e-3}
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["compare.json", "compare.md", "compare.png"])
def test_files_of_others_under_these_names(arguments, tmp_path, refused, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    refused(tmp_path, *arguments, match=name)
    if name == "compare.json":
        refused(tmp_path, *arguments, "--overwrite", match=(name, "no record of a comparison"))
        refused(tmp_path, *arguments, "--resume", match=name)


def test_starting_anew_keeps_the_old_record_until_a_run_is_finished(
    arguments, tmp_path, monkeypatch, capsys
):
    assert main(arguments) == 0
    before = snapshot(tmp_path)

    def interrupt(workers):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.SerialWorkers, "collect", interrupt)
    assert main([*arguments, "--overwrite"]) == 130
    assert "nothing written" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_two_comparisons_in_one_folder(arguments, tmp_path, refused, monkeypatch):
    """The second is refused, whatever it was asked for, and the first goes on unharmed."""
    out, tried = tmp_path / "out", []
    collect = comparison.SerialWorkers.collect

    def second(workers):
        if not tried:
            tried.append(1)
            for more in ([], ["--resume"], ["--overwrite"]):
                refused(tmp_path, *arguments, *more, match="another comparison is at work")
        return collect(workers)

    monkeypatch.setattr(comparison.SerialWorkers, "collect", second)
    assert main(arguments) == 0
    assert tried
    assert len(read(out)["runs"]) == 3
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.json",
        "compare.md",
        "compare.png",
    ]
    with _system.locked(out / comparison.LOCK):  # one that was left by a kill is free
        pass


def test_each_command_is_listed_once(arguments, tmp_path):
    assert main(arguments) == 0
    resumed = [*arguments, "--resume"]
    for _ in range(3):
        assert main(resumed) == 0
    text = (tmp_path / "out" / "compare.md").read_text().partition("## Command")[2]
    assert text.count("quotientopt compare") == 2
    assert main([*resumed, "--lr-grid", "2e-3"]) == 0
    assert main(resumed) == 0
    text = (tmp_path / "out" / "compare.md").read_text().partition("## Command")[2]
    assert text.count("quotientopt compare") == 3


@pytest.mark.parametrize("when", ["at the start", "after a run", "in the report"])
def test_a_full_disk(arguments, tmp_path, monkeypatch, capfd, when):
    written = []
    name = {"in the report": "compare.md"}.get(when, "compare.json")
    allowed = {"at the start": 0, "after a run": 2, "in the report": 0}[when]
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            written.append(target)
            if len(written) > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_system.os, "replace", full)
        with pytest.raises(SystemExit) as caught:
            main(arguments)
    assert caught.value.code == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "cannot write in" in errors
    assert "No space left on device" in errors
    files = {path.name for path in (tmp_path / "out").iterdir()}
    if when == "after a run":
        assert len(read(tmp_path / "out")["runs"]) == 1
    assert files <= {"compare.json"}
    assert main([*arguments, "--resume"]) == 0


def test_a_worker_that_is_killed(protocol, corpus):  # noqa: F811
    workers = ParallelWorkers(1, protocol, corpus, lambda *_: None)
    try:
        workers.start(Trial("adamw", 1e-3, {"beta2": 0.95}, 0))
        os.kill(workers._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunFailedError, match=r"adamw.* was killed by SIGKILL"):
            workers.collect()
    finally:
        workers.close()


@pytest.mark.parametrize("error", ["was killed by SIGKILL", "failed: ValueError: odd"])
def test_a_lost_run_ends_in_one_line(arguments, tmp_path, monkeypatch, capfd, error):
    collect, made = comparison.SerialWorkers.collect, []

    def failing(workers):
        if len(made) == 1:
            raise RunFailedError(f"the process running adamw {error}")
        made.append(collect(workers))
        return made[-1]

    monkeypatch.setattr(comparison.SerialWorkers, "collect", failing)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    line = capfd.readouterr().err
    assert len(line.splitlines()) == 1
    for part in (error, "1 runs are reported in", "--resume goes on"):
        assert part in line
    assert len(read(tmp_path / "out")["runs"]) == 1


COMMAND = """
import os, signal, sys, threading, time
from quotientopt.compare import comparison, train
from quotientopt.cli import main

start = train.multiprocessing.context.SpawnProcess.start

def started(process):
    # While the child is being started, as the terminal does: to the whole group.
    threading.Timer(0.05, lambda: os.killpg(os.getpgid(0), signal.SIGINT)).start()
    start(process)
    time.sleep(0.2)

train.multiprocessing.context.SpawnProcess.start = started
comparison.available_cores = lambda: 2
raise SystemExit(main(sys.argv[1:]))
"""


def test_an_interrupt_while_workers_start(arguments, tmp_path):
    arguments = [*arguments, "--jobs", "2", "--steps", "100000"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted, 0 runs are reported" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - start < 45


def test_short_runs_have_a_curve(arguments, tmp_path):
    assert main([*arguments, "--steps", "8", "--optimizers", "adamw,quotient-adam"]) == 0
    document = read(tmp_path / "out")
    assert document["protocol"]["evaluate_every"] == 1
    assert all(len(run["curve"]) == 8 for run in document["runs"])


def test_a_single_evaluation_says_nothing_of_the_way_there():
    assert crossing([[8, 1.0, 2.0]], 2.5) is None
    assert crossing([[8, 1.0, 2.5]], 2.5) == (8.0, 1.0)  # AdamW's own
    assert crossing([[8, 1.0, 2.6]], 2.5) is None
    assert crossing([[8, 1.0, 2.0], [16, 2.0, 1.5]], 2.5) == (8.0, 1.0)


def test_a_plot_of_a_single_evaluation_is_not_empty(arguments, tmp_path, monkeypatch):
    """Two plots that differ in one point differ in more than a line of the legend."""
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (drawn.append(k), plot(self, *a, **k))[1]
    )
    assert main([*arguments, "--steps", "1"]) == 0
    assert [options["marker"] for options in drawn] == ["o", "o"]


def test_the_record_is_found_through_a_link(arguments, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    assert main(arguments) == 0
    assert record.runs_in(tmp_path / "there") == 3
    assert (tmp_path / "out").is_symlink()
