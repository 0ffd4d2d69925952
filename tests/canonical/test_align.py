"""align_: heads are found again, gauges and residual frames follow, the function stays."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.canonical import align_, distance
from quotientopt.canonical.moving import HeadOrder, attentions, best_order, overlaps, reorder_
from quotientopt.canonical.reading import query_groups, stored
from quotientopt.groups import GL
from quotientopt.symmetries import SymmetryMap
from tests.canonical.models import (
    ARCHITECTURES,
    GROUPS,
    deviation,
    difference,
    example,
    hand_made,
    snapshot,
    twin_of,
    unchanged,
)
from tests.optim.training import loss_of, small_model, train
from tests.symmetries.architectures import small_gpt, small_llama

pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")


def shuffled(model, seed=0):
    """A copy whose heads have changed places, and the orders by attention."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for name, pair in attentions(qo.find_symmetries(copied).heads).items():
        heads, k = pair[0].heads, len(query_groups(pair[0]))
        inner = torch.stack([torch.randperm(k, generator=generator) for _ in range(heads)])
        orders[name] = HeadOrder(torch.randperm(heads, generator=generator), inner)
        for symmetry in pair:
            reorder_(symmetry, orders[name])
    return copied, orders


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shuffled_gauge_twin_becomes_the_reference(name):
    model, run = example(name)
    twin, orders = shuffled(twin_of(model))
    assert difference(model, twin) > 0.1
    # Changing places is a symmetry of all of these attentions.
    assert deviation(run, model, twin) < 1e-10
    before = snapshot(model)
    alignment = align_(twin, model)
    assert unchanged(model, before)
    assert difference(model, twin) < 1e-10
    assert deviation(run, model, twin) < 1e-10
    assert alignment.unordered == ()
    for attention, order in orders.items():
        found = alignment.head_order[attention]
        assert torch.equal(order.flat[found], torch.arange(len(found)))


@pytest.mark.parametrize("name", ["gpt", "gpt2", "llama", "encoder", "vit"])
def test_the_function_of_another_model_stays(name):
    model, run = example(name)
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter)
    moved = copy.deepcopy(other)
    align_(moved, model)
    assert deviation(run, other, moved) < 1e-10
    assert distance_of_weights(moved, model) < distance_of_weights(other, model)
    # Only what the symmetries allow was done: the models still differ.
    assert distance(moved, model, relative=True)["total"] > 0.1


def distance_of_weights(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return sum((p - q).square().sum().item() for p, q in pairs) ** 0.5


def test_noise_does_not_hide_the_order():
    model = small_gpt().double()
    noisy, orders = shuffled(twin_of(model, cond=100.0))
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 1e-3 * parameter.std() * torch.randn_like(parameter)
    alignment = align_(noisy, model)
    for attention, order in orders.items():
        found = alignment.head_order[attention]
        assert torch.equal(order.flat[found], torch.arange(len(found)))


def test_without_reordering_a_shuffled_model_stays_away():
    model = small_gpt().double()
    twin, _ = shuffled(twin_of(model))
    kept = copy.deepcopy(twin)
    alignment = align_(kept, model, permute_heads=False)
    assert alignment.head_order == {}
    assert difference(model, kept) > 0.1
    align_(twin, model)
    assert difference(model, twin) < 1e-10


def test_without_the_residual_stream_a_rotated_model_stays_away():
    model = small_gpt().double()
    twin = twin_of(model)
    kept = copy.deepcopy(twin)
    assert "residual" not in align_(kept, model, residual=False)
    assert difference(model, kept) > 0.1


def test_nearest_of_its_orbit_in_the_balanced_gauge():
    """No small change of gauge brings an aligned model closer to a balanced reference."""
    model, other = small_gpt().double(), small_gpt().double()
    qo.canonical.dress_(model, "balanced")
    align_(other, model)
    nearest = distance_of_weights(other, model)
    found = qo.find_symmetries(other)
    generator = torch.Generator().manual_seed(3)
    for symmetry in found.heads:
        skew = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
        turn = torch.linalg.matrix_exp(1e-3 * (skew - skew.mT))
        symmetry.act_(turn)
        assert distance_of_weights(other, model) > nearest
        symmetry.act_(turn.mT)
    skew = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    found.residual.act_(torch.linalg.matrix_exp(1e-3 * (skew - skew.mT)))
    assert distance_of_weights(other, model) > nearest


def test_the_element_is_what_acted():
    model = small_gpt().double()
    twin = twin_of(model)
    by_hand = copy.deepcopy(twin)
    alignment = align_(twin, model)
    qo.find_symmetries(by_hand).act_(alignment)
    assert difference(twin, by_hand) < 1e-12


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_grouped_queries_are_assigned_exactly(key_value_heads):
    """Against all orders of heads, one by one."""

    one, two = small_llama(key_value_heads).double(), small_llama(key_value_heads).double()
    k = 4 // key_value_heads
    pair = attentions(qo.find_symmetries(two).heads)["blocks.0.attention"]
    fixed = attentions(qo.find_symmetries(one).heads)["blocks.0.attention"]
    overlap = sum(overlaps(f, m, stored) for f, m in zip(fixed, pair, strict=True))
    best = best_order(overlap, k)

    def total(order):
        return overlap[torch.arange(4), order].sum().item()

    every = []
    for outer in itertools.permutations(range(key_value_heads)):
        for inner in itertools.product(itertools.permutations(range(k)), repeat=key_value_heads):
            order = HeadOrder(torch.tensor(outer), torch.tensor(inner))
            every.append(total(order.flat))
    assert abs(total(best.flat) - max(every)) < 1e-12
    assert max(every) - min(every) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_overlaps_are_inner_products_of_invariants(name):
    one, _ = example(name)
    torch.manual_seed(1)
    two, _ = example(name)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ours, theirs = qo.canonical.invariants(one), qo.canonical.invariants(two)
    pairs = zip(qo.find_symmetries(one).heads, qo.find_symmetries(two).heads, strict=True)
    for fixed, moving in pairs:
        dense = (ours[fixed.name].dense().flatten(1), theirs[fixed.name].dense().flatten(1))
        assert torch.allclose(overlaps(fixed, moving, stored), dense[0] @ dense[1].mT, atol=1e-10)


def test_heads_of_unknown_attentions_stay_in_their_order():
    model, run = hand_made("partial")
    twin = twin_of(model, symmetries=type(model).symmetries)
    for symmetry in twin.symmetries().heads:
        reorder_(symmetry, HeadOrder(torch.tensor([1, 2, 0]), torch.zeros(3, 1, dtype=torch.long)))
    before = copy.deepcopy(twin)
    alignment = align_(twin, model, symmetries=(twin.symmetries(), model.symmetries()))
    assert alignment.unordered == ("",)
    assert alignment.head_order == {}
    assert deviation(run, before, twin) < 1e-10
    assert difference(model, twin) > 0.1
    maps = (twin.symmetries(), model.symmetries())
    with pytest.raises(ValueError, match="no attention 'other'"):
        align_(twin, model, symmetries=maps, permute_heads="other")
    align_(twin, model, symmetries=maps, permute_heads=[""])  # on the caller's word
    assert difference(model, twin) < 1e-10


@pytest.mark.parametrize("kind", GROUPS)
def test_other_groups(kind):
    model, run = hand_made(kind)
    twin = twin_of(model, symmetries=type(model).symmetries)
    align_(twin, model, symmetries=(twin.symmetries(), model.symmetries()))
    assert difference(model, twin) < 1e-10
    assert deviation(run, model, twin) < 1e-10
    # With GL(8) claimed the aligned model would compute something else.
    wrong = twin_of(model, symmetries=lambda m: m.symmetries(GL(8)))
    assert deviation(run, model, wrong) > 1e-3


def test_one_pair_of_an_attention_alone_is_not_reordered():
    model = small_gpt().double()
    twin, _ = shuffled(model)
    maps = tuple(SymmetryMap(qo.find_symmetries(m).heads[:1]) for m in (twin, model))
    alignment = align_(twin, model, symmetries=maps)
    assert alignment.unordered == ("blocks.0.attention",)


def test_gradients_move_along():
    model = small_model()
    twin, _ = shuffled(twin_of(model))
    tokens = torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(0))
    for trained in (model, twin):
        loss_of(trained, tokens).backward()
    align_(twin, model)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-11)


