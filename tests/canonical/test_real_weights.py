"""Canonical forms of trained weights, in float32."""

import copy

import pytest
import torch

import quotientopt as qo
from quotientopt.canonical import align_, distance, dress_
from quotientopt.checkpoints import dress_checkpoint
from quotientopt.cli import main
from tests.canonical.models import difference
from tests.symmetries.families import transformers
from tests.symmetries.trained import (
    ENCODERS,
    answer,
    encoder,
    located,
    logits,
    smollm2,
    smollm2_tokenizer,
)

SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def moved(model, cond=10.0):
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    generator = torch.Generator().manual_seed(0)
    symmetries.act_(symmetries.random_element(cond=cond, generator=generator))
    return twin


def deviation(one, two):
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.mark.parametrize("name", ENCODERS)
def test_trained_encoders(name):
    model = encoder(name)
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


@pytest.mark.parametrize("name", ENCODERS)
def test_trained_encoders_on_disk(name, tmp_path):
    """Safetensors, and a folder of pickled tensors, with the files that come along."""
    class_name, package, path = ENCODERS[name]
    transformers()
    source, out = located(package, path), tmp_path / "out"
    assert main(["dress", str(source), "--out", str(out)]) == 0
    files = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == files
    before = encoder(name)
    after = getattr(transformers(), class_name).from_pretrained(out).eval()
    assert deviation(logits(after), logits(before)) < 1e-4
    assert difference(before, after) > 1e-2
    dress_(before)
    assert difference(before, after) == 0


@pytest.mark.long
def test_a_trained_llama_answers_as_before():
    model, tokenizer = smollm2(), smollm2_tokenizer()
    expected, before = answer(model, tokenizer), logits(model)
    assert "Paris" in expected
    for section in SECTIONS:
        twin = moved(model)
        dress_(twin, section)
        assert deviation(logits(twin), before) < 1e-3
        assert answer(twin, tokenizer) == expected
    other = copy.deepcopy(model)
    with torch.no_grad():
        for symmetry in qo.find_symmetries(other).heads:
            symmetry.right[0].normal_(std=0.1)
    assert answer(other, tokenizer) != expected


@pytest.mark.long
def test_twins_of_a_trained_llama():
    model = smollm2()
    twin = moved(model)
    assert distance(model, twin, relative=True)["total"] < 1e-6
    aligned = copy.deepcopy(twin)
    align_(aligned, model)
    assert difference(model, aligned) < 1e-5
    dress_(model)
    dress_(twin)
    assert difference(model, twin) < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_llama_on_disk(dtype, tmp_path):
    model, tokenizer = smollm2(), smollm2_tokenizer()
    model.to(dtype).save_pretrained(tmp_path / "source", max_shard_size="200MB")
    tokenizer.save_pretrained(tmp_path / "source")
    report = dress_checkpoint(tmp_path / "source", tmp_path / "out")
    # Queries, keys, values and outputs; up and down, whose hidden units are balanced.
    assert len(report.changed) == 6 * 30
    dressed = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert dressed.dtype == dtype
    model = model.float()
    assert deviation(logits(dressed.float()), logits(model)) < (
        1e-3 if dtype.itemsize == 4 else 0.09
    )
    assert answer(dressed, tokenizer) == answer(model, tokenizer)
