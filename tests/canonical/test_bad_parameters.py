"""Parameters without values to move: one line, and nothing changed."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.symmetries import SymmetryMap
from tests.canonical.models import hand_made
from tests.symmetries.families import FAMILIES
from tests.symmetries.test_peft import RANK, quantised, randomize_factors_

FUNCTIONS = {
    "dress_": qo.dress_,
    "invariants": qo.invariants,
    "spectra": qo.spectra,
    "noether_charges": qo.noether_charges,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_meta_device(function):
    family = FAMILIES["llama"].model()
    symmetries = qo.find_symmetries(family)
    on_meta = copy.deepcopy(family).to("meta")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' is on the meta device"):
        FUNCTIONS[function](on_meta)
    with pytest.raises(ValueError, match="no parameter of this LlamaForCausalLM"):
        FUNCTIONS[function](on_meta, symmetries=symmetries)
    on_meta, _ = hand_made("normalized")
    with pytest.raises(ValueError, match="is on the meta device"):
        on_meta.to("meta").symmetries()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_quantised_parameters(function):
    model, _ = hand_made("normalized")
    for name in ("query", "key"):
        values = (100 * getattr(model, name)).to(torch.int8)
        setattr(model, name, nn.Parameter(values, requires_grad=False))
    symmetries = model.symmetries()
    before = model.query.clone()
    with pytest.raises(
        ValueError, match=r"'qk' acts on a parameter of dtype torch\.int8 \(quantised\)"
    ):
        FUNCTIONS[function](model, symmetries=symmetries)
    assert torch.equal(model.query, before)
    FUNCTIONS[function](model, symmetries=SymmetryMap(symmetries.heads[1:]))
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.weight'.*quantised"):
        FUNCTIONS[function](quantised(["k_proj"]))


def test_adapters_of_a_quantised_model_are_dressed():
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    base = quantised(["q_proj", "k_proj", "v_proj", "o_proj"])
    settings = {"r": RANK, "target_modules": ["q_proj", "v_proj"]}
    model = randomize_factors_(peft.get_peft_model(base, peft.LoraConfig(**settings)).eval())
    inputs = FAMILIES["llama"].inputs()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**inputs).logits
        # The untouched second layer has heads of its own, which are dressed as well.
        dressing = qo.dress_(model)
        assert (model(**inputs).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(".lora." in name for name in dressing) == 4
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".lora_" in name} <= changed
    assert not any(before[name].dtype == torch.uint8 for name in changed)
