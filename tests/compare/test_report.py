"""The figures and files of the report, from hand-made runs."""

import json
import math
from dataclasses import replace

import pytest

from quotientopt._system import write_atomically
from quotientopt.compare.protocol import Protocol, Seconds, Timing, Trial, UsageError
from quotientopt.compare.record import Record, crossing, prepare_folder, summarize
from quotientopt.compare.report import markdown, plot


@pytest.fixture
def record(make_run):
    runs = [
        make_run("adamw", 1e-3, (4.0, 3.5, 3.2), beta2=0.95),
        make_run("adamw", 2e-3, (4.0, 3.0, 2.0), beta2=0.95),
        make_run("adamw", 2e-3, (4.2, 3.2, 2.2), seed=1, beta2=0.95),
        make_run("adamw", 4e-3, (), beta2=0.95),
        make_run("soap", 1e-3, (2.6, 1.6, 1.0), seconds=1.0),
    ]
    return Record("quotientopt compare", Protocol(steps=30), {"cores": 2}, runs)


def test_crossing_interpolates_between_evaluations():
    curve = [[25, 2.0, 3.0], [50, 4.0, 2.0], [75, 6.0, 2.5], [100, 8.0, 1.0]]
    assert crossing(curve, 2.5) == (37.5, 3.0)
    assert crossing(curve, 2.0) == (50.0, 4.0)
    assert crossing(curve, 1.75) == (87.5, 7.0)
    assert crossing(curve, 3.5) == (25.0, 2.0)
    assert crossing(curve, 0.5) is None
    assert crossing([], 0.5) is None


def test_summary_of_each_optimizer(record):
    adamw, soap = summarize(record.runs, {})
    assert (adamw.rate, adamw.settings, adamw.interior) == (2e-3, {"beta2": 0.95}, True)
    assert (adamw.seeds, adamw.diverged) == (2, 0)
    assert adamw.loss == pytest.approx(2.1)
    assert adamw.standard_error == pytest.approx(0.1)
    assert (adamw.steps_to_target, adamw.steps_fraction) == (30, 1.0)
    assert (soap.interior, soap.standard_error) == (False, None)
    # Target 2.1, halfway between 2.6 at step 10 and 1.6 at step 20, at a second per step.
    assert soap.steps_to_target == pytest.approx(15)
    assert soap.steps_fraction == pytest.approx(0.5)
    assert soap.seconds_to_target == pytest.approx(15)
    assert soap.seconds_fraction == pytest.approx(1.0)
    assert soap.share == pytest.approx(0.2)


def test_steps_timed_alone_replace_the_runs_own_seconds(record):
    alone = {"soap": Timing(Seconds(0.0, 0.1), Seconds(0.0, 0.3))}
    soap = summarize(record.runs, alone)[1]
    assert soap.seconds_to_target == pytest.approx(15 * 0.4)
    assert soap.share == pytest.approx(0.25)


def test_without_adamw_there_is_no_target(make_run):
    (row,) = summarize([make_run("soap")], {})
    assert row.steps_to_target is None


def test_diverged_seeds_are_left_out_and_counted(make_run):
    runs = [make_run(losses=(3.0, 2.0)), make_run(losses=(), seed=1)]
    (row,) = summarize(runs, {})
    assert (row.loss, row.diverged, row.seeds) == (2.0, 1, 2)
    (row,) = summarize([make_run(losses=())], {})
    assert (row.loss, row.curve, row.steps_to_target) == (None, [], None)


def test_report_tells_what_it_knows(record):
    text = markdown(record)
    assert "| adamw | lr 0.002, beta2 0.95 | 2.1000 ± 0.1000 | 30 (100%) |" in text
    assert "| soap | lr 0.001 (edge) | 1.0000 | 15 (50%) | 15.0 (100%) | 100.00 (100.00) |" in text
    assert "| adamw | lr 0.004, beta2 0.95 | 0 | diverged | – |" in text
    assert "best learning rate of soap lies on the edge" in text
    assert "| cores | 2 |" in text
    assert "## Command\n\n```\nquotientopt compare\n```" in text
    assert "accuracy" not in text
    assert "text `stdlib`, 30 steps of 16 × 128 tokens," in text


def test_report_on_images_gives_accuracies(make_run):
    runs = [
        replace(make_run("adamw", 1e-3, (2.0, 1.0)), final_accuracy=0.8),
        replace(make_run("adamw", 1e-3, (2.0, 1.2), seed=1), final_accuracy=0.7),
    ]
    protocol = Protocol(model="vit", data="fashion-mnist", batch=64, steps=20)
    text = markdown(Record("quotientopt compare", protocol, {}, runs))
    assert "| final validation loss | final accuracy | steps to AdamW's loss |" in text
    assert "| 1.1000 ± 0.1000 | 75.00% | 20 (100%) |" in text
    assert "images `fashion-mnist`, 20 steps of 64 images," in text
    assert "nats per image" in text


