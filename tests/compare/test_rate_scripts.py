"""learning_rates.py and condition_numbers.py of `benchmarks/`, in tiny configurations."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.models import reference_model
from tests.optim.training import twin_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# ---- learning_rates.py --------------------------------------------------------------------------


def test_best_rate_is_the_vertex_of_a_parabola(script):
    best_rate = script("learning_rates").best_rate
    losses = {rate: math.log2(rate / 3e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    rate, interior = best_rate(losses)
    assert rate == pytest.approx(3e-3)
    assert interior
    assert best_rate({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}) == (1e-3, False)
    assert best_rate({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) == (2e-3, True)


def test_laws_scale_updates_and_not_decay(script, protocol):
    rates = script("learning_rates")
    model = reference_model("llama", layers=1, width=32)
    law = rates.Law("", lambda kind, width: 3.0 if kind == "head" else width / 8)
    (optimizer,) = rates.build_law(law)(model, 1e-2, {}, protocol)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-2 * protocol.weight_decay)
        found |= {names[id(p)]: group["lr"] / 1e-2 for p in group["params"]}
    assert found["head.weight"] == pytest.approx(3.0)
    assert found["norm.weight"] == 1.0  # a gain: plain AdamW
    assert found["blocks.0.mlp.up.weight"] == pytest.approx(protocol.width / 8)


def test_update_sizes_are_those_of_a_step(script, protocol, corpus, monkeypatch):
    rates = script("learning_rates")
    monkeypatch.setattr(rates, "PROBED", (1,))
    with rates.Contenders():
        assert "law 4" in OPTIMIZERS
        found = rates.update_sizes(rates.Trial("adamw", 1e-3), protocol, corpus)
    assert "law 4" not in OPTIMIZERS
    # Adam's first update is a matrix of signs.
    assert found["up"]["rms"] == pytest.approx(1, abs=1e-2)
    assert 1 < found["up"]["spread"] < math.sqrt(32)


def test_a_cell_is_measured_once_and_reported(script, protocol, corpus, monkeypatch, tmp_path):
    rates = script("learning_rates")
    monkeypatch.setattr(rates, "load_task", lambda *_: corpus)
    monkeypatch.setattr(rates, "protocol_of", lambda cell, steps: protocol)
    monkeypatch.setattr(rates, "RATES", (1e-3, 2e-3, 4e-3))
    monkeypatch.setattr(rates, "PROBED", (2, 4))
    record = rates.Record(tmp_path)
    names = ["adamw", "quotient-adam", *rates.LAWS, *list(rates.PARTS)[:1]]
    with rates.Contenders():
        rates.measure(record, "gpt-32-2", names, 10)
    written = json.loads(record.path.read_text())["cells"]["gpt-32-2"]
    assert set(written["losses"]) == set(names)
    monkeypatch.setattr(rates, "train", lambda *_: pytest.fail("trained again"))
    with rates.Contenders():
        rates.measure(rates.Record(tmp_path), "gpt-32-2", names, 10)
    text = rates.table(record.content)
    assert text.count("gpt-32-2") == 1 + 2 + len(rates.LAWS) + 1
    assert rates.plot(record.content).startswith(b"\x89PNG")


# ---- condition_numbers.py -----------------------------------------------------------------------


def test_condition_of_known_pairs(script):
    numbers = script("condition_numbers")
    rows = torch.eye(3, 5, dtype=torch.float64)
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    ((condition, size),) = numbers.of_factors(rows / scale[:, None], rows * scale[:, None])
    assert condition == pytest.approx(100)  # g² BBᵀ g² = AAᵀ for g = 1/scale
    assert size == pytest.approx((1.0101 / 10101) ** 0.5, rel=1e-6)
    assert numbers.of_factors(rows, 3 * rows)[0][0] == pytest.approx(1)
    assert numbers.of_factors(torch.zeros(3, 5), rows)[0][0] == math.inf


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_change_of_gauge_shows_in_the_condition(script, name):
    numbers = script("condition_numbers")
    model = reference_model(name, layers=1, width=32).double()
    qo.dress_(model, "balanced")
    for pairs in numbers.of_model(model).values():
        assert max(condition for condition, _ in pairs) == pytest.approx(1, abs=1e-6)
    twin, _ = twin_of(model, cond=30)
    value_pairs = numbers.of_model(twin)["vo"]
    # The symmetric element leads back from where any other of its condition led.
    assert all(condition == pytest.approx(30, rel=1e-6) for condition, _ in value_pairs)


def test_smoothing_is_a_gauge_and_moves_activations(script):
    numbers = script("condition_numbers")
    model = reference_model("llama", layers=1, width=32).double()
    x = torch.randint(256, (2, 8))
    before = model(x)
    # Loud values in one channel, as outliers of activations are.
    output = model.blocks[0].attention.output.weight
    largest = numbers.largest_inputs(model, [output], {"tokens": x})[id(output)]
    smoothed = numbers.smoothed_(model, 0.5, {"tokens": x})
    assert (smoothed(x) - before).abs().max() < 1e-12
    after = numbers.largest_inputs(model, [output], {"tokens": x})[id(output)]
    assert (after / largest - 1).abs().max() > 0.1
    # With α = ½ and a head to itself, a channel and its column end equally large.
    weight = output.abs().amax(0)
    grouped = torch.stack([after, weight]).unflatten(1, (2, 2, -1)).amax(2)
    assert (grouped[0] / grouped[1]).log().abs().min() < 1e-9


def test_pruning_rounding_and_merging(script):
    numbers = script("condition_numbers")

    def model():
        return reference_model("gpt", layers=1, width=32)

    matrices = numbers.pair_matrices(numbers.pruned_(model(), 0.5))
    assert len(matrices) == 4
    assert all(int((m == 0).sum()) == 512 for m in matrices)
    halves = numbers.pair_matrices(numbers.two_of_four_(model()))
    assert all(bool(((m == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()) for m in halves)
    kept = numbers.pair_matrices(model())[0].unflatten(-1, (-1, 4))
    assert torch.equal(halves[0].unflatten(-1, (-1, 4)).abs().amax(-1), kept.abs().amax(-1))
    rounded = numbers.pair_matrices(numbers.rounded_(model()))[0].unflatten(-1, (-1, 32))
    levels = rounded / rounded.abs().amax(-1, keepdim=True) * 7
    assert (levels - levels.round()).abs().max() < 1e-5

    ones, twos, base = (nn.Linear(2, 2, bias=False) for _ in range(3))
    for linear, value in ((ones, 1.0), (twos, 2.0), (base, 0.5)):
        nn.init.constant_(linear.weight, value)
    assert torch.equal(numbers.merged(ones, twos, base, 0.5).weight, torch.full((2, 2), 1.5))
    assert torch.equal(numbers.merged(ones, twos, base, 1.0).weight, torch.full((2, 2), 2.5))


def test_table_and_plot_of_conditions(script):
    numbers = script("condition_numbers")
    rows = [numbers.row("m", "s", "qk", [(1.0, 1.0), (200.0, 2.0), (2000.0, 0.5)])]
    assert rows[0]["condition"] == {"median": 200.0, "90 %": 200.0, "largest": 2000.0}
    assert rows[0]["above"]["1000"] == pytest.approx(1 / 3)
    assert "| m | s | 3 qk | 200 | 200 | 2e+03 | 67 % | 0.5 … 2 |" in numbers.table({"rows": rows})
    assert numbers.plot({"rows": rows}).startswith(b"\x89PNG")
