"""LoRA pairs of the peft package."""

import math

import pytest
import torch
from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES
from tests.symmetries.test_families import CAUGHT, TOLERANCE

RANK = 3


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs peft: pip install peft")


def adapted(peft, name="llama", **options):
    """A model of a family with an adapter, its factors random."""
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(FAMILIES[name].model(), peft.LoraConfig(**settings)).eval()
    return randomize_factors_(model)


def randomize_factors_(model):
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def verify(symmetries, model, name="llama", **options):
    with KeepFloat64():
        return symmetries.verify(model, cond=100.0, **FAMILIES[name].inputs(), **options)


def pairs(symmetries):
    return [symmetry for symmetry in symmetries.heads if ".lora." in symmetry.name]


def short(symmetry):
    return symmetry.name.removeprefix("base_model.model.").removesuffix(".lora.default")


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "alora": {"alora_invocation_tokens": [16], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_are_exact(peft, variant):
    model = adapted(peft, **VARIANTS[variant])
    before = {key: p.clone() for key, p in model.named_parameters()}
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 4
    root = "base_model.model.model.layers.0.self_attn.q_proj"
    first = symmetries.heads[0]
    assert first.name == f"{root}.lora.default"
    assert (first.heads, first.group) == (1, GL(RANK))
    assert [tuple(view.shape) for view in first.left + first.right] == [(1, RANK, 32)] * 2
    assert first.left_blocks[0].name == f"{root}.lora_B.default.weight"
    assert first.right_blocks[0].name == f"{root}.lora_A.default.weight"
    assert symmetries.unrecognized == ()
    assert any("a peft.tuners.lora" in breaker for breaker in symmetries.residual.broken_by)
    assert max(verify(symmetries, model).values()) <= TOLERANCE
    symmetries.act_(symmetries.random_element(cond=10.0))
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {key for key in before if ".lora_A." in key or ".lora_B." in key} - {
        key for key in before if key.endswith("lora_B.default.bias")
    }
    wrong = HeadSymmetry(first.left_blocks, first.left_blocks, first.group, "wrong")
    assert verify(SymmetryMap([wrong]), model)["wrong"] > CAUGHT


def test_a_frozen_factor(peft):
    """MiCA freezes B: the pair is one still, but no longer trainable on both sides."""
    model = adapted(peft, init_lora_weights="mica")
    with pytest.warns(UserWarning, match="one side only"):
        symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 4
    assert not any(symmetry.left_blocks[0].parameter.requires_grad for symmetry in symmetries.heads)
    assert max(verify(symmetries, model).values()) <= TOLERANCE


def test_rank_patterns_and_where_the_pair_sits(peft):
    model = adapted(
        peft,
        target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5, "down_proj": 2},
        alpha_pattern={"down_proj": 7},
    )
    symmetries = find_symmetries(model)
    ranks = {short(symmetry): symmetry.group.r for symmetry in symmetries.heads}
    assert ranks == {
        f"model.layers.{layer}.{part}": rank
        for layer in (0, 1)
        for part, rank in (
            ("self_attn.q_proj", 5 if layer else 3),
            ("self_attn.k_proj", 3),
            ("self_attn.o_proj", 3),
            ("mlp.down_proj", 2),
        )
    }
    sizes = {tuple(b.size[2] for b in s.blocks) for s in symmetries.heads if "down" in s.name}
    assert sizes == {(32, 48)}
    assert max(verify(symmetries, model).values()) <= TOLERANCE


def test_untouched_heads_of_a_frozen_base_stay_symmetries(peft):
    model = adapted(peft, target_modules=["up_proj"])
    symmetries = find_symmetries(model)
    assert len(pairs(symmetries)) == 2
    assert len(symmetries.heads) == 6
    assert max(verify(symmetries, model).values()) <= TOLERANCE
    frozen = [s for s in symmetries.heads if s not in pairs(symmetries)]
    assert not any(block.parameter.requires_grad for s in frozen for block in s.blocks)


