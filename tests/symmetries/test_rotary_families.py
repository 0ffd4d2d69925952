"""Rotary embeddings of every kind, normalised queries and keys, grouped queries."""

import pytest
import torch
from torch import nn

from quotientopt.groups import GL, O, RotaryCommutant, RotaryPhases
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries
from quotientopt.symmetries.adapters.attention import normalised_group
from quotientopt.symmetries.registry import NotUnderstoodError
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES, PARTIAL_ROPE, ROPE
from tests.symmetries.test_families import CAUGHT, TOLERANCE

SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 4},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
}


def verify(symmetries, model, family):
    with KeepFloat64():
        return symmetries.verify(model, cond=100.0, **family.inputs())


@pytest.mark.parametrize("kind", SCALED)
def test_kinds_of_rotary_embedding(kind):
    family = FAMILIES["llama"]
    rope = {**ROPE, "rope_type": kind, **SCALED[kind]}
    model = family.model(rope_parameters=rope, max_position_embeddings=4)
    symmetries = find_symmetries(model)
    assert symmetries.heads[0].group == RotaryCommutant(8, 8)
    # The dynamic kind changes its frequencies when it first sees a longer text.
    model(**family.inputs())
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE


def test_long_and_partial_rotary_embedding():
    family = FAMILIES["phi3"]
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0]}
    rope = {**PARTIAL_ROPE, "rope_type": "longrope", **factors}
    model = family.model(
        rope_parameters=rope, original_max_position_embeddings=4, max_position_embeddings=16
    )
    symmetries = find_symmetries(model)
    assert symmetries.heads[0].group == RotaryCommutant(8, 4)
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE


def test_a_rotary_embedding_for_each_type_of_layer():
    """As OLMo 3 has them unless told otherwise; its attentions name their type as no others do."""
    family = FAMILIES["olmo3"]
    rope = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 100.0}}
    types = ["sliding_attention", "full_attention"]
    model = family.model(rope_parameters=rope, layer_types=types)
    symmetries = find_symmetries(model)
    assert not symmetries.unrecognized
    assert [symmetry.name.rpartition(".")[2] for symmetry in symmetries.heads] == ["vo", "vo"]
    assert len(symmetries.left_alone) == 2
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ["phi3", "gpt-neox"])
@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_rows_that_are_rotated(name, factor):
    family = FAMILIES[name]
    model = family.model(rope_parameters={**ROPE, "partial_rotary_factor": factor})
    symmetries = find_symmetries(model)
    assert symmetries.heads[0].group == RotaryCommutant(8, int(8 * factor))
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE


def test_nothing_is_rotated():
    family = FAMILIES["gpt-neox"]
    model = family.model()
    # Configurations may be changed after the fact, as long as they agree with the module.
    for layer in model.gpt_neox.layers:
        layer.attention.rotary_ndims = 0
    assert find_symmetries(model).unrecognized == tuple(
        f"gpt_neox.layers.{index}.attention" for index in range(2)
    )
    model.config.rope_parameters["partial_rotary_factor"] = 0.0
    assert find_symmetries(model).heads[0].group == GL(8)


def test_unknown_kinds_are_listed():
    model = FAMILIES["llama"].model()
    model.config.rope_parameters["rope_type"] = "spiral"
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert symmetries.unrecognized == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    # The residual stream does not depend on it.
    assert "model.layers.0.self_attn.q_proj.weight" in symmetries.residual.axes


