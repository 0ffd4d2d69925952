"""Translations of biases and scales of hidden units, as the adapters claim them."""

import pytest
import torch
from torch import nn

from quotientopt.groups import GL, Scale
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, Translation, find_symmetries
from tests.symmetries.architectures import attention, encoder_layer, small_llama
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES, build
from tests.symmetries.test_families import CAUGHT, TOLERANCE

# Families whose keys, and whose values, have a bias that moves.
KEYS = {
    "gpt2",
    "opt",
    "opt-350m",
    "bloom",
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "vit",
    "clip",
    "xlm-roberta",
    "camembert",
    "electra",
    "mpnet",
    "bart",
    "mbart",
    "pegasus",
    "siglip",
    "dinov2",
    "wav2vec2",
    "hubert",
}
ROTATED = {
    "gpt-neox",
    "llama",
    "granite",
    "starcoder2",
    "phi",
    "falcon",
    "persimmon",
    "ernie4.5",
    "modernbert",
    "dinov3",
    "qwen2.5-vl",
    "qwen3-vl",
}
# Keys without bias; a key's bias that meets queries of positions.
VALUES = KEYS | ROTATED | {"whisper", "deberta-v2"}
GATED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "smollm3",
    "olmo",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "seed-oss",
    "ministral",
    "llama4",
    "phi3",
    "stablelm",
    "helium",
    "ernie4.5",
    "glm",
    "glm4",
    "eurobert",
    "modernbert",
    "t5",
    "qwen2.5-vl",
    "qwen3-vl",
    "deepseek2",
    "deepseek3",
}
RECTIFIED = {"opt", "opt-350m"}


@pytest.mark.parametrize("name", FAMILIES)
def test_which_biases_move_and_which_units_scale(name):
    symmetries = find_symmetries(FAMILIES[name].model())
    moving = [pair.name for pair in symmetries.heads if pair.translation is not None]
    assert any(key.endswith("qk") for key in moving) == (name in KEYS)
    assert any(key.endswith("vo") for key in moving) == (name in VALUES)
    groups = {pair.group for pair in symmetries.hidden_units}
    expected = {GL(1)} if name in GATED else {Scale(1)} if name in RECTIFIED else set()
    assert groups == expected
    for pair in symmetries.heads:
        if pair.translation is not None:
            assert (pair.translation.sink is None) == pair.name.endswith("qk")


def verify(symmetries, model, name):
    with KeepFloat64():
        return symmetries.verify(model, cond=100.0, **FAMILIES[name].inputs())


def test_a_translation_of_rotated_keys_is_caught():
    model = FAMILIES["granite"].model()
    pair = find_symmetries(model).heads[0]
    bias = [block for block in pair.right_blocks if block.size[2] == 1]
    assert pair.translation is None
    claim = HeadSymmetry(
        pair.left_blocks, pair.right_blocks, pair.group, "qk", translation=Translation(tuple(bias))
    )
    result = verify(SymmetryMap([claim]), model, "granite")
    assert result["qk"] <= TOLERANCE
    assert result["qk.translation"] > CAUGHT


def test_sinks_take_their_part():
    """With sinks the weights of a query do not sum to one."""
    model = FAMILIES["gpt-oss"].model(attention_bias=True)
    pair = find_symmetries(model).heads[1]
    output = model.model.layers[0].self_attn.o_proj.bias
    assert pair.translation is None
    assert output is not None
    bias = pair.right_blocks[1]
    sink = type(bias).of(
        output.detach()[None, None], output, "model.layers.0.self_attn.o_proj.bias"
    )
    claim = HeadSymmetry(
        pair.left_blocks,
        pair.right_blocks,
        pair.group,
        "vo",
        translation=Translation((bias,), sink),
    )
    result = verify(SymmetryMap([claim]), model, "gpt-oss")
    assert result["vo"] <= TOLERANCE
    assert result["vo.translation"] > CAUGHT


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, True),
        ({"add_bias_kv": True}, True),
        ({"kdim": 16, "vdim": 20}, True),
        ({"add_zero_attn": True}, False),
        ({"bias": False}, False),
        ({"bias": False, "add_bias_kv": True}, False),
    ],
)
def test_torch_attention(options, moves):
    model, inputs, _ = attention(**options)
    symmetries = find_symmetries(model)
    assert [pair.translation is not None for pair in symmetries.heads] == [moves, moves]
    result = symmetries.verify(model, *inputs, cond=100.0)
    assert ("qk.translation" in result) == moves
    assert max(result.values()) <= TOLERANCE, result
    if moves:
        # Appended rows move with the biases.
        assert len(symmetries.heads[0].translation.blocks) == 1 + bool(options.get("add_bias_kv"))