def test_several_adapters(peft):
    model = adapted(peft, target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=["q_proj", "v_proj"]))
    randomize_factors_(model)
    symmetries = find_symmetries(model)
    names = [symmetry.name for symmetry in symmetries.heads]
    assert sum(name.endswith(".lora.default") for name in names) == 2
    assert sum(name.endswith(".lora.other") for name in names) == 4
    for active in ("default", "other"):
        model.set_adapter(active)
        result = verify(find_symmetries(model), model)
        # An adapter that is not active does nothing, hence its pairs neither: nothing is verified.
        idle = {name for name, value in result.items() if math.isnan(value)}
        assert idle == {n for n in names if ".lora." in n and not n.endswith(f".lora.{active}")}
        assert max(value for name, value in result.items() if name not in idle) <= TOLERANCE
        wrong = {
            symmetry.name: HeadSymmetry(
                symmetry.left_blocks, symmetry.left_blocks, symmetry.group, symmetry.name
            )
            for symmetry in symmetries.heads
        }
        caught = verify(SymmetryMap(list(wrong.values())), model)
        assert all((value > CAUGHT) == key.endswith(active) for key, value in caught.items())
    model.merge_adapter()
    assert len(find_symmetries(model).heads) == 6


def test_conv1d_of_gpt2_and_embeddings(peft):
    model = adapted(
        peft,
        "gpt2",
        target_modules=["c_attn", "c_proj", "wte"],
        fan_in_fan_out=True,
    )
    symmetries = find_symmetries(model)
    sizes = {
        short(symmetry): tuple(block.size for block in symmetry.blocks)
        for symmetry in symmetries.heads
    }
    assert sizes["transformer.h.0.attn.c_attn"] == ((1, 3, 96), (1, 3, 32))
    assert sizes["transformer.h.0.mlp.c_proj"] == ((1, 3, 32), (1, 3, 128))
    assert sizes["transformer.wte"] == ((1, 3, 32), (1, 3, 40))
    assert len(sizes) == 7
    assert max(verify(symmetries, model, "gpt2").values()) <= TOLERANCE


def test_a_shared_layer_has_one_pair(peft):
    model = adapted(peft, "albert", target_modules=["query", "ffn"])
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 2
    assert max(verify(symmetries, model, "albert").values()) <= TOLERANCE


def test_a_fresh_adapter_with_a_zero_factor(peft):
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"])
    model = peft.get_peft_model(FAMILIES["llama"].model(), config)
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 2
    assert all(bool((symmetry.left[0] == 0).all()) for symmetry in symmetries.heads)
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"q_proj\.lora\.default.*one side only"):
        symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 2


