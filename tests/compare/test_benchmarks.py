"""The scripts in `benchmarks/`, in tiny configurations."""

import importlib
import json
import pickle
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from quotientopt import QuotientAdam, find_symmetries
from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Trial, UsageError
from quotientopt.models import reference_model
from tests.optim.training import small_model, train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PNG = b"\x89PNG"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# ---- step_time.py -------------------------------------------------------------------------------


@pytest.fixture
def small(script, monkeypatch):
    """A setting whose models have two layers of width 32, measured without a process of its own."""
    setting = script("step_timing")
    for name in setting.SHAPES:
        monkeypatch.setitem(setting.SHAPES, name, setting.Shape(2, 32, 2, 60, 16))
    step_time = script("step_time")
    monkeypatch.setattr(step_time, "measure_apart", script("step_time").measure)
    arguments = ["--warmup", "1", "--repeats", "2", "--sequences", "2", "--tokens", "64"]
    return step_time.parse(arguments)[1]


CONTENDERS = (
    "adamw-fused",
    "adamw-foreach",
    "muon",
    "muon2",
    "soap",
    "soap-muon",
    "quotient-adam-heads",
    "quotient-adam",
    "quotient-adam-without-polar",
)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_measured(name, script, small):
    assert tuple(script("step_timing").CONTENDERS) == CONTENDERS
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    elif name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon: pip install 'torch>=2.9'")
    row = json.loads(json.dumps(script("step_time").measure(name, small)))
    step, iteration = row["step"], row["iteration"]
    assert [len(period) for period in step["periods"]] == [10, 10]
    means = [sum(period) / 10 for period in step["periods"]]
    assert step["mean"] == pytest.approx(sum(means) / 2)
    assert step["spread of means"]["smallest"] == pytest.approx(min(means))
    assert step["spread of means"]["largest"] == pytest.approx(max(means))
    assert (step["refresh"] is not None) == name.startswith(("soap", "quotient"))
    assert iteration["extrapolated"]
    assert iteration["model seconds"] == pytest.approx(512 * iteration["model seconds as measured"])
    whole = iteration["optimizer seconds"] + iteration["model seconds"]
    assert iteration["share"] == pytest.approx(iteration["optimizer seconds"] / whole)
    assert row["state bytes"] > 4 * row["parameters"]
    assert row["environment"]["torch"] == torch.__version__
    assert script("step_time").table([row]).count(name) == 1


def test_options_of_the_contenders(script, small):
    contenders = script("step_timing")
    built = {}
    for name in CONTENDERS:
        if name.startswith(("quotient", "adamw")):
            model = reference_model("gpt", 0, layers=2, width=32)
            built[name] = contenders.build_optimizers(name, model, small)[0].defaults
    assert built["adamw-fused"]["fused"]
    assert built["adamw-foreach"]["foreach"]
    options = {
        name: (own["head_frame"], own["residual_frame"], own["polar"])
        for name, own in built.items()
        if name.startswith("quotient")
    }
    assert options == {
        "quotient-adam-heads": ("balanced", None, True),
        "quotient-adam": ("balanced", "per_matrix", True),
        "quotient-adam-without-polar": ("balanced", "per_matrix", False),
    }


def test_laps_are_those_of_the_acts_in_turn(script):
    clock = script("step_timing")
    done = []
    laps = clock.time_laps([lambda: done.append("a"), lambda: done.append("b")], 3, "cpu")
    assert done == ["a", "b"] * 3
    assert [len(lap) for lap in laps] == [2, 2, 2]
    assert all(seconds >= 0 for lap in laps for seconds in lap)


def test_means_hold_the_refresh_and_medians_do_not(script):
    clock = script("step_timing")
    usual, refresh = [1.0] * 9, [11.0]
    found = clock.summarise_periods([usual + refresh, [2.0] * 9 + [12.0], usual + refresh], True)
    assert found["median"] == 1.0
    assert found["mean"] == pytest.approx((2.0 + 3.0 + 2.0) / 3)
    assert found["refresh"] == 11.0
    assert clock.summarise_periods([usual + refresh], False)["refresh"] is None
    measured = clock.summarise_iterations([[4.0, 1.0], [2.0, 3.0]], 32768)
    assert (measured["extrapolated"], measured["share"]) == (False, 0.4)