def test_trained_models_come_closer_than_by_gauge_alone():
    """Two trainings from two initialisations: each part of the alignment helps."""
    models = []
    for seed in (0, 1):
        models.append(small_model(seed=seed))
        optimizer = qo.QuotientAdam(models[-1], lr=1e-2)
        train(models[-1], optimizer, 25)
    reference, model = models
    found = []
    for options in (
        {"permute_heads": False, "residual": False},
        {"residual": False},
        {},
    ):
        moved = copy.deepcopy(model)
        align_(moved, reference, **options)
        found.append(distance_of_weights(moved, reference))
    found.insert(0, distance_of_weights(model, reference))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


# ---- refusals -----------------------------------------------------------------------------------


def refused(error, match, model, reference, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        align_(model, reference, **options)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


def test_refusals():
    model = small_gpt()
    refused(ValueError, "different parameters", model, small_llama())
    refused(ValueError, "no head symmetry of Linear", nn.Linear(3, 3), nn.Linear(3, 3))
    refused(TypeError, "torch.nn.Module", model, "reference")
    broken = small_gpt()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.inf
    refused(ValueError, "non-finite", model, broken)
    frozen = small_gpt()
    frozen.blocks[0].attention.output.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="one side only"):
        refused(ValueError, "is frozen", frozen, model)


def test_without_scipy(monkeypatch):
    model, reference = small_gpt(), small_gpt()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    refused(ImportError, "pip install scipy", model, reference)
    align_(model, reference, permute_heads=False)


def test_scipy_and_matplotlib_are_imported_late():
    found = "bool({'scipy', 'matplotlib'} & set(sys.modules))"
    code = f"import sys, quotientopt.canonical; sys.exit({found})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("places", [0, 1])
def test_alignment_that_overflows_float16_is_refused(places):
    """Before heads change places."""
    if places:
        pytest.importorskip("scipy", reason="needs scipy: pip install scipy")
    reference = small_gpt().half()
    model = copy.deepcopy(reference)
    value, output = (reference.blocks[0].attention.value, reference.blocks[0].attention.output)
    with torch.no_grad():
        value.weight[:4].mul_(2e4)
        output.weight[:, :4].div_(2e4)
        for own in (model.blocks[0].attention.value, model.blocks[0].attention.output):
            own.weight.mul_(30)
        for block in reference.blocks:
            own = block.attention
            for layer in (own.query, own.key, own.value):
                layer.weight.copy_(layer.weight.roll(4 * places, 0))
            own.output.weight.copy_(own.output.weight.roll(4 * places, 1))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit torch.float16"):
        qo.align_(model, reference)
    assert all(map(torch.equal, before, model.parameters()))