def test_what_sees_more_than_the_product_is_listed(peft):
    model = adapted(peft, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    class Sampling:
        """A variant of some later version."""

    layer.lora_variant["default"] = Sampling()
    symmetries = find_symmetries(model)
    root = "base_model.model.model.layers"
    assert [symmetry.name for symmetry in symmetries.heads] == [
        f"{root}.1.self_attn.q_proj.lora.default"
    ]
    assert symmetries.unrecognized == (f"{root}.0.self_attn",)


def test_factors_of_another_shape_are_listed(peft):
    model = adapted(peft, target_modules=["up_proj"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"] = nn.Linear(32, RANK + 1, bias=False)
    symmetries = find_symmetries(model)
    assert len(pairs(symmetries)) == 1
    assert "base_model.model.model.layers.0.mlp.up_proj" in symmetries.unrecognized


def test_layers_that_change_what_is_inside_them_hide_it(peft):
    attention = nn.MultiheadAttention(32, 4)
    body = nn.ModuleDict({"attention": attention, "rest": nn.Linear(4, 4)})
    config = peft.LoraConfig(r=RANK, target_modules=["attention"])
    model = peft.get_peft_model(body, config)
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert symmetries.unrecognized == ("base_model.model.attention",)


def test_learned_keys_and_values_break_every_pair(peft):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(FAMILIES["llama"].model(), config).eval()
    symmetries = find_symmetries(model)
    assert symmetries.heads == ()
    assert symmetries.unrecognized == tuple(
        f"base_model.model.layers.{index}.self_attn" for index in range(2)
    )
    inside = find_symmetries(model.base_model)
    assert len(inside.heads) == 4
    with KeepFloat64():
        result = inside.verify(model, **FAMILIES["llama"].inputs())
    # Hidden units are scaled as before.
    assert min(result[symmetry.name] for symmetry in inside.heads) > CAUGHT
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(FAMILIES["llama"].model(), prompts).eval()
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 4
    assert "parameters outside the recognised stream" in str(symmetries.residual.broken_by)
    assert max(verify(symmetries, model).values()) <= TOLERANCE


# ---- a quantised base ---------------------------------------------------------------------------


class Quantised(nn.Linear):
    """A layer that keeps its weight as whole numbers from 0 to 255, and computes with others."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = (40 * layer.weight + 128).clamp(0, 255).to(torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        weight = (self.weight.to(x.dtype) - 128) / 40
        return nn.functional.linear(x, weight, self.bias)


def quantised(names, layer=0):
    model = FAMILIES["llama"].model().requires_grad_(False)
    attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
    for name in names:
        parent = attention if hasattr(attention, name) else mlp
        setattr(parent, name, Quantised(getattr(parent, name)))
    return model


EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_quantised_base(peft):
    base = quantised(EVERYTHING)
    settings = {"r": RANK, "target_modules": ["q_proj", "v_proj"]}
    model = randomize_factors_(peft.get_peft_model(base, peft.LoraConfig(**settings)).eval())
    symmetries = find_symmetries(model)
    assert [short(symmetry) for symmetry in symmetries.heads] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    assert "base_model.model.model.layers.0.self_attn" in symmetries.unrecognized
    assert not symmetries.residual.exact
    assert max(verify(symmetries, model).values()) <= TOLERANCE
    before = {name: p.clone() for name, p in model.named_parameters()}
    symmetries.act_(symmetries.random_element(cond=10.0))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_a_quantised_matrix_beside_adapters_belongs_to_no_pair(peft):
    """Plain layers with whole numbers in them, which find nothing to act on."""
    base = FAMILIES["llama"].model().requires_grad_(False)
    for module in (base.model.layers[0].self_attn.k_proj, base.model.layers[1].mlp.down_proj):
        module.weight = nn.Parameter((40 * module.weight).to(torch.int8), requires_grad=False)
    settings = {"r": RANK, "target_modules": ["gate_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    symmetries = find_symmetries(model)
    names = [
        symmetry.name.removeprefix("base_model.model.model.layers.")
        for symmetry in symmetries.heads
    ]
    assert names == [
        "0.mlp.gate_proj.lora.default",
        "1.self_attn.qk",
        "1.self_attn.vo",
        "1.mlp.gate_proj.lora.default",
    ]
    assert symmetries.unrecognized == ("base_model.model.model.layers.0.self_attn",)
    assert any("int8" in breaker for breaker in symmetries.residual.broken_by)


def test_a_quantised_model_without_adapters_is_refused():
    model = quantised(["k_proj"], layer=1)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight.*uint8"):
        find_symmetries(model)


def test_layers_of_bitsandbytes(peft):
    """Under their names, on a stand-in: the layers themselves need that package."""
    layer = type("Linear4bit", (nn.Module,), {"__module__": "peft.tuners.lora.bnb"})()
    base = Quantised(nn.Linear(6, 5))
    config = peft.LoraConfig(r=RANK, init_lora_weights=False)
    plain = peft.tuners.lora.layer.Linear(base, "default", config=config, r=RANK)
    layer.base_layer, layer.lora_A, layer.lora_B = plain.base_layer, plain.lora_A, plain.lora_B
    layer.r, layer.lora_variant = plain.r, plain.lora_variant
    (pair,) = find_symmetries(layer).heads
    assert (pair.name, pair.group, pair.columns) == ("lora.default", GL(RANK), (5, 6))