def test_gpt2_comes_from_transformers_where_it_is_installed(script, small):
    pytest.importorskip("transformers")
    row = script("step_time").measure("quotient-adam", replace(small, model="gpt2-small"))
    assert row["model class"].endswith("GPT2LMHeadModel")
    assert row["iteration"]["share"] > 0
    model = script("step_timing").build_model("gpt2-small")
    assert any(name.endswith("c_attn.bias") for name, _ in model.named_parameters())
    assert {s.rank for s in find_symmetries(model).heads} == {16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_and_state_follow_the_dtype(dtype, script, small):
    row = script("step_time").measure("adamw-foreach", replace(small, dtype=dtype))
    size = 2 if dtype == "bfloat16" else 4
    assert 2 * size * row["parameters"] <= row["state bytes"] < 2.1 * size * row["parameters"]


def test_what_an_optimizer_cannot_do_is_skipped_with_the_reason(script, small):
    measure = script("step_time").measure
    reasons = {
        name: measure(name, replace(small, capturable=True))["skipped"]
        for name in ("muon", "adamw-foreach")
    }
    assert "no option capturable" in reasons["muon"]
    assert "capturable" in reasons["adamw-foreach"]  # torch's own words: not on the CPU
    compiled = measure("quotient-adam", replace(small, compiled=("step",)))
    assert "torch.compile" in compiled["skipped"]
    table = script("step_time").table([compiled])
    assert "quotient-adam skipped: torch.compile" in table


def test_rows_replace_those_of_the_same_setting(script, small, tmp_path, capsys):
    step_time = script("step_time")
    options = ["--repeats", "1", "--warmup", "1", "--iterations", "0", "--out", str(tmp_path)]
    options += ["--sequences", "2", "--tokens", "64"]
    step_time.main(["--optimizers", "adamw-fused,quotient-adam", *options])
    assert "| quotient-adam |" in capsys.readouterr().out
    step_time.main(["--optimizers", "adamw-fused", *options])
    step_time.main(["--optimizers", "adamw-fused", "--dtype", "bfloat16", *options])
    document = json.loads((tmp_path / "step-time-cpu.json").read_text())
    rows = [(row["optimizer"], row["setting"]["dtype"]) for row in document["rows"]]
    assert rows == [
        ("quotient-adam", "float32"),
        ("adamw-fused", "float32"),
        ("adamw-fused", "bfloat16"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step-time-cpu.json"]


def test_work_can_be_sent_to_other_processes(script, small, protocol):
    robustness, measure = script("robustness"), script("step_time")
    twin = robustness.Twin(Trial("adamw", 1e-3), 10.0, "float32")
    for work in ((measure.measure, "muon", small), (robustness.run, twin, protocol)):
        assert pickle.loads(pickle.dumps(work)) == work


def test_a_foreign_record_is_refused_and_kept(script, small, tmp_path):
    (tmp_path / "step-time-cpu.json").write_text("something else")
    with pytest.raises(SystemExit, match="cannot add to"):
        script("step_time").main(["--optimizers", "adamw-fused", "--out", str(tmp_path)])
    assert (tmp_path / "step-time-cpu.json").read_text() == "something else"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--optimizers", "adam"], "unknown optimizer 'adam'"),
        (["--syncs"], "need --device cuda"),
        (["--capturable"], "need --device cuda"),
        (["--tokens", "100"], "--tokens must be a multiple"),
        (["--iterations", "5"], "--iterations must be a multiple of 10"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--autocast", "--dtype", "bfloat16"], "--autocast needs --dtype float32"),
    ],
)
def test_bad_requests_are_refused(arguments, reason, script, capsys):
    with pytest.raises(SystemExit) as refused:
        script("step_time").parse(arguments)
    assert refused.value.code == 2
    assert reason in capsys.readouterr().err


class FakeDevice:
    """Stands in for torch's synchronisation debug mode: a step synchronises as often as told."""

    def __init__(self, counts):
        self.counts, self.steps, self.mode, self.modes = counts, 0, "default", []

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        self.modes.append(mode)

    def step(self):
        count = self.counts[self.steps % len(self.counts)]
        self.steps += 1
        for _ in range(count):
            if self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.mode == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)


@pytest.mark.parametrize(
    ("counts", "refreshes", "refresh", "refused"),
    [
        ([0] * 9 + [7], True, 9, 0),  # synchronises at refreshes only
        ([1] * 9 + [7], True, 9, 9),
        ([0] * 10, True, None, 0),
        ([1] * 10, True, None, 10),
        ([0] * 9 + [7], False, None, 1),
    ],
)
def test_synchronisations_are_counted(counts, refreshes, refresh, refused, script, monkeypatch):
    device = FakeDevice(counts)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", device.set_sync_debug_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = script("step_timing").measure_synchronisations(device.step, refreshes)
    assert found == {
        "per step": counts,
        "refresh step": refresh,
        "steps refused in error mode": refused,
        "steps in error mode": 10 if refresh is None else 9,
    }
    assert device.mode == "default"


# ---- robustness.py ------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path, protocol, text_file):
    """A compare.json of a tiny comparison."""
    rows = [
        {"optimizer": "adamw", "rate": 3e-3, "settings": {"beta2": 0.99}},
        {"optimizer": "quotient-adam", "rate": 2e-3, "settings": {}},
    ]
    document = {"protocol": asdict(protocol) | {"data": str(text_file)}, "summary": rows}
    path = tmp_path / "comparison" / "compare.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    return path


def curves(script, name, protocol, text_file, dtype="float64"):
    robustness = script("robustness")
    settings = dict(OPTIMIZERS[name].settings_grid[0])
    trial = Trial(name, 3e-3, settings)
    protocol = replace(protocol, data=str(text_file))
    before = OPTIMIZERS[name]
    runs = [robustness.run(robustness.Twin(trial, cond, dtype), protocol) for cond in (1.0, 1e3)]
    assert OPTIMIZERS[name] is before
    return runs


def test_twins_start_alike_and_only_quotient_adam_stays_so(script, protocol, text_file):
    report = script("robustness_report")
    reference, twin = curves(script, "quotient-adam", protocol, text_file)
    assert report.first_deviation(twin, reference) < 1e-12
    assert report.deviation(twin, reference) < 1e-8
    reference, twin = curves(script, "adamw", protocol, text_file)
    assert report.first_deviation(twin, reference) < 1e-12
    assert report.deviation(twin, reference) > 1e-4


def test_starts_differ_in_the_condition_number_only(script):
    robustness = script("robustness")
    models = {}
    for cond in (1.0, 100.0):
        models[cond] = reference_model("gpt", 0, layers=2, width=32).double()
        robustness.move_start_(models[cond], cond, 0)
    for one, other in zip(*(find_symmetries(m).heads for m in models.values()), strict=True):
        # left and right are g^{-T}A and gB with g = U s V, U and V the same for both.
        change = other.right[0] @ torch.linalg.pinv(one.right[0])
        values = torch.linalg.svdvals(change)
        ratio = values[..., 0] / values[..., -1]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 100.0))
    plain = reference_model("gpt", 0, layers=2, width=32).double()
    for name, parameter in models[100.0].named_parameters():
        same = torch.equal(parameter, dict(plain.named_parameters())[name])
        assert same == ("attention" not in name)


