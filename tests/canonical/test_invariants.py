"""invariants: the products a model can see, kept as factors."""

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import FactoredInvariant, invariants
from quotientopt.groups import GL
from tests.canonical.models import ARCHITECTURES, GROUPS, example, hand_made, twin_of
from tests.symmetries.architectures import small_gpt, small_llama


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_gauges_have_one_invariant(name):
    model, _ = example(name)
    twin = twin_of(model, residual=False)
    ours, theirs = invariants(model), invariants(twin)
    assert list(ours) == [symmetry.name for symmetry in qo.find_symmetries(model).pairs]
    for key, one in ours.items():
        two = theirs[key]
        for tensor in ("left", "right", "singular_values"):
            assert torch.allclose(getattr(one, tensor), getattr(two, tensor), atol=1e-10), tensor
        assert torch.allclose(one.dense(), two.dense(), atol=1e-10)


def test_another_model_has_others():
    one, two = invariants(small_gpt()), invariants(small_gpt())
    for key in one:
        assert (one[key].dense() - two[key].dense()).abs().max() > 1e-2
        assert (one[key].singular_values - two[key].singular_values).abs().max() > 1e-2


def test_dense_is_the_product_with_biases():
    model, _ = example("gpt2")
    found = invariants(model)["transformer.h.0.attn.qk"]
    layer = model.transformer.h[0].attn.c_attn
    augmented = torch.cat((layer.weight, layer.bias[None])).mT.detach()
    query, key, _ = augmented.unflatten(0, (3, 3, 8)).unbind(0)
    key = key[..., :-1]  # The softmax does not see the bias of keys.
    assert found.dense().shape == (3, 25, 24)
    assert torch.allclose(found.dense(), query.mT @ key, atol=1e-12)
    values = torch.linalg.svdvals(query.mT @ key)[:, :8]
    assert torch.allclose(found.singular_values, values, atol=1e-12)
    for factor in (found.left, found.right):
        assert torch.allclose(factor @ factor.mT, torch.diag_embed(values), atol=1e-11)
    assert repr(found) == (
        "FactoredInvariant('transformer.h.0.attn.qk', GL(8), query heads=3, n=25, m=24)"
    )


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_grouped_queries_have_one_invariant_per_query_head(key_value_heads):
    model = small_llama(key_value_heads).double()
    found = invariants(model)["blocks.1.attention.vo"]
    attention = model.blocks[1].attention
    output = attention.output.weight.detach().unflatten(1, (4, 8)).permute(1, 2, 0)
    value = attention.value.weight.detach().unflatten(0, (key_value_heads, 8))
    value = value.repeat_interleave(4 // key_value_heads, dim=0)
    assert found.left.shape == (4, 8, 32)
    assert found.right.shape == (key_value_heads, 8, 32)
    assert torch.allclose(found.dense(), output.mT @ value, atol=1e-12)
    values = torch.linalg.svdvals(output.mT @ value)[:, :8]
    assert torch.allclose(found.singular_values, values, atol=1e-12)
    with pytest.raises(ValueError, match="no rotary planes"):
        _ = found.planes


def test_rotary_planes_are_complete():
    """Equal scores at every relative position need the complex products, not AᵀB alone."""
    model = small_llama().double()
    found = invariants(model)["blocks.0.attention.qk"]
    attention = model.blocks[0].attention
    query = attention.query.weight.detach().unflatten(0, (4, 8))
    key = attention.key.weight.detach().unflatten(0, (2, 8)).repeat_interleave(2, dim=0)
    a, b = (torch.complex(rows[:, :4], rows[:, 4:]) for rows in (query, key))
    dense = found.dense()
    assert dense.shape == (4, 8, 32, 32)
    outer = a.conj().unsqueeze(-1) * b.unsqueeze(-2)
    assert torch.allclose(torch.complex(dense[:, :4], dense[:, 4:]), outer, atol=1e-12)
    assert torch.allclose(dense[:, :4].sum(1), query.mT @ key, atol=1e-12)
    rows_a, rows_b = found.planes
    assert torch.allclose(rows_a.conj().unsqueeze(-1) * rows_b.unsqueeze(-2), outer, atol=1e-12)
    assert torch.allclose(found.singular_values, a.norm(dim=-1) * b.norm(dim=-1), atol=1e-12)
    # The same AᵀB from a GL twin, which is another model:
    twin = invariants(model, symmetries=[_as_gl(model)])["blocks.0.attention.qk"]
    assert torch.allclose(twin.dense(), dense[:, :4].sum(1), atol=1e-11)


def _as_gl(model):
    qk = qo.find_symmetries(model).heads[0]
    return qo.HeadSymmetry(qk.left_blocks, qk.right_blocks, GL(8), qk.name)


def test_a_gl_twin_of_a_rotary_pair_has_other_invariants():
    model = small_llama().double()
    before = invariants(model)["blocks.0.attention.qk"].dense()
    wrong = _as_gl(model)
    wrong.act_(wrong.random_element(generator=torch.Generator().manual_seed(0)))
    after = invariants(model)["blocks.0.attention.qk"].dense()
    assert (before - after).abs().max() > 1e-2
    assert torch.allclose(before[:, :4].sum(1), after[:, :4].sum(1), atol=1e-12)


@pytest.mark.parametrize("kind", GROUPS)
def test_other_groups(kind):
    model, _ = hand_made(kind)
    twin = twin_of(model, symmetries=type(model).symmetries)
    one = invariants(model, symmetries=model.symmetries())["qk"]
    two = invariants(twin, symmetries=twin.symmetries())["qk"]
    assert torch.allclose(one.dense(), two.dense(), atol=1e-10)
    assert torch.allclose(one.singular_values, two.singular_values, atol=1e-10)
    shapes = {
        "partial": (3, 5, 20, 20),
        "normalized": (3, 40, 40),
        "centred": (3, 40, 41),
        "phases": (3, 5, 40, 40),
    }
    assert one.dense().shape == shapes[kind]
    assert one.singular_values.shape == (3, 6 if kind == "partial" else 8)
    query, key = model.query.unflatten(0, (3, 8)), model.key.unflatten(0, (3, 8))
    if kind != "partial":
        values = torch.linalg.svdvals(torch.cat((query, key), dim=-1))
        assert torch.allclose(one.singular_values, values, atol=1e-12)
    else:
        assert torch.allclose(one.dense()[:, -1], query[:, 4:].mT @ key[:, 4:], atol=1e-12)


def test_small_singular_values_keep_their_digits():
    A, B = (torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64)).Q.mT for _ in range(2))
    values = torch.tensor([1.0, 1e-3, 1e-7, 1e-10], dtype=torch.float64)
    found = FactoredInvariant("pair", GL(4), (values[:, None] * A)[None], B[None])
    assert torch.allclose(found.singular_values[0], values, rtol=1e-5, atol=0)


def test_they_are_copies_in_at_least_float32():
    model = small_gpt().bfloat16()
    found = invariants(model)["blocks.0.attention.qk"]
    assert found.left.dtype == torch.float32
    before = found.right.clone()
    with torch.no_grad():
        model.blocks[0].attention.key.weight.zero_()
    assert torch.equal(found.right, before)
    found = invariants(model)["blocks.0.attention.qk"]
    assert found.left.abs().sum() == found.right.abs().sum() == 0
    with torch.no_grad():
        model.blocks[0].attention.key.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.qk': right .*non-finite"):
        invariants(model)
