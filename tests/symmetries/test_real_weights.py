"""Trained weights: what is claimed of random ones holds for them as well."""

import pytest

from quotientopt.groups import GL
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries, fold_norms_
from tests.symmetries.test_families import CAUGHT, TOLERANCE, deviation
from tests.symmetries.trained import IDS, encoder, logits, smollm2


@pytest.mark.parametrize(("name", "symmetries", "heads"), [("albert", 2, 8), ("minilm", 12, 12)])
def test_trained_encoders(name, symmetries, heads):
    model = encoder(name)
    found = find_symmetries(model)
    assert [symmetry.heads for symmetry in found.heads] == [heads] * symmetries
    assert found.unrecognized == ()
    assert max(found.verify(model, cond=1000.0, input_ids=IDS).values()) <= TOLERANCE
    before = logits(model)
    found.act_(found.random_element(cond=10.0))
    assert deviation(logits(model), before) <= 1e-4


@pytest.mark.long
def test_a_trained_llama_with_a_tied_head():
    model = smollm2()
    before = logits(model)
    symmetries = find_symmetries(model)
    assert [symmetry.heads for symmetry in symmetries.heads] == [3] * 60
    assert symmetries.unrecognized == ()
    symmetries.act_(symmetries.random_element(cond=10.0))
    assert deviation(logits(model), before) <= 1e-4
    folded = fold_norms_(model, untie=True)
    assert deviation(logits(model), before) <= 1e-4
    folded.act_({"residual": folded.random_element()["residual"]})
    assert deviation(logits(model), before) <= 1e-4


@pytest.mark.long
def test_a_trained_llama_in_float64():
    model = smollm2()
    found = find_symmetries(model)
    assert max(found.verify(model, input_ids=IDS).values()) <= TOLERANCE
    qk = found.heads[0]
    wrong = HeadSymmetry(qk.left_blocks, qk.right_blocks, GL(qk.rank), "wrong")
    assert SymmetryMap([wrong]).verify(model, input_ids=IDS)["wrong"] > CAUGHT