def test_one_branch_after_the_other():
    family = FAMILIES["gpt-neox"]
    model = family.model(use_parallel_residual=False, attention_bias=False)
    symmetries = find_symmetries(model)
    assert [block.size[2] for block in symmetries.heads[0].blocks] == [32, 32]
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_grouped_queries(shared):
    family = FAMILIES["qwen2"]
    model = family.model(num_key_value_heads=shared)
    symmetries = find_symmetries(model)
    for symmetry in symmetries.heads:
        weights = [block for block in symmetry.left_blocks if block.size[2] > 1]
        assert (symmetry.heads, len(weights)) == (shared, 4 // shared)
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE
    # Query heads belong to the key-value head next to them, not to every second one.
    if shared == 2:
        qk = symmetries.heads[0]
        queries = model.model.layers[0].self_attn.q_proj
        views = queries.weight.detach().unflatten(0, (2, 2, 8))
        wrong = HeadSymmetry(
            [type(qk.blocks[0]).of(views[j], queries.weight) for j in range(2)],
            qk.right_blocks,
            qk.group,
            "wrong",
        )
        assert verify(SymmetryMap([wrong]), model, family)["wrong"] > CAUGHT


def freeze_gains_(model, value):
    """Give queries and keys frozen gains, of which `value` makes one from the plane or row."""
    for module in model.modules():
        if hasattr(module, "q_norm"):
            for norm in (module.q_norm, module.k_norm):
                norm.weight.requires_grad_(False)
                norm.weight.copy_(torch.tensor([value(row) for row in range(8)]))
    return model


CONSTANT = {
    "one": lambda row: 1.0,
    "one number for each plane": lambda row: 1.0 + row % 4,
}


@pytest.mark.parametrize("gain", CONSTANT)
def test_frozen_gains_that_commute_with_planes_leave_their_phases(gain):
    family = FAMILIES["qwen3"]
    model = freeze_gains_(family.model(), CONSTANT[gain])
    symmetries = find_symmetries(model)
    qk = symmetries.heads[0]
    assert qk.group == RotaryPhases(8)
    assert max(verify(symmetries, model, family).values()) <= TOLERANCE
    for title, group in {"lengths": RotaryCommutant(8, 8), "rotations": O(8)}.items():
        wrong = HeadSymmetry(qk.left_blocks, qk.right_blocks, group, title)
        assert verify(SymmetryMap([wrong]), model, family)[title] > CAUGHT


def test_other_gains_leave_queries_and_keys_alone():
    family = FAMILIES["qwen3"]
    model = family.model()
    trainable = freeze_gains_(family.model(), CONSTANT["one"])
    for module in trainable.modules():
        if hasattr(module, "q_norm"):
            module.k_norm.weight.requires_grad_(True)
    for candidate in (model, trainable, freeze_gains_(family.model(), lambda row: 1.0 + row)):
        names = [symmetry.name for symmetry in find_symmetries(candidate).heads]
        assert names == ["model.layers.0.self_attn.vo", "model.layers.1.self_attn.vo"]
    # With gains, not even phases are symmetries.
    attention = model.model.layers[0].self_attn
    claim = HeadSymmetry(
        [attention.q_proj.weight.unflatten(0, (2, 2, 8))[:, j] for j in range(2)],
        [attention.k_proj.weight.unflatten(0, (2, 8))],
        RotaryPhases(8),
        "phases",
    )
    assert verify(SymmetryMap([claim]), model, family)["phases"] > CAUGHT


def test_groups_of_normalised_queries_and_keys():
    plain, rotary, partly = GL(8), RotaryCommutant(8, 8), RotaryCommutant(8, 4)
    identity = nn.Identity()
    bare = nn.RMSNorm(8, elementwise_affine=False)
    centred = nn.LayerNorm(8, elementwise_affine=False)
    assert normalised_group((), plain) == plain
    assert normalised_group((identity, identity), rotary) == rotary
    assert normalised_group((bare, bare), plain) == O(8)
    assert normalised_group((identity, bare), plain) == O(8)
    assert str(normalised_group((centred, bare), plain)) == "StabilizerOfOnes(8)"
    assert normalised_group((centred, centred), rotary) is None
    assert normalised_group((bare, bare), partly) == RotaryPhases(8, 4)
    assert normalised_group((nn.RMSNorm(8), bare), plain) is None
    shifted = nn.LayerNorm(8).requires_grad_(False)
    assert normalised_group((shifted,), plain) is not None
    nn.init.constant_(shifted.bias, 0.1)
    assert normalised_group((shifted,), plain) is None
    with pytest.raises(NotUnderstoodError, match="not over 8 rows"):
        normalised_group((nn.RMSNorm(32, elementwise_affine=False),), plain)
    with pytest.raises(NotUnderstoodError, match="not over 8 rows"):
        normalised_group((nn.RMSNorm(32),), plain)
    with pytest.raises(NotUnderstoodError, match="Tanh on queries or keys"):
        normalised_group((nn.Tanh(),), plain)


@pytest.mark.parametrize("rotary_dim", [8, 4, 0])
def test_rotary_phases_are_a_group_of_rotations(rotary_dim):
    group = RotaryPhases(8, rotary_dim)
    passing = 8 - rotary_dim
    assert group.dim == rotary_dim // 2 + passing * (passing - 1) // 2
    generator = torch.Generator().manual_seed(0)
    g, h = (
        group.random((3,), cond=50.0, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    for element in (g, group.inverse(g), group.compose(g, h), group.identity((3,))):
        group.check_element(element)
    torch.testing.assert_close(
        group.compose(g, group.inverse(g)), group.identity((3,), dtype=torch.float64)
    )
    algebra = group.algebra_projection(torch.randn(3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(algebra, -algebra.mT)
    torch.testing.assert_close(group.algebra_projection(algebra), algebra)
    group.check_element(torch.linalg.matrix_exp(algebra))
    # The dimension is that of the algebra.
    images = torch.stack(
        [group.algebra_projection(unit.view(8, 8)) for unit in torch.eye(64, dtype=torch.float64)]
    )
    assert torch.linalg.matrix_rank(images.flatten(1)) == group.dim
    assert group == RotaryPhases(8, rotary_dim)
    assert group != RotaryPhases(8, 2)
    assert str(rotary_dim) in repr(group)
    if rotary_dim:
        with pytest.raises(ValueError, match="not orthogonal"):
            group.check_element(RotaryCommutant(8, rotary_dim).random(dtype=torch.float64))
    if rotary_dim > 2:
        with pytest.raises(ValueError, match="g"):
            group.check_element(O(8).random(dtype=torch.float64))
    with pytest.raises(ValueError, match="cond"):
        group.random(cond=0.5)
