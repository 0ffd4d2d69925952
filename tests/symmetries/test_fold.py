"""Folding gains into their readers."""

import pytest
import torch
from torch import nn

from quotientopt.symmetries import find_symmetries, fold_norms_
from tests.symmetries.architectures import (
    EXAMPLES,
    small_gpt,
    small_gpt2,
    small_llama,
    small_vit,
    tokens,
)


def test_llama_function_is_unchanged_and_symmetry_exact():
    model = small_llama().double()
    assert not find_symmetries(model).residual.exact
    before = model(tokens()).detach()
    symmetries = fold_norms_(model)
    assert (model(tokens()) - before).abs().max() <= 1e-12 * before.abs().max()
    assert symmetries.residual.exact
    gains = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(gains) == 5
    assert all(bool((gain == 1).all()) and not gain.requires_grad for gain in gains)
    assert max(symmetries.verify(model, tokens(), cond=1000.0).values()) <= 1e-10
    assert set(symmetries.residual.axes) == {n for n, p in model.named_parameters() if p.ndim == 2}


def test_folding_again_or_without_gains_changes_nothing():
    for model in (small_llama(), small_gpt(), small_vit()):
        fold_norms_(model)
        before = [p.clone() for p in model.parameters()]
        assert fold_norms_(model).residual.exact
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_frozen_gains_that_are_not_one_still_break():
    model = small_llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    assert "gain norm.weight, which is not one" in find_symmetries(model).residual.broken_by
    assert fold_norms_(model).residual.exact


def test_shared_blocks_are_folded_once():
    model = small_llama().double()
    model.blocks[1] = model.blocks[0]
    before = model(tokens()).detach()
    assert fold_norms_(model).residual.exact
    assert (model(tokens()) - before).abs().max() <= 1e-12 * before.abs().max()


def tie_embedding(model):
    model.head.weight = model.embedding.weight


def tie_mlps_of_two_norms(model):
    model.blocks[1].mlp = model.blocks[0].mlp


def tie_gain_elsewhere(model):
    model.extra = nn.Linear(1, 32)
    model.extra.bias = model.norm.weight


@pytest.mark.parametrize("tie", [tie_embedding, tie_mlps_of_two_norms, tie_gain_elsewhere])
def test_tied_matrices_are_refused(tie):
    model = small_llama()
    tie(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="folding is not available for Llama"):
        fold_norms_(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_layer_norms_and_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: centring of transformer\.ln_f"):
        fold_norms_(small_gpt2())
    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        fold_norms_(EXAMPLES["encoder-layer"][0]()[0])
    with pytest.raises(ValueError, match="Linear: no model or layer"):
        fold_norms_(nn.Linear(3, 3))
