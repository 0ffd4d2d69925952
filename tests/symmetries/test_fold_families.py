"""Folding norms of models of the transformers package: what O(d) needs, and nothing else."""

import pytest
import torch
from torch import nn

from quotientopt.symmetries import SymmetryMap, find_symmetries, fold_norms_
from quotientopt.symmetries.fold import UncentredLayerNorm
from quotientopt.symmetries.residual import CentredStream
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import FAMILIES, OutputsOnly, build, gains, transformers
from tests.symmetries.test_families import CAUGHT, TOLERANCE, deviation, doubled, run

FOLDING = [name for name, family in FAMILIES.items() if family.folds]
TIED = [name for name in FOLDING if FAMILIES[name].tied]


def tie(name, tied):
    return {"tie_word_embeddings": tied} if FAMILIES[name].tied else {}


def values_of(model):
    return [parameter.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", FOLDING)
def test_function_is_unchanged_and_rotations_exact(name):
    family = FAMILIES[name]
    model, inputs = family.model(**tie(name, False)).double(), doubled(family)
    before = run(model, inputs)
    assert not find_symmetries(model).residual.exact
    # T5 is always tied.
    symmetries = fold_norms_(model, untie=name == "t5")
    assert deviation(run(model, inputs), before) <= TOLERANCE
    assert symmetries.residual.exact
    for gain, neutral in gains(model):
        assert bool((gain == neutral).all())
        assert not gain.requires_grad
    with KeepFloat64():
        result = symmetries.verify(OutputsOnly(model), cond=100.0, **inputs)
    assert max(result.values()) <= TOLERANCE, result
    assert result["residual"] > 0
    assert "exact" in str(symmetries)
    # Once more changes nothing.
    weights = values_of(model)
    assert fold_norms_(model).residual.exact
    assert all(map(torch.equal, model.parameters(), weights))


@pytest.mark.parametrize("name", FOLDING)
def test_rotating_before_folding_is_caught(name):
    family = FAMILIES[name]
    model, inputs = family.model(**tie(name, False)).double(), doubled(family)
    before = run(model, inputs)
    broken = find_symmetries(model).residual
    rotation = torch.linalg.qr(torch.randn(family.width, family.width, dtype=torch.float64)).Q
    exact = type(broken)(broken.dimension, broken.axes, broken.parameters)
    SymmetryMap(residual=exact).act_({"residual": rotation})
    assert deviation(run(model, inputs), before) > CAUGHT


@pytest.mark.parametrize("name", TIED)
def test_tied_heads_are_refused_or_untied_on_request(name):
    family = FAMILIES[name]
    model, inputs = family.model(**tie(name, True)).double(), doubled(family)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    before, weights = run(model, inputs), values_of(model)
    with pytest.raises(ValueError, match=r"is tied .*fold_norms_\(model, untie=True\)"):
        fold_norms_(model)
    assert all(map(torch.equal, model.parameters(), weights))
    assert head.weight is embedding.weight
    assert model.config.tie_word_embeddings
    symmetries = fold_norms_(model, untie=True)
    assert symmetries.residual.exact
    assert head.weight is not embedding.weight
    assert head.weight.requires_grad
    assert not model.config.tie_word_embeddings
    assert deviation(run(model, inputs), before) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_folded_models_are_saved_and_loaded_as_usual(name, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.model(**tie(name, True)).double(), doubled(family)
    before = run(model, inputs)
    fold_norms_(model, untie=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not any(isinstance(module, UncentredLayerNorm) for module in loaded.modules())
    # Rotary frequencies are made anew, from float32 angles.
    assert deviation(run(loaded, inputs), before) <= 1e-6


REFUSED = {
    "bloom": "word_embeddings_layernorm, whose output is read by a skip connection",
    "opt-350m": "self_attn_layer_norm, whose output is read by a skip connection",
    "gemma2": r"post_attention_layernorm\.weight, whose output is read by a skip connection",
    "bert": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "roberta": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "distilbert": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "albert": r"attention\.LayerNorm, whose output is read by a skip connection",
    "clip": "pre_layrnorm, whose output is read by a skip connection",
    "whisper": r"activation behind model\.encoder\.conv2",
    "gemma3": r"post_attention_layernorm\.weight, whose output is read by a skip connection",
    "glm4": r"post_self_attn_layernorm\.weight, whose output is read by a skip connection",
    "olmo": r"centring of model\.norm, which is no plain LayerNorm",
    "olmo2": r"post_attention_layernorm\.weight, whose output is read by a skip connection",
    "olmo3": r"post_attention_layernorm\.weight, whose output is read by a skip connection",
    "cohere": r"centring of model\.norm, which is no plain LayerNorm",
    "cohere2": r"centring of model\.norm, which is no plain LayerNorm",
    "qwen2.5-vl": r"images, which model\.visual writes",
    "qwen3-vl": r"images, which model\.visual writes",
    "xlm-roberta": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "camembert": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "electra": r"attention\.output\.LayerNorm, whose output is read by a skip connection",
    "mpnet": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "modernbert": r"embeddings\.norm, whose output is read by a skip connection",
    "deberta-v2": r"embeddings\.LayerNorm, whose output is read by a skip connection",
    "bart": "layernorm_embedding, whose output is read by a skip connection",
    "mbart": "layernorm_embedding, whose output is read by a skip connection",
    "siglip": r"pooling by vision_model\.head",
    "dinov2": r"layer scale encoder\.layer\.0\.layer_scale1",
    "dinov3": r"layer scale model\.layer\.0\.layer_scale1",
    "wav2vec2": r"activation of wav2vec2\.encoder\.pos_conv_embed",
    "hubert": r"activation of hubert\.encoder\.pos_conv_embed",
}


def test_every_family_folds_or_is_refused():
    assert set(FOLDING) | set(REFUSED) == set(FAMILIES)
    assert not set(FOLDING) & set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("untie", [False, True])
def test_norms_that_write_to_the_stream_are_refused(name, untie):
    model = FAMILIES[name].model(**({"tie_word_embeddings": False} if FAMILIES[name].tied else {}))
    weights = values_of(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=REFUSED[name]):
        fold_norms_(model, untie=untie)
    assert all(map(torch.equal, model.parameters(), weights))
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_that_returns_its_hidden_states():
    package = transformers()
    family = FAMILIES["llama"]
    base = package.LlamaModel(package.LlamaConfig(**family.settings))
    assert "hidden states that the model returns" in find_symmetries(base).residual.broken_by
    with pytest.raises(ValueError, match="LlamaModel: hidden states that the model returns"):
        fold_norms_(base)
    wrapped = nn.ModuleDict({"body": base})
    assert "hidden states that body returns" in find_symmetries(wrapped).residual.broken_by


HEADS = {
    "LlamaForSequenceClassification": ("llama", "score.weight", "logits"),
    "Qwen2ForTokenClassification": ("qwen2", "score.weight", "logits"),
    "Qwen3ForQuestionAnswering": ("qwen3", "qa_outputs.weight", "start_logits"),
    "CLIPTextModelWithProjection": ("clip", "text_projection.weight", "text_embeds"),
}


@pytest.mark.parametrize("class_name", HEADS)
def test_other_heads_fold_too(class_name):
    name, reader, output = HEADS[class_name]
    settings = FAMILIES[name].settings
    model = build(class_name, **settings.get("text_config", settings), num_labels=3).double()
    inputs = {"input_ids": FAMILIES[name].inputs()["input_ids"]}
    before = run(model, inputs, output)
    symmetries = fold_norms_(model)
    assert deviation(run(model, inputs, output), before) <= TOLERANCE
    assert symmetries.residual.exact
    assert symmetries.residual.axes[reader] == 1
    with KeepFloat64():
        result = symmetries.verify(OutputsOnly(model, output), **inputs)
    assert max(result.values()) <= TOLERANCE


def test_norms_without_gains_leave_only_the_centring_to_fold():
    settings = {"layer_norm_elementwise_affine": False, "enable_bias": False}
    family = FAMILIES["opt"]
    model = family.model(**settings, tie_word_embeddings=False).double()
    inputs = doubled(family)
    assert isinstance(find_symmetries(model).residual, CentredStream)
    readers = model.model.decoder.layers[0].fc1.weight.clone()
    before = run(model, inputs)
    symmetries = fold_norms_(model)
    assert symmetries.residual.exact
    assert deviation(run(model, inputs), before) <= TOLERANCE
    assert torch.equal(model.model.decoder.layers[0].fc1.weight, readers)
    with KeepFloat64():
        assert max(symmetries.verify(OutputsOnly(model), **inputs).values()) <= TOLERANCE


def test_biases_of_norms_go_into_the_biases_of_readers_or_are_divided():
    family = FAMILIES["gpt-neox"]
    model, inputs = family.model().double(), doubled(family)
    block, last = model.gpt_neox.layers[0], model.gpt_neox.final_layer_norm
    gain, bias = last.weight.clone(), last.bias.clone()
    weight = block.attention.query_key_value.weight.clone()
    inner = block.input_layernorm.weight.clone(), block.input_layernorm.bias.clone()
    offset = block.attention.query_key_value.bias.clone()
    fold_norms_(model)
    assert bool((block.input_layernorm.bias == 0).all())
    torch.testing.assert_close(block.attention.query_key_value.weight, weight * inner[0])
    torch.testing.assert_close(
        block.attention.query_key_value.bias, offset + weight @ inner[1], rtol=1e-12, atol=1e-12
    )
    # The head has no bias.
    torch.testing.assert_close(last.bias, bias / gain, rtol=1e-12, atol=1e-12)
    embedding = model.gpt_neox.embed_in.weight
    assert embedding.mean(-1).abs().max() <= 1e-15
    model = family.model().double()
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[3] = 0.0
        model.gpt_neox.layers[1].input_layernorm.weight[2] = 0.0
    weights = values_of(model)
    with pytest.raises(ValueError, match=r"gain gpt_neox\.final_layer_norm\.weight is zero where"):
        fold_norms_(model)
    assert all(map(torch.equal, model.parameters(), weights))
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias[3] = 0.0
    before = run(model, inputs)
    fold_norms_(model)
    assert deviation(run(model, inputs), before) <= TOLERANCE


def test_a_stream_that_is_read_without_a_norm_keeps_its_mean():
    family = FAMILIES["opt"]
    model = family.model(_remove_final_layer_norm=True, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"while lm_head\.weight reads the stream as it is"):
        fold_norms_(model)


def test_untying_is_undone_if_folding_fails():
    model = FAMILIES["llama"].model(tie_word_embeddings=True)
    first, second = model.model.layers
    second.mlp = first.mlp
    weights = values_of(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+_proj\.weight is tied") as caught:
        fold_norms_(model, untie=True)
    assert "untie=True" not in str(caught.value)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert all(map(torch.equal, model.parameters(), weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_kept_and_rounded_once(dtype):
    model = FAMILIES["llama"].model(tie_word_embeddings=False).to(dtype)
    reader = model.model.layers[0].mlp.up_proj
    exact = reader.weight.double() * model.model.layers[0].post_attention_layernorm.weight.double()
    fold_norms_(model)
    assert reader.weight.dtype == dtype
    torch.testing.assert_close(
        reader.weight.double(), exact, rtol=torch.finfo(dtype).eps / 1.9, atol=1e-7
    )


@pytest.mark.parametrize("name", TIED)
def test_untied_models_are_saved_whole(name, tmp_path):
    """What was tied by the flag that unties the head is in the file too."""
    family = FAMILIES[name]
    model, inputs = family.model(**tie(name, True)), family.inputs()
    fold_norms_(model, untie=True)
    before = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    fold_norms_(loaded, untie=True)
    assert deviation(run(loaded.eval(), inputs), before) < 1e-5


def test_gradients_of_the_weights_before_are_gone():
    family = FAMILIES["llama"]
    model = family.model()
    model(**family.inputs()).logits.square().mean().backward()
    fold_norms_(model)
    assert all(parameter.grad is None for parameter in model.parameters())