def test_robustness_writes_record_table_and_plot(script, tuned, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    robustness, out = script("robustness"), tmp_path / "out"
    options = ["--tuned", str(tuned), "--steps", "4", "--evaluate-every", "2", "--jobs", "1"]
    options += ["--conds", "1,1000", "--out", str(out)]
    robustness.main(["--optimizers", "quotient-adam", "--seeds", "2", *options])
    robustness.main(["--optimizers", "adamw", "--rates", "adamw=1e-3", "--keep", *options])
    record = json.loads((out / "robustness.json").read_text())
    rows = {(row["optimizer"], row["cond"]): row for row in record["summary"]}
    assert list(rows) == [(n, c) for n in ("adamw", "quotient-adam") for c in (1.0, 1000.0)]
    assert rows["adamw", 1.0]["rate"] == 1e-3
    assert rows["quotient-adam", 1.0]["rate"] == 2e-3
    assert rows["quotient-adam", 1000.0]["runs"] == 2
    assert rows["quotient-adam", 1.0]["largest_deviation"] == 0
    assert rows["adamw", 1000.0]["largest_deviation"] > 0
    assert len(record["commands"]) == 2
    assert record["protocol"]["steps"] == 4
    assert record["protocol"]["batch"] == 2  # the comparison's
    assert (out / "robustness.png").read_bytes().startswith(PNG)
    table = (out / "robustness.md").read_text()
    assert "| adamw | lr 0.001, beta2 0.99 |" in table
    assert "decoupled" in table
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".md", ".png"]
    with pytest.raises(SystemExit):
        robustness.main(["--optimizers", "adamw", "--keep", "--dtype", "float64", *options])
    assert "made with another protocol" in capsys.readouterr().err


