"""Every symmetry that is claimed is one, for every family of the transformers package."""

from dataclasses import replace

import pytest
import torch

from quotientopt.groups import GL, RotaryCommutant, StabilizerOfOnes
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries
from quotientopt.symmetries.residual import CentredStream
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import (
    FAMILIES,
    WIDTH,
    OutputsOnly,
    build,
    gains,
    make_neutral_,
    values,
)

TOLERANCE = 1e-10
LATENT = {"deepseek2", "deepseek3"}
CAUGHT = 1e-3

# What acts on the stream entry by entry: activations, layer scales, pooling heads, images in texts.
BASES_OF_THEIR_OWN = {
    "whisper",
    "siglip",
    "dinov2",
    "dinov3",
    "wav2vec2",
    "hubert",
    "qwen2.5-vl",
    "qwen3-vl",
}


def doubled(family):
    inputs = family.inputs().items()
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs}


def run(model, inputs, output="logits"):
    with torch.no_grad(), KeepFloat64():
        return OutputsOnly(model, output)(**inputs)


def deviation(result, expected):
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_claims_are_exact(name):
    family = FAMILIES[name]
    model = family.model()
    before = [parameter.clone() for parameter in model.parameters()]
    symmetries = find_symmetries(model)
    groups = [str(symmetry.group) for symmetry in symmetries.heads]
    assert groups == family.claimed
    heads = {family.heads} if isinstance(family.heads, int) else set(family.heads)
    assert {symmetry.heads for symmetry in symmetries.heads} == heads
    assert symmetries.unrecognized == ()
    with KeepFloat64():
        result = symmetries.verify(model, cond=100.0, **family.inputs())
    assert {symmetry.name for symmetry in symmetries.pairs} <= set(result)
    assert set(result) == set(symmetries.random_element())
    # Gains and means of norms are counted besides: no element acts on them.
    assert set(result) <= set(symmetries.redundancy())
    assert max(result.values()) <= TOLERANCE, result
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_symmetries_act_at_once_on_the_model_itself(name):
    family = FAMILIES[name]
    model, inputs = family.model().double(), doubled(family)
    before = run(model, inputs)
    weights = [parameter.clone() for parameter in model.parameters()]
    symmetries = find_symmetries(model)
    symmetries.act_(
        symmetries.random_element(cond=30.0, generator=torch.Generator().manual_seed(1))
    )
    changes = [(p - q).abs().max() for p, q in zip(model.parameters(), weights, strict=True)]
    assert max(changes) > 0.1
    assert deviation(run(model, inputs), before) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LATENT])
def test_blocks_cover_queries_keys_values_and_outputs_once(name):
    family = FAMILIES[name]
    model = family.model()
    touched = {}
    for symmetry in find_symmetries(model).heads:
        # Query heads of one key-value head are as many blocks.
        blocks = [block for block in symmetry.left_blocks if block.size[2] > 1]
        members = [family.members] if isinstance(family.members, int) else family.members
        assert len(blocks) in members
        for block in symmetry.blocks:
            mask = touched.setdefault(block.name, torch.zeros_like(block.parameter))
            block.view(mask).add_(1)
    attentions = [
        f"{prefix}."
        for prefix, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and "Layer" not in type(module).__name__
    ]
    outputs = ("out", "o_proj", "dense", "c_proj", "Wo")
    for key, parameter in model.named_parameters():
        part = key.rpartition(".")[0].rpartition(".")[2]
        if not key.startswith(tuple(attentions)) or "norm" in part.lower():
            continue
        alone = None in family.groups and part in ("q_proj", "k_proj")
        if name == "qwen3-vl":
            alone &= "language_model" in key
        output_bias = parameter.ndim == 1 and (part.startswith(outputs) or part in ("o", "proj"))
        if name == "persimmon" and part == "query_key_value":
            rows = touched[key].unflatten(0, (family.heads, 3, -1))
            assert not bool(rows[:, :2].any())
            assert bool((rows[:, 2] == 1).all())
        elif key.endswith(".sinks") or alone or output_bias or part == "relative_attention_bias":
            assert key not in touched
        else:
            assert bool((touched[key] == 1).all()), key


