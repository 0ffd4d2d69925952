"""One run: reproducible, the same start for every optimizer, honest about divergence and state."""

import json
import math
from dataclasses import replace

import pytest
import torch

from quotientopt.compare import train as compare_train
from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Run, Seconds, Trial
from quotientopt.compare.train import Step, Training, state_bytes, time_in_turn, train
from quotientopt.models import REFERENCE_MODELS

ADAMW = Trial("adamw", 3e-3, {"beta2": 0.95})


def test_same_seed_gives_identical_losses(protocol, corpus):
    first, second = train(ADAMW, protocol, corpus), train(ADAMW, protocol, corpus)
    assert first.training_losses == second.training_losses
    assert [point[2] for point in first.curve] == [point[2] for point in second.curve]
    other = train(Trial("adamw", 3e-3, {"beta2": 0.95}, seed=1), protocol, corpus)
    assert first.training_losses != other.training_losses


def test_run_holds_what_was_measured(protocol, corpus):
    seen = []
    run = train(ADAMW, protocol, corpus, lambda step, loss: seen.append((step, loss)))
    assert run.status == "finished"
    assert [point[0] for point in run.curve] == [4, 8, 10]
    assert run.final_loss == run.curve[-1][2]
    assert seen == list(enumerate(run.training_losses, start=1))
    assert run.training_losses[0] == pytest.approx(math.log(256), abs=0.7)
    assert run.final_loss < run.training_losses[0]
    seconds = [point[1] for point in run.curve]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert run.timing.optimizer.median > 0
    assert run.timing.model.mean > run.timing.optimizer.mean
    # Two moments in float32 and a step counter per parameter tensor.
    tensors = len(list(Training(ADAMW, protocol, corpus).model.parameters()))
    assert run.state_bytes == 2 * 4 * run.parameters + 4 * tensors
    assert run.hyperparameters["AdamW"]["betas"] == (0.9, 0.95)
    assert Run.from_dict(json.loads(json.dumps(run.as_dict()))).trial == run.trial


@pytest.mark.parametrize("name", ["quotient-adam", "soap", "muon"])
@pytest.mark.parametrize("model", ["gpt", "llama", "vit"])
def test_other_optimizers_start_alike_and_train(name, model, protocol, corpus, stripes):
    if model == "vit":
        corpus = stripes
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    elif name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon: pip install 'torch>=2.9'")
    protocol = type(protocol)(**(vars(protocol) | {"model": model}))
    baseline = train(ADAMW, protocol, corpus)
    settings = dict(OPTIMIZERS[name].settings_grid[0])
    run = train(Trial(name, 3e-3, settings), protocol, corpus)
    assert run.training_losses[0] == baseline.training_losses[0]
    assert run.training_losses[-1] < run.training_losses[0]
    assert run.training_losses[-1] != baseline.training_losses[-1]


def test_muon_gets_the_matrices_inside_blocks_only(protocol, corpus):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon: pip install 'torch>=2.9'")
    training = Training(Trial("muon", 1e-2, {"adamw_rate": 8e-3}), protocol, corpus)
    muon, adamw = training.optimizers
    names = {id(p): name for name, p in training.model.named_parameters()}
    inner = [names[id(p)] for p in muon.param_groups[0]["params"]]
    outer = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    assert len(inner) == 2 * 6
    assert all(name.startswith("blocks.") for name in inner)
    assert outer == ["embedding.weight", "positions.weight", "head.weight"]
    training.step()
    assert muon.param_groups[0]["lr"] == 1e-2
    assert adamw.param_groups[0]["lr"] == 8e-3


def test_muon_leaves_positions_and_head_of_a_vit_to_adamw(protocol, stripes):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch.optim.Muon: pip install 'torch>=2.9'")
    protocol = replace(protocol, model="vit")
    training = Training(Trial("muon", 1e-2, {"adamw_rate": 8e-3}), protocol, stripes)
    muon, adamw = training.optimizers
    names = {id(p): name for name, p in training.model.named_parameters()}
    inner = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert len(inner) == 2 * 6 + 1
    assert "patches.weight" in inner
    outer = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert outer == {"positions.weight", "head.weight"}