def test_report_and_plot_without_runs(tmp_path):
    record = Record("quotientopt compare", Protocol(), {})
    assert "No run was finished." in markdown(record)
    plot(record, tmp_path / "compare.png")
    assert list(tmp_path.iterdir()) == []


def test_plot_is_written(record, tmp_path):
    pytest.importorskip("matplotlib")
    plot(record, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]


@pytest.mark.parametrize(
    "settings", [{}, {"embedding_scale": 2.0}, {"embedding_scale": 0.5, "weight_decay": 0.03}]
)
def test_the_legend_fits(record, make_run, tmp_path, monkeypatch, settings):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    found = []
    draw = FigureCanvasAgg.print_png
    monkeypatch.setattr(
        FigureCanvasAgg, "print_png", lambda self, *a: (found.append(self.figure), draw(self, *a))
    )
    for name in ("quotient-adam", "quotient-adam-leading", "quotient-adam-hidden", "soap-muon"):
        record.runs.append(make_run(name, 2e-3, (4.0, 3.0, 2.0), **settings))
    plot(record, tmp_path / "compare.png")
    (figure,) = found
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_record_is_written_atomically(record, tmp_path, monkeypatch):
    record.save(tmp_path)
    before = (tmp_path / "compare.json").read_text()
    document = json.loads(before)
    assert document["schema"] == 1
    assert [run["trial"]["optimizer"] for run in document["runs"]] == ["adamw"] * 4 + ["soap"]

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
    assert (tmp_path / "compare.json").read_text() == before


def test_record_refuses_values_json_does_not_have(tmp_path, record):
    record.environment["bad"] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resume_takes_over_the_runs(record, tmp_path):
    record.save(tmp_path)
    fresh = Record("again", Protocol(steps=30), {})
    fresh.resume(tmp_path)
    assert fresh.runs == record.runs
    assert fresh.find(Trial("soap", 1e-3)) == record.runs[-1]
    assert fresh.find(Trial("soap", 1e-3, seed=1)) is None
    assert "## Commands\n\n```\nquotientopt compare\nagain\n```" in markdown(fresh)
    fresh.save(tmp_path)
    third = Record("third", Protocol(steps=30), {})
    third.resume(tmp_path, redo=["adamw"])
    assert third.runs == record.runs[-1:]
    assert third.earlier_commands == ["quotientopt compare", "again"]
    assert third.resumed
    # By the same command too, whose steps are then timed together with those taken over.
    same = Record("quotientopt compare", Protocol(steps=30), {})
    assert not same.resumed
    same.resume(tmp_path)
    assert same.resumed


def test_different_numbers_of_seeds_are_said(record, make_run):
    line = "Seeds: adamw 2, soap 1. Means over other seeds differ"
    assert line in markdown(record)
    record.runs.append(make_run("soap", 1e-3, (2.6, 1.6, 1.1), seed=1))
    assert "Seeds:" not in markdown(record)


def test_resume_reads_records_made_before_accuracies(record, tmp_path):
    record.save(tmp_path)
    path = tmp_path / "compare.json"
    document = json.loads(path.read_text())
    del document["earlier_commands"]
    for run in document["runs"]:
        del run["final_accuracy"]
    path.write_text(json.dumps(document))
    fresh = Record("again", Protocol(steps=30), {})
    fresh.resume(tmp_path)
    assert fresh.runs == record.runs


@pytest.mark.parametrize("change", [{"width": 64}, {"layers": 2}, {"model": "llama"}])
def test_resume_refuses_another_geometry(record, tmp_path, change):
    record.save(tmp_path)
    (name,) = change
    with pytest.raises(UsageError, match=f"made with {name}="):
        Record("again", Protocol(steps=30, **change), {}).resume(tmp_path)


def test_resume_refuses_a_protocol_with_unknown_settings(record, tmp_path):
    record.save(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text(path.read_text().replace('"width": 128', '"width": 128, "dropout": 0.1'))
    with pytest.raises(UsageError, match=r"made with dropout=0.1, not None"):
        Record("again", Protocol(steps=30), {}).resume(tmp_path)


def test_resume_without_a_file_starts_afresh(tmp_path):
    fresh = Record("again", Protocol(), {})
    fresh.resume(tmp_path)
    assert fresh.runs == []


def test_resume_refuses_another_protocol_and_broken_files(record, tmp_path):
    record.save(tmp_path)
    with pytest.raises(UsageError, match=r"made with batch=16, not 8; |steps=30, not 40"):
        Record("again", Protocol(steps=40, batch=8), {}).resume(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(UsageError, match="its schema is 0, not 1"):
        Record("again", Protocol(steps=30), {}).resume(tmp_path)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot resume"):
        Record("again", Protocol(steps=30), {}).resume(tmp_path)


def test_folder_is_probed_and_left_empty(tmp_path):
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    write_atomically(tmp_path / "file", "x")
    with pytest.raises(UsageError, match="cannot write in"):
        prepare_folder(tmp_path / "file")
