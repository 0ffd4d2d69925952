"""Models with heads of deficient rank: padded, pruned, with outputs that start at zero."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import align_, dress_, invariants
from quotientopt.symmetries import find_symmetries
from tests.canonical.models import deviation, difference, hand_made, snapshot, twin_of, unchanged
from tests.symmetries.architectures import small_gpt, small_llama, tokens

BUILDERS = {"gpt": small_gpt, "llama": small_llama}
models = pytest.mark.parametrize("name", BUILDERS)


@torch.no_grad()
def deficient(name):
    """An output at zero, pruned channels, a padded head and a head of rank 1, in two layers."""
    model = BUILDERS[name]().double()
    first, second = (block.attention for block in model.blocks)
    r = first.head_width
    first.output.weight[:, :r] = 0  # an output that starts at zero
    first.value.weight[r : r + 2] = 0  # channels pruned on one side
    second.query.weight[: r // 2], second.key.weight[: r // 2] = 0, 0  # a head padded to its width
    second.value.weight[1:r] = second.value.weight[:1] * torch.arange(1.0, r)[:, None]
    return model


def logits(model):
    with torch.no_grad():
        return model(tokens())


@models
def test_dressing(name):
    model = deficient(name)
    twin = twin_of(model, cond=1000.0, residual=False)
    assert deviation(logits, model, twin) < 1e-9
    one, two = copy.deepcopy(model), copy.deepcopy(twin)
    element = dress_(one)
    dress_(two)
    assert all(torch.isfinite(g).all() for g in element.values())
    assert not any(gap.isnan().any() for gap in element.gaps.values())
    assert deviation(logits, model, one) < 1e-9
    assert deviation(logits, model, two) < 1e-9
    assert difference(one, two) < 1e-10
    again = copy.deepcopy(one)
    dress_(again)
    assert difference(one, again) < 1e-10
    # It is a gauge transformation: what starts at zero can still be trained.
    rows = find_symmetries(one).heads[1].right[0][0]
    assert rows.norm(dim=-1).min() > 0.1
    # Controls: the twins differ, and other weights behind a zero output do too.
    assert difference(model, twin) > 1e-2
    with torch.no_grad():
        model.blocks[0].attention.value.weight[0] += 1
    assert deviation(logits, model, twin) < 1e-9 or name == "llama"
    dress_(model)
    assert difference(model, one) > 1e-3


@models
def test_invariants_leave_out_what_is_not_seen(name):
    model = deficient(name)
    found = invariants(model)
    other = invariants(twin_of(model, residual=False))
    for key, one in found.items():
        assert (one.left - other[key].left).abs().max() < 1e-9
        assert (one.right - other[key].right).abs().max() < 1e-9
        dense = one.dense()
        assert torch.isfinite(dense).all()
    first = model.blocks[0].attention
    if name == "gpt":  # with grouped queries the value is still seen by another query head
        assert found["blocks.0.attention.vo"].left[0].abs().sum() == 0
        assert found["blocks.0.attention.vo"].right[0].abs().sum() == 0
    r = first.head_width
    W = first.output.weight.detach()[:, r : 2 * r] @ first.value.weight.detach()[r : 2 * r]
    if name == "gpt":
        assert (found["blocks.0.attention.vo"].dense()[1] - W).abs().max() < 1e-12
    values = found["blocks.1.attention.vo"].singular_values
    assert values[0, 1:].max() < 1e-12 < values[0, 0]


@models
def test_aligning(name):
    model = deficient(name)
    twin = twin_of(model, cond=1000.0)
    before = logits(twin)
    align_(twin, model)
    assert (logits(twin) - before).abs().max() < 1e-9 * before.abs().max()
    assert difference(twin, model) < 1e-8
    other = deficient(name)
    with torch.no_grad():
        other.blocks[0].attention.output.weight += 0.1
    before = logits(model)
    align_(model, other)
    assert (logits(model) - before).abs().max() < 1e-9 * before.abs().max()
    assert qo.distance(model, other)["total"] > 1e-2


def test_the_balanced_section_refuses():
    model = deficient("gpt")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks.0.attention.vo': .*rank-deficient"):
        dress_(model, "balanced")
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["normalized", "centred", "partial", "phases"])
def test_other_groups(kind):
    model, _ = hand_made(kind)
    with torch.no_grad():
        model.query[:5] = 0
        model.key[:4] = 0
        model.output.zero_()
    twin = twin_of(model, symmetries=type(model).symmetries, cond=100.0)
    assert difference(model, twin) > 1e-2
    for one in (model, twin):
        dress_(one, symmetries=one.symmetries())
        assert all(torch.isfinite(parameter).all() for parameter in one.parameters())
    assert difference(model, twin) < 1e-10
