"""What centring leaves of the residual symmetry is acted with, verified and counted."""

import pytest
import torch

from quotientopt.symmetries import CentredStream, find_symmetries, fold_norms_
from tests.symmetries.families import FAMILIES, WIDTH, OutputsOnly, make_neutral_


@pytest.mark.parametrize("name", ["vit", "bert", "gpt-neox"])
def test_a_centred_stream_is_verified_and_counted(name):
    family = FAMILIES[name]
    model = make_neutral_(family.model(tie_word_embeddings=False))
    symmetries = find_symmetries(model)
    assert isinstance(symmetries.residual, CentredStream)
    assert symmetries.redundancy()["residual"] == (WIDTH - 1) * (WIDTH - 2) // 2
    element = symmetries.random_element()["residual"]
    torch.testing.assert_close(element.sum(-1), torch.ones(WIDTH, dtype=torch.float64))
    assert symmetries.verify(OutputsOnly(model), **family.inputs())["residual"] <= 1e-10
    assert "StabilizerOfOnes(32) exact" in str(symmetries)


def test_float32_inside_a_forward_does_not_blur_the_verification():
    family = FAMILIES["llama"]
    model = family.model(tie_word_embeddings=False)
    symmetries = fold_norms_(model)
    assert symmetries.verify(OutputsOnly(model), **family.inputs())["residual"] <= 1e-10
