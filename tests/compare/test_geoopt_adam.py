"""geoopt's RiemannianAdam on the head pairs of a model."""

import copy
import sys
from dataclasses import replace

import pytest
import torch

import quotientopt as qo
from quotientopt.compare.optimizers import DEFAULT_OPTIMIZERS, find_optimizers
from quotientopt.compare.protocol import Trial, UsageError
from quotientopt.compare.train import Training, train
from quotientopt.groups import GL, O
from quotientopt.symmetries import HeadSymmetry
from tests.optim.training import batches, loss_of, small_model, twin_of

pytest.importorskip("quotientopt.geoopt", reason="pip install geoopt")

from quotientopt.compare.geoopt_pairs import PairsRiemannianAdam

TRIAL = Trial("geoopt-adam", 3e-2, {"adamw_rate": 3e-3})
OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.1}


def pairs_of(model, lr=3e-2, **options):
    return PairsRiemannianAdam(qo.find_symmetries(model).heads, lr, **OPTIONS | options)


@pytest.mark.parametrize("model", ["gpt", "llama", "vit"])
def test_starts_like_adamw_and_trains(model, protocol, corpus, stripes):
    task = stripes if model == "vit" else corpus
    protocol = replace(protocol, model=model)
    baseline = train(Trial("adamw", 3e-3, {"beta2": 0.95}), protocol, task)
    run = train(TRIAL, protocol, task)
    assert run.status == "finished"
    assert run.training_losses[0] == baseline.training_losses[0]
    assert run.training_losses[-1] < run.training_losses[0]
    assert run.training_losses[-1] != baseline.training_losses[-1]
    defaults = run.hyperparameters["PairsRiemannianAdam"]
    assert (defaults["weight_decay"], defaults["decoupled_weight_decay"]) == (0, 0.1)
    assert defaults["pairs"] == [
        f"blocks.{i}.attention.{p}" for i in range(2) for p in ("qk", "vo")
    ]


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_every_parameter_has_one_optimizer(model, protocol, corpus):
    training = Training(TRIAL, replace(protocol, model=model), corpus)
    pairs, adamw = training.optimizers
    names = {id(p): name for name, p in training.model.named_parameters()}
    inner = {names[id(p)] for p in pairs.parameters}
    outer = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    parts = ("query", "key", "value", "output")
    assert inner == {f"blocks.{i}.attention.{part}.weight" for i in range(2) for part in parts}
    assert sorted([*inner, *outer]) == sorted(names.values())
    training.step()
    schedule = protocol.schedule(0)
    assert pairs.param_groups[0]["lr"] == pytest.approx(3e-2 * schedule)
    assert adamw.param_groups[0]["lr"] == pytest.approx(3e-3 * schedule)


def test_too_large_a_rate_counts_as_divergence(protocol, corpus):
    assert train(replace(TRIAL, rate=1e30), protocol, corpus).status == "diverged"


def test_query_heads_of_a_key_value_head_lie_side_by_side():
    model = small_model("llama", heads=4, key_value_heads=2)
    rotated, linear = pairs_of(model)._packed
    assert rotated.point.shape == linear.point.shape == (2, 2, 8, 2 * 32 + 32)
    attention = model.blocks[1].attention
    # The last 8 rows and columns belong to the second query head of the second key-value head.
    assert torch.equal(rotated.point[1, 1, :, 32:64], attention.query.weight[24:])
    assert torch.equal(linear.point[1, 1, :, 32:64], attention.output.weight[:, 24:].mT)


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_first_step_in_formulas(model):
    model = small_model(model)
    optimizer = pairs_of(model, lr=1e-2, weight_decay=0.5)
    loss_of(model, next(batches(1))).backward()
    expected = []

    def gram(group, X):
        if isinstance(group, GL):
            return X @ X.mT
        return 2 * group.algebra_projection(X @ X.mT)  # squared lengths of complex rows

    symmetries = qo.find_symmetries(model).heads
    for symmetry in symmetries:
        A, B = (torch.cat(side, -1) * (1 - 0.5e-2) for side in (symmetry.left, symmetry.right))
        dA, dB = (
            torch.cat([block.view(block.parameter.grad) for block in blocks], -1)
            for blocks in (symmetry.left_blocks, symmetry.right_blocks)
        )
        u = torch.linalg.solve(gram(symmetry.group, B), dA)
        v = torch.linalg.solve(gram(symmetry.group, A), dB)
        squares = ((u * dA).sum((-2, -1)) + (v * dB).sum((-2, -1)))[..., None, None]
        expected.append([X - 1e-2 * w / squares.sqrt() for X, w in ((A, u), (B, v))])
    optimizer.step()
    for symmetry, sides in zip(symmetries, expected, strict=True):
        for factor, blocks in zip(sides, (symmetry.left, symmetry.right), strict=True):
            # geoopt adds 1e-8 to a norm of about 0.01.
            assert (torch.cat(blocks, -1) - factor).abs().max() < 1e-7 * factor.abs().max()