@pytest.mark.parametrize(
    "name",
    [name for name, family in FAMILIES.items() if str(family.groups[0]).startswith("Rotary")],
)
def test_a_wrong_group_on_rotated_queries_and_keys_is_caught(name):
    family = FAMILIES[name]
    model = family.model()
    qk = find_symmetries(model).heads[0]
    layouts = ["half", "interleaved"]
    layouts.remove(qk.group.layout)
    # Planes of neighbouring rows that are not rotated are no mistake.
    partly = qk.group.rotary_dim == 4 and qk.group.layout == "half"
    wrong = {
        "all of GL": GL(8),
        "another layout": RotaryCommutant(8, qk.group.rotary_dim, *layouts),
        "more rows": RotaryCommutant(8, 8) if partly else GL(8),
    }
    for title, group in wrong.items():
        claim = HeadSymmetry(qk.left_blocks, qk.right_blocks, group, title)
        with KeepFloat64():
            result = SymmetryMap([claim]).verify(model, **family.inputs())
        assert result[title] > CAUGHT, title


@pytest.mark.parametrize("name", FAMILIES)
def test_leaving_out_a_block_is_caught(name):
    family = FAMILIES[name]
    model = family.model()
    wrong = []
    for symmetry in find_symmetries(model).heads[:2]:
        for side in ("left", "right"):
            blocks = getattr(symmetry, f"{side}_blocks")
            if len(blocks) > 1:
                left, right = symmetry.left_blocks, symmetry.right_blocks
                # The bias of keys adds the same to all scores of a query, except with positions.
                if side == "right" and symmetry.name.endswith("qk"):
                    continue
                sides = (left[:-1], right) if side == "left" else (left, right[:-1])
                wrong.append(HeadSymmetry(*sides, symmetry.group, f"{symmetry.name} {side}"))
    with KeepFloat64():
        result = SymmetryMap(wrong).verify(model, **family.inputs()) if wrong else {}
    assert all(value > CAUGHT for value in result.values()), result


@pytest.mark.parametrize("name", FAMILIES)
def test_residual_axes(name):
    family = FAMILIES[name]
    model = family.model()
    residual = find_symmetries(model).residual
    assert residual.dimension == family.width
    for key, axis in residual.axes.items():
        assert residual.parameters[key].shape[axis] == family.width
    assert not residual.exact
    if gains(model):
        assert any("trainable gain" in breaker for breaker in residual.broken_by)
    outside = {id(p) for p in model.parameters()} - {id(p) for p in residual.parameters.values()}
    left = [key for key, p in model.named_parameters() if id(p) in outside]
    # Matrices outside the stream: another space before or behind it.
    matrices = {key for key in left if model.get_parameter(key).ndim > 1}
    expected = {
        "opt-350m": {"model.decoder.embed_tokens.weight"},
        "t5": {
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            for stack in ("encoder", "decoder")
        },
        "albert": {
            f"albert.embeddings.{part}_embeddings.weight"
            for part in ("word", "position", "token_type")
        },
        "whisper": {f"model.encoder.conv{index}.weight" for index in (1, 2)},
        "electra": {
            f"electra.embeddings.{part}_embeddings.weight"
            for part in ("word", "position", "token_type")
        },
        "mpnet": {"mpnet.encoder.relative_attention_bias.weight"},
        "gpt-oss": {f"model.layers.{index}.mlp.experts.gate_up_proj_bias" for index in (0, 1)},
        "siglip": {
            f"vision_model.head.{part}"
            for part in (
                "probe",
                "attention.in_proj_weight",
                "attention.out_proj.weight",
                "mlp.fc1.weight",
                "mlp.fc2.weight",
            )
        },
    }
    latent = {
        f"model.layers.{index}.self_attn.{part}_b_proj.weight"
        for index in (0, 1)
        for part in ("q", "kv")
    }
    expected |= dict.fromkeys(LATENT, latent)
    elsewhere = ("model.visual.", "wav2vec2.", "hubert.")
    if name in ("qwen2.5-vl", "qwen3-vl", "wav2vec2", "hubert"):
        matrices = {key for key in matrices if not key.startswith(elsewhere)}
    assert matrices == expected.get(name, set())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BASES_OF_THEIR_OWN])