def test_accuracy_counts_all_validation_images(protocol, stripes):
    protocol = replace(protocol, model="vit", batch=6, steps=60, evaluate_every=60)
    run = train(ADAMW, protocol, stripes)
    assert run.final_accuracy == 1.0
    training = Training(ADAMW, protocol, stripes)
    batches = stripes.labelled_batches(protocol)
    assert [len(batch.targets) for batch in batches] == [6, 2]
    with torch.no_grad():
        right = [
            int(training.model(image[None]).argmax() == target)
            for batch in batches
            for image, target in zip(*batch, strict=True)
        ]
    assert training.accuracy(batches) == sum(right) / 8
    assert training.accuracy([]) is None


def test_texts_have_no_accuracy(protocol, corpus):
    assert train(ADAMW, protocol, corpus).final_accuracy is None


def test_learning_rate_follows_the_schedule(protocol, corpus):
    training = Training(ADAMW, protocol, corpus)
    for step in range(protocol.steps):
        training.step()
        rate = training.optimizers[0].param_groups[0]["lr"]
        assert rate == pytest.approx(3e-3 * protocol.schedule(step))


@pytest.mark.parametrize(
    "trial", [Trial("adamw", 1e30, {"beta2": 0.95}), Trial("quotient-adam", 1e30)]
)
def test_divergence_is_recorded(trial, protocol, corpus):
    run = train(trial, protocol, corpus)
    assert run.status == "diverged"
    assert run.final_loss is None
    assert run.score == math.inf
    assert len(run.training_losses) < protocol.steps
    json.dumps(run.as_dict(), allow_nan=False)


def test_failing_linear_algebra_counts_as_divergence(protocol, corpus, monkeypatch):
    def fail(optimizer):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    run = train(ADAMW, protocol, corpus)
    assert (run.status, run.training_losses) == ("diverged", [])


def test_state_is_counted_once_per_storage():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    buffer = torch.zeros(100)
    optimizer.state[parameter] = {
        "nested": [torch.zeros(10, dtype=torch.float64), {"view": buffer[:40]}],
        "whole": buffer,
        "same": buffer,
        "number": 3,
    }
    assert state_bytes([optimizer]) == 80 + 400
    del optimizer.state[parameter]["whole"], optimizer.state[parameter]["same"]
    assert state_bytes([optimizer]) == 80 + 160


def test_timing_alone_measures_a_step(protocol, corpus):
    [timing] = time_in_turn([ADAMW], protocol, corpus, skipped=1, young=2, grown=3)
    assert 0 < timing.optimizer.mean < timing.model.mean < timing.step


def test_timing_alone_weighs_young_steps_as_a_run_does(protocol, corpus, monkeypatch):
    """Steps cost 8 seconds, but 1 from the hundredth on: the mean is that of a whole run."""
    whole = replace(protocol, steps=600)

    def step(self):
        self.steps += 1
        seconds = 8.0 if self.steps <= 100 else 1.0
        return Step(0.0, 1.0, seconds, 1.0 + seconds)

    monkeypatch.setattr(Training, "step", step)
    exact = (98 * 8 + 500 * 1) / 598
    assert time_in_turn([ADAMW], whole, corpus)[0].optimizer.mean == pytest.approx(exact)
    short = replace(protocol, steps=80)
    assert time_in_turn([ADAMW], short, corpus)[0].optimizer == Seconds(8.0, 8.0)


@pytest.mark.parametrize(("device", "order"), [("cpu", "ab" * 10), ("cuda", "a" * 10 + "b" * 10)])
def test_runs_are_timed_in_turn(protocol, monkeypatch, device, order):
    """On an accelerator one after the other; each gets the seconds of its own steps."""
    taken = []

    class Fake:
        def __init__(self, trial, protocol, task):
            self.name = trial.optimizer

        def step(self):
            taken.append(self.name)
            return Step(0.0, 1.0, 2.0 if self.name == "a" else 3.0, 5.0)

    monkeypatch.setattr(compare_train, "Training", Fake)
    trials = [Trial(name, 1e-3) for name in "ab"]
    own = replace(protocol, device=device, steps=10)
    timings = time_in_turn(trials, own, None, skipped=1, young=9, grown=1)
    assert [timing.optimizer.mean for timing in timings] == [2.0, 3.0]
    assert "".join(taken) == order


def test_every_optimizer_has_a_centre_for_every_model():
    assert all(set(entry.centres) == set(REFERENCE_MODELS) for entry in OPTIMIZERS.values())