def losses(model, make, steps=10):
    optimizers = make(model)
    found = []
    for tokens in batches(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def with_adamw(model):
    pairs = pairs_of(model)
    covered = {id(p) for p in pairs.parameters}
    rest = [p for p in model.parameters() if id(p) not in covered]
    return [pairs, torch.optim.AdamW(rest, lr=3e-3, **OPTIONS)]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_losses_do_not_depend_on_the_gauge_of_the_pairs(name):
    model = small_model(name)
    pairs = {symmetry.name for symmetry in qo.find_symmetries(model).heads}
    twin, _ = twin_of(model, cond=100, only=pairs.__contains__)
    copies = copy.deepcopy((model, twin))
    assert (losses(twin, with_adamw) - losses(model, with_adamw)).abs().max() < 1e-10

    def adamw(model):
        return [torch.optim.AdamW(model.parameters(), lr=3e-3, **OPTIONS)]

    assert (losses(copies[1], adamw) - losses(copies[0], adamw)).abs().max() > 1e-4


def test_gradients_are_dropped_and_needed():
    model = small_model()
    optimizer = pairs_of(model)
    loss_of(model, next(batches(1))).backward()
    optimizer.zero_grad()
    covered = {id(p) for p in optimizer.parameters}
    assert all((p.grad is None) == (id(p) in covered) for p in model.parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.query\.weight' has no gradient"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_written_between_steps_count():
    model, other = small_model(), small_model(seed=1)
    optimizer = pairs_of(model, lr=0.0)
    model.load_state_dict(other.state_dict())
    loss_of(model, next(batches(1))).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.state_dict()[name])


def test_weight_decay_is_decoupled():
    model = small_model()
    optimizer = pairs_of(model, lr=0.1, weight_decay=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    covered = {id(p) for p in optimizer.parameters}
    for name, parameter in model.named_parameters():
        factor = 0.95 if id(parameter) in covered else 1.0
        assert torch.equal(parameter, factor * before[name])


def test_pairs_it_cannot_train_are_refused():
    left, right = (torch.nn.Parameter(torch.randn(2, 4, 8)) for _ in range(2))
    rotations = HeadSymmetry([left], [right], O(4), "rotations")
    with pytest.raises(ValueError, match=r"'rotations': geoopt-adam knows no metric for .* O\(4\)"):
        PairsRiemannianAdam([rotations], 1e-2, **OPTIONS)
    fused = torch.nn.Parameter(torch.randn(3, 4, 8))
    part = HeadSymmetry([fused[0:1]], [fused[1:2]], GL(4), "part")
    with pytest.raises(ValueError, match="the pairs cover 64 of the 96 entries"):
        PairsRiemannianAdam([part], 1e-2, **OPTIONS)


def test_without_geoopt_it_says_what_to_install(monkeypatch):
    assert "geoopt-adam" not in DEFAULT_OPTIMIZERS
    (entry,) = find_optimizers("geoopt-adam")
    assert entry.name == "geoopt-adam"
    monkeypatch.delitem(sys.modules, "quotientopt.geoopt")
    monkeypatch.setitem(sys.modules, "geoopt", None)
    with pytest.raises(UsageError, match=r"geoopt is not installed: pip install 'geoopt>=0\.5"):
        find_optimizers("geoopt-adam")
