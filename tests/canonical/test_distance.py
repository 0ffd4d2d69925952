"""distance: zero between gauges of one model, what it should be between others."""

import copy
import math

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import distance
from quotientopt.groups import GL
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from tests.canonical.models import (
    ARCHITECTURES,
    GROUPS,
    example,
    hand_made,
    snapshot,
    twin_of,
    unchanged,
)
from tests.symmetries.architectures import small_gpt, small_llama


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_gauges_of_one_model(name):
    model, _ = example(name)
    twin = twin_of(model, cond=1000.0)
    before = snapshot(model), snapshot(twin)
    for relative in (False, True):
        found = distance(model, twin, relative=relative)
        assert max(found.values()) < 1e-11
        names = [symmetry.name for symmetry in qo.find_symmetries(model).pairs]
        assert list(found) == [*names, "other", "total"]
    assert unchanged(model, before[0])
    assert unchanged(twin, before[1])


@pytest.mark.parametrize("name", ["gpt", "gpt2", "llama", "attention-bias-kv"])
def test_different_models(name):
    model, _ = example(name)
    torch.manual_seed(1)
    other, _ = example(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter * torch.randn_like(parameter))
    found = distance(model, other, relative=True)
    assert min(v for key, v in found.items() if key != "other") > 0.5
    assert max(found.values()) <= 2


def output_shifts(model):
    """What the biases of GPT-2's values add to the output biases, by the name of these."""
    return {
        f"transformer.h.{i}.attn.c_proj.bias": (
            layer.attn.c_attn.bias.chunk(3)[2] @ layer.attn.c_proj.weight
        )
        for i, layer in enumerate(model.transformer.h)
    }


def test_values_are_norms_of_differences():
    model, _ = example("gpt2")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = distance(model, other)
    squares = 0.0
    pairs = zip(qo.find_symmetries(model).heads, qo.find_symmetries(other).heads, strict=True)
    for one, two in pairs:
        # A translation moves the biases of keys and values: the pairs are read without them.
        assert len(one.right) == 2
        left, right = (torch.cat(s.left, -1).mT @ s.right[0] for s in (one, two))
        assert math.isclose(found[one.name], (left - right).norm().item(), rel_tol=1e-12)
        squares += found[one.name] ** 2
    covered = {b.name for symmetry in qo.find_symmetries(model).heads for b in symmetry.blocks}
    shifts = output_shifts(model), output_shifts(other)
    rest = [
        (p - q + shifts[0].get(name, 0) - shifts[1].get(name, 0)).square().sum().item()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
        if name not in covered
    ]
    assert math.isclose(found["other"], math.sqrt(sum(rest)), rel_tol=1e-12)
    assert math.isclose(found["total"], math.sqrt(squares + sum(rest)), rel_tol=1e-12)


def test_symmetry_scale_and_triangle():
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(small_llama().double())
    ab, ba, bc, ac = (distance(models[i], models[j]) for i, j in ((0, 1), (1, 0), (1, 2), (0, 2)))
    for name in ab:
        assert math.isclose(ab[name], ba[name], rel_tol=1e-10)
        assert ac[name] <= ab[name] + bc[name]
    assert distance(models[0], models[0])["total"] < 1e-12


def test_a_tiny_difference_is_not_lost():
    """The trace formula would lose half of the digits: 1e-10 from 1 is 1e-20 in the square."""
    model = small_gpt().double()
    twin = twin_of(model, residual=False)
    change = 1e-9
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.blocks[0].attention.key.weight.mul_(1 + change)
    exact = change * distance(model, model_without_keys(model))["blocks.0.attention.qk"]
    found = distance(twin, other)["blocks.0.attention.qk"]
    assert math.isclose(found, exact, rel_tol=1e-3)


def model_without_keys(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].attention.key.weight.zero_()
    return other


def test_residual_rotation_is_divided_out_only_on_request_and_where_exact():
    model = small_gpt().double()
    twin = twin_of(model)
    assert distance(model, twin)["total"] < 1e-11
    assert distance(model, twin, residual=False, relative=True)["total"] > 0.1
    broken = small_llama().double()
    rotated = copy.deepcopy(broken)
    Q = qo.groups.O(32).random(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = qo.find_symmetries(rotated).residual
    with torch.no_grad():
        for name, axis in stream.axes.items():
            rows = stream.parameters[name].movedim(axis, -1)
            rows.copy_(rows @ Q.mT)
    assert distance(broken, rotated, relative=True)["total"] > 0.1


@pytest.mark.parametrize("kind", GROUPS)
def test_other_groups(kind):
    model, _ = hand_made(kind)
    twin = twin_of(model, symmetries=type(model).symmetries)
    maps = (model.symmetries(), twin.symmetries())
    assert max(distance(model, twin, symmetries=maps).values()) < 1e-11
    # Elements of GL(8) are no gauge of the query-key pair of these models.
    wrong = twin_of(model, symmetries=lambda m: m.symmetries(GL(8)))
    found = distance(model, wrong, symmetries=(model.symmetries(), wrong.symmetries()))
    assert found["qk"] > 0.1
    assert found["vo"] < 1e-11


def test_partly_covered_parameters():
    """Rows of a fused parameter that belong to no pair are compared as they are."""
    model, twin = (torch.nn.Linear(12, 20, bias=False).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())

    def pair(linear):
        rows = linear.weight
        left, right = rows[:8].unflatten(0, (2, 4)), rows[8:16].unflatten(0, (2, 4))
        return SymmetryMap([HeadSymmetry([left], [right], GL(4), "pair")])

    pair(twin).act_(pair(twin).random_element())
    maps = (pair(model), pair(twin))
    assert distance(model, twin, symmetries=maps)["total"] < 1e-12
    with torch.no_grad():
        twin.weight[16:] += 1
    found = distance(model, twin, symmetries=maps)
    assert found["pair"] < 1e-12
    assert math.isclose(found["other"], math.sqrt(4 * 12), rel_tol=1e-12)


def test_float32_and_another_dtype():
    model = small_gpt()
    twin = twin_of(model, cond=10.0)
    assert distance(model, twin, relative=True)["total"] < 1e-5
    assert distance(model, model.double(), relative=True)["total"] < 1e-12


def refused(match, *models, **options):
    with pytest.raises(ValueError, match=match) as caught:
        distance(*models, **options)
    assert "\n" not in str(caught.value)


def test_refusals():
    model = small_gpt()
    refused("'head.weight': \\(50, 24\\) and \\(60, 24\\)", model, wider_head())
    refused("'blocks.0.attention_norm.weight' is in the second only", model, small_llama())
    part = SymmetryMap(qo.find_symmetries(model).heads[:3])
    other = copy.deepcopy(model)
    refused(
        "different symmetries: 'blocks.1.attention.vo' is in the second only",
        model,
        other,
        symmetries=(part, qo.find_symmetries(other)),
    )
    llama = small_llama()
    same = copy.deepcopy(llama)
    as_gl = [
        HeadSymmetry(s.left_blocks, s.right_blocks, GL(8), s.name)
        for s in qo.find_symmetries(llama).heads
    ]
    refused(
        "differ in symmetry 'blocks.0.attention.qk'",
        llama,
        same,
        symmetries=(SymmetryMap(as_gl), SymmetryMap(qo.find_symmetries(same).heads)),
    )
    for name in ("blocks.0.attention.key.weight", "head.weight"):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_parameter(name)[0, 0] = torch.nan
        refused("non-finite", model, broken)
        refused("non-finite", model, broken, residual=False)


def wider_head():
    model = small_gpt()
    model.head = torch.nn.Linear(24, 60, bias=False)
    return model