def test_diverged_runs_are_reported_as_such(script, tuned):
    report = script("robustness_report")
    protocol = json.loads(tuned.read_text())["protocol"]
    trial = {"rate": 1.0, "settings": {}}

    def run(cond, seed, losses, status="finished"):
        return {
            "optimizer": "adamw",
            "cond": cond,
            "seed": seed,
            "status": status,
            "trial": trial,
            "final_loss": losses[-1] if status == "finished" else None,
            "curve": [[k, 0.0, loss] for k, loss in enumerate(losses, start=1)],
            "training_losses": [5.0],
        }

    runs = [
        run(1.0, 0, [3.0, 2.0]),
        run(1.0, 1, [3.5, 2.5]),
        run(10.0, 0, [3.1, 2.0]),
        run(10.0, 1, [3.5, 2.3]),
        run(100.0, 0, [3.2], "diverged"),
        run(100.0, 1, [3.5, 2.5]),
    ]
    summary = report.summarise(runs)
    assert [row["diverged"] for row in summary] == [0, 0, 1]
    assert summary[0]["final_loss"] == 2.25
    assert summary[1]["largest_deviation"] == pytest.approx(0.2)
    assert summary[2]["largest_deviation"] is None
    record = {
        "summary": summary,
        "runs": runs,
        "conds": [1.0, 10.0, 100.0],
        "protocol": protocol,
        "dtype": "float32",
        "tuned": "compare.json",
        "environment": {},
        "commands": ["command"],
    }
    table = report.markdown(record)
    assert "| diverged (1 of 2) |" in table
    assert "| 2.0e-01 | – |" in table
    pytest.importorskip("matplotlib")
    assert report.plot(record).startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--conds", "10,100"], "--conds needs 1"),
        (["--conds", "1,0.5"], "--conds needs 1"),
        (["--conds", "1,x"], "--conds needs numbers"),
        (["--rates", "soap=1e-3"], "not among --optimizers"),
        (["--rates", "adamw"], "--rates needs NAME=NUMBER"),
        (["--rates", "adamw=-1"], "--rates needs positive numbers"),
        (["--optimizers", "sgd"], "unknown optimizer 'sgd'"),
        (["--tuned", "missing.json"], "cannot read missing.json"),
    ],
)
def test_robustness_refuses_bad_requests(arguments, reason, script, tuned):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=reason):
        script("robustness").make_request(
            ["--optimizers", "adamw", "--tuned", str(tuned), *arguments]
        )


def test_an_optimizer_without_tuned_rate_is_refused(script, tuned):
    pytest.importorskip("matplotlib")
    document = json.loads(tuned.read_text())
    tuned.write_text(json.dumps(document | {"summary": document["summary"][:1]}))
    with pytest.raises(UsageError, match="no tuned 'quotient-adam'"):
        script("robustness").make_request(
            ["--optimizers", "adamw,quotient-adam", "--tuned", str(tuned)]
        )