def test_axes_are_right_once_gains_are_one(name):
    """O(d), or what centring leaves of it, acts on the axes without changing the function."""
    family = FAMILIES[name]
    untied = {"tie_word_embeddings": False} if family.tied else {}
    model, inputs = make_neutral_(family.model(**untied).double()), doubled(family)
    symmetries = find_symmetries(model)
    residual = symmetries.residual
    assert "another use" not in str(residual.broken_by)
    before = run(model, inputs)
    if residual.exact:
        element = symmetries.random_element()["residual"]
    else:
        assert isinstance(residual, CentredStream)
        assert residual.group == StabilizerOfOnes(family.width)
        assert all(breaker.startswith("centring of ") for breaker in residual.broken_by)
        element = residual.group.random(dtype=torch.float64)
    weights = {key: p.clone() for key, p in model.named_parameters()}
    symmetries.act_({"residual": element})
    assert deviation(run(model, inputs), before) <= TOLERANCE
    # Without one of the readers or writers it is caught.
    used = [key for key in residual.axes if not (key.endswith("shared.weight") and name != "t5")]
    for key in used[1::7]:
        changed = model.get_parameter(key)
        rotated = changed.detach().clone()
        with torch.no_grad():
            changed.copy_(weights[key])
        assert deviation(run(model, inputs), before) > 1e-6, key
        with torch.no_grad():
            changed.copy_(rotated)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_centring_breaks_the_rest_of_the_rotations(name):
    family = FAMILIES[name]
    model, inputs = make_neutral_(family.model(tie_word_embeddings=False).double()), doubled(family)
    residual = find_symmetries(model).residual
    before = run(model, inputs)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    with pytest.raises(ValueError, match="does not fix the all-ones vector"):
        residual.act_(rotation)
    with pytest.raises(ValueError, match=r"shape \(32, 32\)"):
        residual.act_(rotation[:5, :5])
    assert deviation(run(model, inputs), before) == 0
    plain = replace(find_symmetries(family.model()).residual, broken_by=())
    assert not isinstance(plain, CentredStream)
    rest = SymmetryMap(residual=replace(plain, axes=residual.axes, parameters=residual.parameters))
    rest.act_({"residual": rotation})
    assert deviation(run(model, inputs), before) > CAUGHT


VARIANTS = {
    "BertLMHeadModel": ("bert", {"is_decoder": True, "add_cross_attention": True}, 4),
    "RobertaForCausalLM": ("roberta", {"is_decoder": True, "add_cross_attention": True}, 4),
    "GPT2LMHeadModel": ("gpt2", {"add_cross_attention": True}, 4),
    "BertModel": ("bert", {}, 2),
    "AlbertModel": ("albert", {"num_hidden_groups": 3, "inner_group_num": 2}, 6),
    "ViTModel": ("vit", {"qkv_bias": False}, 2),
    "CLIPVisionModelWithProjection": ("clip", {}, 2),
    "T5EncoderModel": ("t5", {"feed_forward_proj": "relu", "d_kv": 4}, 2),
    "WhisperModel": ("whisper", {}, 6),
    "BloomModel": ("bloom", {"apply_residual_connection_post_layernorm": True}, 2),
    "Phi3ForSequenceClassification": ("phi3", {"num_labels": 3}, 2),
}


@pytest.mark.parametrize("class_name", VARIANTS)
def test_other_models_of_the_families(class_name):
    name, settings, attentions = VARIANTS[class_name]
    family = FAMILIES[name]
    own = family.settings.get("vision_config" if "Vision" in class_name else "text_config")
    model = build(class_name, **{**(own or family.settings), **settings})
    inputs = family.inputs()
    if "Encoder" in class_name or "Vision" in class_name:
        inputs = {key: x for key, x in inputs.items() if key in ("input_ids", "pixel_values")}
        inputs.pop("input_ids" if "Vision" in class_name else "pixel_values", None)
    if settings.get("add_cross_attention"):
        inputs["encoder_hidden_states"] = values(2, 4, WIDTH)
    symmetries = find_symmetries(model)
    assert len(symmetries.heads) == 2 * attentions
    assert symmetries.unrecognized == ()
    assert symmetries.residual.dimension == WIDTH
    assert not any("not understood" in breaker for breaker in symmetries.residual.broken_by)
    with KeepFloat64():
        result = symmetries.verify(model, cond=100.0, **inputs)
    assert max(result.values()) <= TOLERANCE, result
