"""Claims that are wrong are caught by verify."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries, fold_norms_
from tests.symmetries.architectures import (
    attention,
    small_gpt2,
    small_llama,
    tokens,
)

CAUGHT = 1e-3


class UntransposedGL(GL):
    """Acts on the left factor with g instead of g^{-T}."""

    def inverse(self, g):
        return g.mT


def test_gl_on_rotary_heads():
    model = small_llama()
    qk, vo = find_symmetries(model).heads[:2]
    wrong = HeadSymmetry(qk.left_blocks, qk.right_blocks, GL(qk.rank), "wrong")
    result = SymmetryMap([wrong, vo]).verify(model, tokens())
    assert result["wrong"] > CAUGHT
    assert result[vo.name] < 1e-10


@pytest.mark.parametrize("index", [0, 1])
def test_missing_transpose(index):
    model, inputs, _ = attention()
    right = find_symmetries(model).heads[index]
    group = UntransposedGL(right.rank)
    wrong = HeadSymmetry(right.left_blocks, right.right_blocks, group, "wrong")
    assert SymmetryMap([wrong]).verify(model, *inputs)["wrong"] > CAUGHT


def test_query_bias_left_out():
    model, inputs, _ = attention()
    qk, _ = find_symmetries(model).heads
    wrong = HeadSymmetry(qk.left_blocks[:-1], qk.right_blocks, qk.group, "wrong")
    assert SymmetryMap([wrong]).verify(model, *inputs)["wrong"] > CAUGHT


def test_key_bias_makes_no_difference_to_softmax():
    model, inputs, _ = attention()
    qk, _ = find_symmetries(model).heads
    without = HeadSymmetry(qk.left_blocks, qk.right_blocks[:-1], qk.group, "without")
    assert SymmetryMap([without]).verify(model, *inputs)["without"] < 1e-10


@pytest.mark.parametrize("index", [0, 1])
def test_appended_key_or_value_left_out(index):
    model, inputs, _ = attention(add_bias_kv=True)
    right = find_symmetries(model).heads[index]
    wrong = HeadSymmetry(right.left_blocks, right.right_blocks[:-1], right.group, "wrong")
    assert SymmetryMap([wrong]).verify(model, *inputs)["wrong"] > CAUGHT


def test_value_bias_left_out():
    model, inputs, _ = attention()
    _, vo = find_symmetries(model).heads
    wrong = HeadSymmetry(vo.left_blocks, vo.right_blocks[:-1], vo.group, "wrong")
    assert SymmetryMap([wrong]).verify(model, *inputs)["wrong"] > CAUGHT


def test_queries_of_a_group_left_out():
    model = small_llama()
    vo = find_symmetries(model).heads[1]
    wrong = HeadSymmetry(vo.left_blocks[:-1], vo.right_blocks, vo.group, "wrong")
    assert SymmetryMap([wrong]).verify(model, tokens())["wrong"] > CAUGHT


def test_residual_rotation_of_an_unfolded_llama():
    model = small_llama()
    residual = replace(find_symmetries(model).residual, broken_by=())
    assert SymmetryMap(residual=residual).verify(model, tokens())["residual"] > CAUGHT
    folded = fold_norms_(model)
    assert folded.residual.exact
    assert folded.verify(model, tokens())["residual"] < 1e-10


def test_residual_rotation_through_layer_norms():
    model = small_gpt2()
    for name, parameter in model.named_parameters():
        if ".ln_" in name:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    residual = replace(find_symmetries(model).residual, broken_by=())
    assert SymmetryMap(residual=residual).verify(model, tokens())["residual"] > CAUGHT


def test_a_reader_of_the_stream_left_out():
    model = small_llama()
    residual = fold_norms_(model).residual
    axes = {name: axis for name, axis in residual.axes.items() if name != "blocks.0.mlp.up.weight"}
    wrong = SymmetryMap(residual=replace(residual, axes=axes))
    assert wrong.verify(model, tokens())["residual"] > CAUGHT


def test_a_singular_element_changes_nothing():
    model, _, _ = attention()
    symmetries = find_symmetries(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="singular"):
        symmetries.act_({"qk": torch.zeros(3, 8, 8)})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