def test_an_appended_row_left_behind_is_caught():
    model, inputs, _ = attention(add_bias_kv=True)
    pair = find_symmetries(model).heads[0]
    assert pair.translation is not None
    for moved in (pair.translation.blocks[:1], pair.translation.blocks[1:]):
        claim = HeadSymmetry(
            pair.left_blocks,
            pair.right_blocks,
            pair.group,
            "qk",
            translation=Translation(moved),
        )
        assert SymmetryMap([claim]).verify(model, *inputs)["qk.translation"] > CAUGHT


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_units_of_a_torch_layer(activation):
    model, inputs, _ = encoder_layer(activation=activation)
    symmetries = find_symmetries(model)
    assert len(symmetries.hidden_units) == (activation == "relu")
    assert max(symmetries.verify(model, *inputs).values()) <= TOLERANCE
    # Negative factors do not commute with a ReLU, nor positive ones with another activation.
    model, x = model.double().eval(), inputs[0].double()
    up, down = model.linear1, model.linear2
    claim = HeadSymmetry(
        [down.weight.mT.unsqueeze(1)],
        [up.weight.unsqueeze(1), up.bias.unsqueeze(1)],
        GL(1),
        "units",
    )
    element = torch.full((claim.heads, 1, 1), -1.0 if activation == "relu" else 2.0)
    with torch.no_grad():
        before = model(x)
        claim.act_(element.double())
        assert (model(x) - before).abs().max() > CAUGHT


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
def test_the_gated_half_is_not_scaled(name):
    """Units are the half that enters linearly; the other goes through the activation."""
    model = FAMILIES[name].model()
    pair = find_symmetries(model).hidden_units[0]
    block = pair.right_blocks[0]
    rows = block.parameter.detach().chunk(2)[0].unsqueeze(1)
    other = type(block).of(rows, block.parameter, block.name)
    claim = HeadSymmetry(pair.left_blocks, [other], GL(1), "units")
    assert verify(SymmetryMap([claim]), model, name)["units"] > CAUGHT


def test_rectified_t5_and_squared_units():
    settings = {**FAMILIES["t5"].settings, "feed_forward_proj": "relu"}
    model = build("T5ForConditionalGeneration", **settings)
    symmetries = find_symmetries(model)
    assert {pair.group for pair in symmetries.hidden_units} == {Scale(1)}
    assert max(verify(symmetries, model, "t5").values()) <= TOLERANCE
    settings = {**FAMILIES["opt"].settings, "activation_function": "relu2"}
    assert find_symmetries(build("OPTForCausalLM", **settings)).hidden_units == ()


def test_units_of_the_reference_llama():
    model = small_llama()
    symmetries = find_symmetries(model)
    assert [pair.name for pair in symmetries.hidden_units] == ["blocks.0.units", "blocks.1.units"]
    assert symmetries.heads == tuple(p for p in symmetries.pairs if not p.name.endswith("units"))


def test_an_output_bias_of_two_attentions_takes_nothing():
    first, second = (attention()[0] for _ in range(2))
    second.out_proj.bias = first.out_proj.bias
    symmetries = find_symmetries(nn.ModuleList([first, second]))
    assert len(symmetries.heads) == 4
    for pair in symmetries.heads:
        assert (pair.translation is not None) == pair.name.endswith("qk")


def test_an_output_bias_of_another_dtype_takes_nothing():
    model = attention()[0]
    model.out_proj.bias = nn.Parameter(model.out_proj.bias.detach().to(torch.bfloat16))
    qk, vo = find_symmetries(model).heads
    assert qk.translation is not None
    assert vo.translation is None