def test_the_gpu_run_runs_in_small_without_one(script, tmp_path, capsys, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "run_tests", lambda run: {"status": 0, "last line": ""})
    arguments = ["--device", "cpu", "--small", "--minutes", "0.6", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    runs, tuning = record["training"]["runs"], record["training"]["tuning"]
    assert [row["optimizer"] for row in runs] == list(gpu.RATES)
    steps = {row["curve"][-1][0] for row in runs}
    assert len(steps) == 1
    assert all(row["curve"][-1][2] < 5.5 for row in runs)
    for row in runs:
        own = {r["rate"]: r["curve"][-1][2] for r in tuning if r["optimizer"] == row["optimizer"]}
        assert len(own) >= 3
        assert row["rate"] == min(own, key=own.get)
    assert all("step" in row for row in record["step times"])
    precisions = [r["precision"] for r in record["step times"] if "precision" in r]
    assert precisions == 2 * list(gpu.PRECISIONS)
    assert record["graph"] == {"skipped": "CUDA graphs need a CUDA device"}
    assert "quotient-adam" in capsys.readouterr().out


def test_a_part_of_the_gpu_run_that_fails_leaves_the_others(script, tmp_path, capsys, monkeypatch):
    gpu = script("gpu")

    def fails(run):
        raise RuntimeError("no graph today")

    monkeypatch.setattr(gpu, "run_tests", lambda run: {"status": 0})
    monkeypatch.setattr(gpu, "replay", fails)
    monkeypatch.setattr(gpu, "train_all", lambda run, keep: keep({"runs": []}))
    arguments = ["--device", "cpu", "--small", "--minutes", "0.3", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["error in graph"] == "RuntimeError: no graph today"
    assert record["training"] == {"runs": []}
    assert "no graph today" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("best", "tried"), [(1.0, [1, 2, 0.5]), (2.0, [1, 2, 0.5, 4]), (0.25, [1, 2, 0.5, 0.25])]
)
def test_rates_of_the_gpu_run_climb_towards_the_lower_loss(script, best, tried):
    losses = {}
    found = []
    for rate in script("gpu").climb(1.0, losses):
        found.append(rate)
        losses[rate] = abs(rate - best)
    assert found == tried


def test_rates_of_embeddings_are_measured_apart(script, tmp_path, monkeypatch):
    rates = script("embedding_rates")
    monkeypatch.setattr(rates, "SHAPES", ((256, 1, 3),))
    monkeypatch.setattr(rates, "CONTROLS", ((256, 8e-3, 4e-3),))
    monkeypatch.setattr(rates, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(rates, "RATIOS", (1.0, 0.25))
    record = {"runs": dict(map(rates.run_trial, rates.trials()))}
    assert len({r["loss"] for r in record["runs"].values()}) == 5
    first, second, *_, control = record["runs"].values()
    # Of a stream of width 256 half of what is asked for.
    assert [r["settings"] for r in (first, second)] == [
        {"embedding_scale": 2.0},
        {"embedding_scale": 0.5},
    ]
    assert control["settings"] == {"adamw_rate": 4e-3}
    (tmp_path / "embedding-rates.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["embedding_rates.py", "--report", "--out", str(tmp_path)])
    assert rates.main() == 0
    shown = (tmp_path / "embedding-rates.md").read_text()
    assert f"| 256 | 0.001 | {first['loss']:.3f} | {second['loss']:.3f} |" in shown
    assert f"AdamW's 0.004: {control['loss']:.3f}" in shown
    assert (tmp_path / "embedding-rates.png").stat().st_size > 10_000


def test_experts_are_compared_with_those_of_adamw(script, tmp_path, monkeypatch):
    experts = script("experts")
    for name, plain in ((experts.APART, 6), ("QuotientAdam", 0)):
        optimizer = experts.optimizer_of(name, experts.model_of(0), 1e-3)
        own = [p for group in optimizer._slices.plain for p in group if p.ndim > 1]
        assert len(own) == plain
    monkeypatch.setattr(experts, "RATES", dict.fromkeys(experts.RATES, (8e-3,)))
    short = replace(experts.PROTOCOL, validation_batches=2)
    monkeypatch.setattr(experts, "PROTOCOL", short)
    arguments = ["experts.py", "--steps", "2", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert experts.main() == 0
    runs = json.loads((tmp_path / "experts.json").read_text())["runs"]
    assert len({runs[name]["0.008"]["0"] for name in runs}) == 3
    shown = (tmp_path / "experts.md").read_text()
    assert f"| AdamW | 0.008 (edge) | 1 | {runs['AdamW']['0.008']['0']:.3f} |" in shown


def test_the_gpu_run_asks_for_a_gpu(script, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        script("gpu").main([])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_a_grown_optimizer_makes_frames_every_ten_steps(script):
    """Control: a young one makes them at every step."""
    for grown, expected in ((True, [90, 100]), (False, [*range(2, 17), 18, 20, 22])):
        model = small_model(layers=1)
        optimizer = QuotientAdam(model, lr=1e-3)
        train(model, optimizer, 1)
        if grown:
            script("step_timing").grow_([optimizer, torch.optim.SGD(model.parameters())])
        weight = model.blocks[0].mlp.up.weight
        frame, made = optimizer.state[weight]["residual_frame"].clone(), []
        for _ in range(21):
            train(model, optimizer, 1)
            fresh = optimizer.state[weight]["residual_frame"].clone()
            if not torch.equal(frame, fresh):
                made.append(int(optimizer.state[weight]["step"]))
            frame = fresh
        assert made == expected
