"""Pairs on which no group acts: the map says which, and what stands in the way."""

import pytest

from quotientopt.groups import GL
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import DECODER, EXPERTS, FAMILIES, build, text
from tests.symmetries.test_families import CAUGHT, TOLERANCE


def verify(symmetries, model):
    with KeepFloat64():
        return symmetries.verify(model, cond=100.0, **text())


def test_a_norm_behind_the_heads_leaves_no_value_output_pair():
    model = build("BitNetForCausalLM", **DECODER)
    symmetries = find_symmetries(model)
    names = [f"model.layers.{index}.self_attn" for index in range(2)]
    assert [symmetry.name for symmetry in symmetries.heads] == [f"{name}.qk" for name in names]
    assert symmetries.unrecognized == ()
    assert list(symmetries.left_alone) == [f"{name}.vo" for name in names]
    line = "left alone: model.layers.0.self_attn.vo and 1 more, attn_sub_norm normalises"
    assert line in str(symmetries)
    assert max(verify(symmetries, model).values()) <= TOLERANCE
    attention = model.model.layers[0].self_attn
    claim = HeadSymmetry(
        [attention.o_proj.weight.mT.unflatten(0, (2, 2, 8))[:, j] for j in range(2)],
        [attention.v_proj.weight.unflatten(0, (2, 8))],
        GL(8),
        "vo",
    )
    assert verify(SymmetryMap([claim]), model)["vo"] > CAUGHT


def test_a_gate_on_every_entry_leaves_nothing():
    settings = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
        "shared_expert_intermediate_size": 24,
    }
    symmetries = find_symmetries(build("Qwen3NextForCausalLM", **DECODER, **EXPERTS, **settings))
    assert symmetries.heads == symmetries.unrecognized == ()
    assert len(symmetries.left_alone) == 4
    assert "a gate multiplies every entry of the heads" in str(symmetries)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2", "persimmon"])
def test_gains_of_normalised_queries_and_keys(name):
    symmetries = find_symmetries(FAMILIES[name].model())
    assert len(symmetries.left_alone) == FAMILIES[name].attentions
    assert all(pair.endswith(".qk") for pair in symmetries.left_alone)
    assert "queries and keys are normalised" in str(symmetries)
    assert find_symmetries(FAMILIES["llama"].model()).left_alone == {}
