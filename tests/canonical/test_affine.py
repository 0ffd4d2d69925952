"""Canonical forms under the affine gauge, scales of hidden units and of normalised queries."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.canonical import align_, distance, dress_, invariants, noether_charges, spectra
from quotientopt.groups import GL, Scale
from quotientopt.symmetries import Block, HeadSymmetry, ScaleSymmetry, SymmetryMap, Translation
from tests.canonical.affine import affine
from tests.canonical.models import (
    deviation,
    difference,
    example,
    hand_made,
    snapshot,
    unchanged,
)
from tests.canonical.test_census import VOCABULARY, NanoGPT, random
from tests.canonical.test_families import example as family_example
from tests.symmetries import test_affine
from tests.symmetries.architectures import small_llama
from tests.symmetries.test_affine import Layer

MODELS = {
    "layer": None,
    "normalised": None,
    "attention": example,
    "attention-bias-kv": example,
    "encoder-layer": example,
    "gpt2": example,
    "gpt2-cross-attention": example,
    "llama": example,
    "bert": family_example,
    "t5": family_example,
    "whisper": family_example,
}
SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def build(name):
    """A model, a function that gives its outputs, and one that finds its symmetries."""
    if name in ("layer", "normalised"):
        model = Layer(normalised=name == "normalised").double()
        x = torch.randn(2, 6, test_affine.WIDTH, dtype=torch.float64)

        @torch.no_grad()
        def run(other):
            return other(x)

        return model, run, test_affine.symmetries_of
    if name == "attention-bias-kv":
        # Without the zero that add_zero_attn puts beside the keys, which no translation moves.
        model = nn.MultiheadAttention(24, 3, add_bias_kv=True, batch_first=True).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, 6, 24, dtype=torch.float64)

        @torch.no_grad()
        def run(other):
            return other(x, x, x)[0]

        return model, run, affine
    model, run = MODELS[name](name)
    return model, run, affine


def twin_of(model, find, cond=30.0, only=None, seed=3):
    """A copy moved by a random element, of the parts that `only` says yes to."""
    twin = copy.deepcopy(model)
    symmetries = find(twin)
    element = symmetries.random_element(cond, generator=torch.Generator().manual_seed(seed))
    symmetries.act_({name: g for name, g in element.items() if only is None or only(name)})
    return twin


def is_translation(name):
    return name.endswith(".translation")


@pytest.mark.parametrize("name", MODELS)
def test_the_hand_made_symmetries_are_symmetries(name):
    model, run, find = build(name)
    twin = twin_of(model, find)
    assert deviation(run, model, twin) < 1e-11
    assert difference(model, twin) > 0.05
    if name not in ("llama", "t5"):
        assert any(map(is_translation, find(model).random_element()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["translations", "all"])
def test_twins_are_at_distance_zero(name, part):
    model, _, find = build(name)
    twin = twin_of(model, find, only=is_translation if part == "translations" else None)
    before = snapshot(model), snapshot(twin)
    found = distance(model, twin, symmetries=(find(model), find(twin)), relative=True)
    assert max(found.values()) < 1e-12
    assert unchanged(model, before[0])
    assert unchanged(twin, before[1])
    assert {*found} == {s.name for s in find(model).pairs} | {"other", "total"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("section", SECTIONS)
def test_dressed_forms(name, section):
    model, run, find = build(name)
    twin, original = twin_of(model, find), copy.deepcopy(model)
    dressing = dress_(model, section, symmetries=find(model))
    assert deviation(run, original, model) < 1e-11
    # The element that is returned is one for act_, and brings the original there.
    replayed = copy.deepcopy(original)
    find(replayed).act_(dressing)
    assert difference(replayed, model) < 1e-12
    for symmetry in find(model).heads:
        if symmetry.translation is not None:
            assert not symmetry.translation.blocks[0].view().any()
    for units in find(model).hidden_units:
        a, b = (torch.cat(side, -1).norm(dim=-1) for side in (units.left, units.right))
        assert (a - b).abs().max() < 1e-12
    again = copy.deepcopy(model)
    dress_(again, section, symmetries=find(again))
    assert difference(again, model) < 1e-11
    if section == "svd":
        dress_(twin, section, symmetries=find(twin))
        assert difference(twin, model) < 1e-10


@pytest.mark.parametrize("name", ["layer", "normalised", "attention-bias-kv", "gpt2", "bert"])
def test_invariants(name):
    model, _, find = build(name)
    twin = twin_of(model, find)
    ours, theirs = (invariants(m, symmetries=find(m)) for m in (model, twin))
    for key, one in ours.items():
        two = theirs[key]
        for x, y in ((one.left, two.left), (one.right, two.right)):
            assert (x - y).abs().max() < 1e-9 * x.abs().max()
        values = one.singular_values
        assert (values - two.singular_values).abs().max() < 1e-11 * values.max()
        if one.effective_bias is not None:
            assert (one.effective_bias - two.effective_bias).abs().max() < 1e-12
    for symmetry in find(model).heads:
        moved = 0 if symmetry.translation is None else 1
        assert ours[symmetry.name].right.shape[-1] == symmetry.columns[1] - moved
        if symmetry.translation is not None and symmetry.translation.sink is not None:
            sink = symmetry.translation.sink.view().flatten()
            (bias,) = symmetry.translation.blocks[:1]
            expected = sink + torch.einsum("hrd,hr->d", symmetry.left[0], bias.view()[..., 0])
            assert (ours[symmetry.name].effective_bias - expected).abs().max() < 1e-13
    for key, spectrum in spectra(model, symmetries=find(model)).items():
        other = spectra(twin, symmetries=find(twin))[key]
        assert (spectrum.singular_values - other.singular_values).abs().max() < 1e-11


def test_what_the_model_sees_is_at_a_distance():
    model, run, find = build("layer")

    def moved(parameter, by):
        other = copy.deepcopy(model)
        with torch.no_grad():
            getattr(other, parameter).bias.add_(by)
        return other, distance(model, other, symmetries=(find(model), find(other)))

    shift = torch.randn(test_affine.WIDTH, dtype=torch.float64)
    other, found = moved("k", shift)
    assert found["total"] < 1e-12
    assert deviation(run, model, other) < 1e-13
    # The queries' bias is seen; so is β, through the output's bias and through the values'.
    other, found = moved("q", shift)
    assert found["qk"] > 0.1 < found["total"]
    assert deviation(run, model, other) > 1e-3
    other, found = moved("o", shift)
    assert abs(found["other"] - shift.norm().item()) < 1e-12
    other, found = moved("v", shift)
    assert abs(found["other"] - (model.o.weight @ shift).norm().item()) < 1e-12
    assert max(found["qk"], found["vo"]) < 1e-13
    assert deviation(run, model, other) > 1e-3


def test_hidden_units_keep_their_signs_behind_a_relu():
    """(−a, −b) has the product of (a, b), and is another ReLU unit."""
    model, run, find = build("layer")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (other.up.weight, other.up.bias):
            parameter[0] *= -1
        other.down.weight[:, 0] *= -1
    assert deviation(run, model, other) > 1e-3
    found = distance(model, other, symmetries=(find(model), find(other)))
    a, b = model.down.weight[:, 0], torch.cat((model.up.weight[0], model.up.bias[:1]))
    assert abs(found["mlp"] - (2**0.5 * a.norm() * b.norm()).item()) < 1e-12

    def gated(layer):
        units = find(layer).hidden_units[0]
        heads = HeadSymmetry(units.left_blocks, units.right_blocks, GL(1), "mlp")
        return SymmetryMap(find(layer).heads, hidden_units=[heads])

    assert distance(model, other, symmetries=(gated(model), gated(other)))["mlp"] < 1e-12
    for layer in (model, other):
        dress_(layer, symmetries=gated(layer))
    assert difference(model, other) < 1e-12
    assert isinstance(find(model).hidden_units[0].group, Scale)


def test_distance_of_hidden_units_is_that_of_their_products():
    model, _, find = build("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    found = distance(model, other, symmetries=(find(model), find(other)))
    for one, two in zip(find(model).hidden_units, find(other).hidden_units, strict=True):
        products = [torch.cat(s.left, -1).mT @ torch.cat(s.right, -1) for s in (one, two)]
        assert abs(found[one.name] - (products[0] - products[1]).norm().item()) < 1e-12


def test_dead_hidden_units_are_no_error():
    model, run, find = build("layer")
    with torch.no_grad():
        model.up.weight[0], model.up.bias[0] = 0, 0
        model.down.weight[:, 1] = 0
        model.up.weight[2], model.up.bias[2], model.down.weight[:, 2] = 0, 0, 0
    original, twin = copy.deepcopy(model), twin_of(model, find)
    assert distance(model, twin, symmetries=(find(model), find(twin)))["total"] < 1e-12
    for layer in (model, twin):
        dress_(layer, symmetries=find(layer))
    assert deviation(run, original, model) < 1e-12
    assert difference(model, twin) < 1e-12
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_twin_aligns_to_the_model_itself(name):
    model, run, find = build(name)
    moved = twin_of(model, find)
    before = copy.deepcopy(moved)
    alignment = align_(moved, model, symmetries=(find(moved), find(model)))
    assert difference(moved, model) < 1e-10
    assert deviation(run, before, moved) < 1e-11
    assert any(map(is_translation, alignment)) == any(map(is_translation, find(model).names))


def test_heads_change_places_with_their_biases():
    model, run, find = build("attention")
    moved = twin_of(model, find)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in (moved.in_proj_weight, moved.in_proj_bias):
            rows = parameter.unflatten(0, (3, 3, 8))
            rows.copy_(rows[:, order].clone())
        columns = moved.out_proj.weight.unflatten(1, (3, 8))
        columns.copy_(columns[:, order].clone())
    assert deviation(run, model, moved) < 1e-12
    align_(moved, model, symmetries=(find(moved), find(model)))
    assert difference(moved, model) < 1e-10


@pytest.mark.parametrize("name", ["layer", "normalised", "attention-bias-kv", "gpt2", "bert"])
def test_gradients_move_along(name):
    """After dressing, gradients are those that a backward pass at the dressed weights gives."""
    model, _, find = build(name)
    weights = torch.randn(64, dtype=torch.float64)

    def backward(module):
        module.zero_grad()
        if isinstance(module, Layer | nn.MultiheadAttention):
            x = torch.linspace(-1, 1, 5 * (12 if isinstance(module, Layer) else 24)).double()
            x = torch.stack((x, x.sin())).unflatten(-1, (5, -1))
            out = module(x) if isinstance(module, Layer) else module(x, x, x)[0]
        else:
            ids = torch.arange(5, 15).reshape(2, 5)
            out = module(input_ids=ids).logits
        flat = out.flatten()
        (flat * weights.repeat(flat.numel() // 64 + 1)[: flat.numel()]).sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    backward(model)
    dress_(model, symmetries=find(model))
    moved = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected = backward(model)
    scale = max(g.abs().max() for g in expected.values())
    assert max((moved[name] - g).abs().max() for name, g in expected.items()) < 1e-11 * scale


def test_charges_of_the_affine_part():
    """Gradient flow keeps them: to second order in the step of gradient descent."""
    model, _, find = build("layer")
    x = torch.randn(2, 6, test_affine.WIDTH, dtype=torch.float64)
    target = torch.randn(2, 6, test_affine.WIDTH, dtype=torch.float64)
    drifts = []
    for steps in (10, 100):
        layer = copy.deepcopy(model)
        start = noether_charges(layer, symmetries=find(layer))
        assert set(start) == {"vo", "qk", "qk.translation", "mlp"}
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        now = noether_charges(layer, symmetries=find(layer))
        drifts.append({name: (now[name] - start[name]).norm().item() for name in start})
    assert max(d["qk.translation"] for d in drifts) < 1e-15
    for name in ("vo", "qk", "mlp"):
        assert 8 < drifts[0][name] / drifts[1][name] < 12


def test_one_line_where_the_bias_was_needed_for_full_rank():
    module = nn.MultiheadAttention(4, 1, bias=True, kdim=3, vdim=4).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    symmetries = affine(module)
    before = snapshot(module)
    line = "the right factor has 3 columns, fewer than its 4 rows, without the bias"
    for function in (dress_, invariants):
        with pytest.raises(ValueError, match=f"symmetry 'qk': {line}"):
            function(module, symmetries=symmetries)
    assert unchanged(module, before)
    layer, _, find = build("layer")
    with torch.no_grad():
        layer.k.weight[0] = layer.k.weight[1]
    with pytest.raises(ValueError, match=r"symmetry 'qk'.*rank-deficient.*without the bias"):
        dress_(layer, "balanced", symmetries=find(layer))


def test_an_output_bias_that_is_frozen_is_refused():
    layer, _, find = build("layer")
    layer.o.bias.requires_grad_(False)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"symmetry 'vo'.*frozen"):
        dress_(layer, symmetries=find(layer))
    assert unchanged(layer, before)


def test_models_with_other_translations_are_refused():
    layer, _, find = build("layer")
    copied = copy.deepcopy(layer)
    other = find(copied)
    heads = [
        HeadSymmetry(s.left_blocks, s.right_blocks, s.group, s.name) for s in find(layer).heads
    ]
    without = SymmetryMap(heads, hidden_units=find(layer).hidden_units)
    with pytest.raises(ValueError, match="the models differ in symmetry 'vo'"):
        distance(layer, copied, symmetries=(without, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_translated_biases_are_zero_to_the_last_bit(dtype):
    layer = Layer().to(dtype)
    dress_(layer, symmetries=test_affine.symmetries_of(layer))
    assert not layer.k.bias.any()
    assert not layer.v.bias.any()


def test_an_optimizer_keeps_hidden_units_where_they_are():
    layer, _, find = build("layer")
    symmetries = find(layer)
    optimizer = qo.QuotientSGD(layer.parameters(), lr=0.1, symmetries=symmetries)
    before = snapshot(layer)
    dressing = dress_(layer, symmetries=symmetries, optimizer=optimizer)
    assert "mlp" not in dressing
    assert torch.equal(layer.up.weight, before["up.weight"])
    assert not layer.k.bias.any()


@pytest.mark.parametrize("kind", ["normalized", "centred", "phases"])
def test_lengths_beside_a_compact_group(kind):
    """Normalised queries and keys: scales of both, and a compact group of the pair."""

    def find(model):
        views = dict(model.named_parameters())
        scales = [
            ScaleSymmetry([Block.of(views[name].detach().unflatten(0, (3, 8)), views[name])], name)
            for name in ("query", "key")
        ]
        return SymmetryMap(model.symmetries().heads, scales=scales)

    model, run = hand_made(kind)
    twin = twin_of(model, find)
    assert deviation(run, model, twin) < 1e-11
    # The scales have moved it: without them the twin is another model.
    assert distance(model, twin, symmetries=(model.symmetries(), twin.symmetries()))["qk"] > 0.1
    assert max(distance(model, twin, symmetries=(find(model), find(twin))).values()) < 1e-11
    ours, theirs = (invariants(m, symmetries=find(m))["qk"] for m in (model, twin))
    assert (ours.dense() - theirs.dense()).abs().max() < 1e-11
    aligned = copy.deepcopy(twin)
    align_(aligned, model, symmetries=(find(aligned), find(model)), permute_heads=False)
    assert difference(aligned, model) < 1e-10
    charges = noether_charges(model, symmetries=find(model))
    lengths = model.query.detach().unflatten(0, (3, 8)).square().sum((-2, -1))
    assert (charges["query"].flatten() - lengths).abs().max() < 1e-13
    original = copy.deepcopy(model)
    for one in (model, twin):
        dress_(one, symmetries=find(one))
    assert deviation(run, original, model) < 1e-11
    assert difference(model, twin) < 1e-10
    assert (model.key.unflatten(0, (3, 8)).square().sum((-2, -1)) - 8).abs().max() < 1e-12


def test_every_combination_of_translations():
    """Translated and untranslated pairs have their invariants under one roof."""
    layer, _, find = build("layer")
    full = find(layer)
    for keys, values in itertools.product((True, False), repeat=2):
        heads = [
            HeadSymmetry(
                s.left_blocks,
                s.right_blocks,
                s.group,
                s.name,
                translation=s.translation if {"qk": keys, "vo": values}[s.name] else None,
            )
            for s in full.heads
        ]
        found = invariants(layer, symmetries=SymmetryMap(heads))
        assert found["qk"].right.shape[-1] == test_affine.WIDTH + (not keys)
        assert (found["vo"].effective_bias is not None) == values


def test_translations_are_made_of_the_biases_of_one_pair():
    layer, _, find = build("layer")
    qk = next(s for s in find(layer).heads if s.name == "qk")
    foreign = test_affine.rows(layer.v)[1]
    with pytest.raises(ValueError, match="biases of the right factor"):
        HeadSymmetry(
            qk.left_blocks, qk.right_blocks, qk.group, "qk", translation=Translation((foreign,))
        )


def folded(bias):
    """A model with exact O(d): biases that may be translated, or hidden units of SwiGLU."""
    model = random(NanoGPT(bias=True, tied=False)) if bias else small_llama().double()
    qo.fold_norms_(model)
    ids = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def run(other):
        return other(ids)

    return model, run


@pytest.mark.parametrize("bias", [True, False], ids=["translations", "hidden units"])
def test_together_with_a_rotation_of_the_stream(bias):
    model, run = folded(bias)
    twin = twin_of(model, affine)
    assert "residual" in affine(model).random_element()
    assert deviation(run, model, twin) < 1e-11
    found = distance(model, twin, symmetries=(affine(model), affine(twin)), relative=True)
    assert max(found.values()) < 1e-11
    unrotated = distance(model, twin, symmetries=(affine(model), affine(twin)), residual=False)
    assert unrotated["other"] > 0.1
    moved = copy.deepcopy(twin)
    align_(moved, model, symmetries=(affine(moved), affine(model)), permute_heads=False)
    assert difference(moved, model) < 1e-9
    original = copy.deepcopy(model)
    for one in (model, twin):
        dress_(one, residual=True, symmetries=affine(one))
    assert deviation(run, original, model) < 1e-11
    assert difference(model, twin) < 1e-9


def test_a_model_of_hidden_units_alone():
    layer, _, find = build("layer")
    units = SymmetryMap(hidden_units=find(layer).hidden_units)
    twin = copy.deepcopy(layer)
    SymmetryMap(hidden_units=find(twin).hidden_units).act_(
        {"mlp": torch.full((test_affine.HIDDEN, 1, 1), 3.0, dtype=torch.float64)}
    )
    dress_(layer, symmetries=units)
    dress_(twin, symmetries=SymmetryMap(hidden_units=find(twin).hidden_units))
    assert difference(layer, twin) < 1e-13
    assert spectra(layer, symmetries=units) == {}
    with pytest.raises(ValueError, match="no head symmetry of Layer is known"):
        qo.flow.projected_gradient_flow(layer, lambda m: 0, (0, 1), symmetries=units)
