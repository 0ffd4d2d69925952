"""What goes around the optimizer in `benchmarks/wrappers.py`: its laws, and what is reported."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import quotientopt as qo
from tests.optim.training import small_model, train, twin_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import wrappers

STEPS = 12
MAKERS = {
    "outer": lambda: wrappers.outer_nesterov(4, 0.5, 0.8),
    "cautious": lambda: wrappers.cautious_decay(0.2),
    "norm": lambda: wrappers.fixed_norm(0.05),
}


def losses(model, make):
    own = copy.deepcopy(model)
    inner = qo.QuotientAdam(own, lr=wrappers.RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return train(own, wrappers.Wrapped(inner, make()), STEPS)


@pytest.mark.parametrize("name", MAKERS)
def test_twins_stay_together(name, monkeypatch):
    model = small_model("gpt")
    twin, element = twin_of(model, cond=100.0)
    assert "residual" in element
    assert (losses(model, MAKERS[name]) - losses(twin, MAKERS[name])).abs().max() < 1e-10
    # The control: norms and masks of the weights as they are stored.
    monkeypatch.setattr(wrappers.Dressed, "into", lambda self, weights: weights)
    monkeypatch.setattr(wrappers.Dressed, "back", lambda self, weights: weights)
    apart = (losses(model, MAKERS[name]) - losses(twin, MAKERS[name])).abs().max()
    assert apart < 1e-10 if name == "outer" else apart > 1e-4


def test_norms_stay_and_wrappers_do_something():
    model = small_model("gpt")
    inner = qo.QuotientAdam(model, lr=wrappers.RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = wrappers.Wrapped(inner, wrappers.fixed_norm(0.05))
    train(model, optimizer, 1)

    def norms():
        own = [d for d in wrappers.Dressed.all_of(inner) if not d.bucket.embedding]
        return torch.cat([wrappers.norm_of(d.into(d.bucket.weights())).flatten() for d in own])

    before = norms()
    train(model, optimizer, 5, seed=1)
    assert torch.allclose(norms(), before, rtol=1e-12)
    plain = qo.QuotientAdam(model, lr=wrappers.RATE, betas=(0.9, 0.95), weight_decay=0.0)
    train(model, plain, 2, seed=2)
    own = [d for d in wrappers.Dressed.all_of(plain) if not d.bucket.embedding]
    after = torch.cat([wrappers.norm_of(d.into(d.bucket.weights())).flatten() for d in own])
    assert not torch.allclose(after, before, rtol=1e-3)
    start = losses(small_model("gpt"), lambda: lambda optimizer: optimizer.step())
    for make in MAKERS.values():
        assert (losses(small_model("gpt"), make) - start).abs().max() > 1e-4


def test_decay_is_cautious():
    """Where the update is towards zero the dressed weight decays, elsewhere it does not."""
    weights = {}
    for decay in (0.0, 0.5):
        model = small_model("gpt")
        inner = qo.QuotientAdam(model, lr=wrappers.RATE, betas=(0.9, 0.95), weight_decay=0.0)
        train(model, wrappers.Wrapped(inner, wrappers.cautious_decay(decay)), 1)
        weights[decay] = [(d, d.into(d.bucket.weights())) for d in wrappers.Dressed.all_of(inner)]
    start = small_model("gpt")
    inner = qo.QuotientAdam(start, lr=wrappers.RATE, betas=(0.9, 0.95), weight_decay=0.0)
    buckets = inner._current_engine().buckets
    for bucket, (frames, without), (_, decayed) in zip(
        buckets, weights[0.0], weights[0.5], strict=True
    ):
        before = frames.into(bucket.weights())
        towards = (without - before) * before <= 0
        rate = wrappers.RATE * wrappers.scale_of(bucket.slices[0], inner.param_groups[0])
        expected = torch.where(towards, rate * 0.5 * before, 0.0)
        assert (without - decayed - expected).abs().max() < 1e-12
        assert 0.1 < towards.double().mean() < 0.9


def test_settings_are_tried_on_the_first_seed_and_the_best_goes_on(tmp_path, monkeypatch):
    def run_case(case, protocol):
        loss = 2.0 - 0.1 * len(case.settings) + sum(case.settings) + 0.01 * case.seed
        return case.key(), {"loss": loss, "averaged_loss": loss - 0.05}

    runs = {}
    while missing := wrappers.cases(runs, 3):
        runs |= dict(run_case(case, None) for case in missing)
    chosen = [json.loads(key) for key in runs]
    assert [own for own in chosen if own[0] == "cautious weight decay (decay)"] == [
        ["cautious weight decay (decay)", [0.1], 0],
        ["cautious weight decay (decay)", [0.2], 0],
        ["cautious weight decay (decay)", [0.1], 1],
        ["cautious weight decay (decay)", [0.1], 2],
    ]
    text = wrappers.table({"runs": runs, "protocol": {"steps": 600}})
    assert "| as it is, averaged weights | 3 | 1.9600 ± 0.0058 | -0.0500 ± 0.0000 |" in text
    assert "| cautious weight decay (decay): 0.2 | 1 | 2.1000 | +0.1000 |" in text
    (tmp_path / "wrappers.json").write_text(json.dumps({"runs": runs, "protocol": {"steps": 600}}))
    monkeypatch.setattr("sys.argv", ["wrappers.py", "--report", "--out", str(tmp_path)])
    assert wrappers.main() == 0
    assert (tmp_path / "wrappers.md").read_text() == text


def test_a_case_trains(monkeypatch):
    protocol = wrappers.Protocol(steps=2, batch=2, context=16, layers=1, width=32)
    found = [
        wrappers.run_case(wrappers.Case(variant, own, 0), protocol)[1]["loss"]
        for variant, own in ((wrappers.AS_IT_IS, ()), ("cautious weight decay (decay)", (0.1,)))
    ]
    assert found[0] != found[1]
    assert all(1 < loss < 6 for loss in found)
