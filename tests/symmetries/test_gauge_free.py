"""Attentions that hold or read invariants: understood, and without a head symmetry."""

import pytest

import quotientopt as qo
from quotientopt.models import reference_model
from quotientopt.nn import InvariantAttention, RelationalTransformer


def with_charts(blocks):
    """A reference model, the attentions of some of its blocks in the chart."""
    model = reference_model("gpt", layers=2, width=16)
    for block in list(model.blocks)[:blocks]:
        block.attention = InvariantAttention.from_attention(
            block.attention, parametrization="chart"
        )
    return model


def test_charts_are_understood():
    found = qo.find_symmetries(with_charts(1))
    assert found.gauge_free == ("blocks.0.attention",)
    assert found.unrecognized == ()
    assert {symmetry.name for symmetry in found.heads} == {
        "blocks.1.attention.qk",
        "blocks.1.attention.vo",
    }
    assert "heads without a gauge, plain Adam: blocks.0.attention" in str(found)
    alone = InvariantAttention(8, 2, parametrization="chart")
    assert qo.find_symmetries(alone).gauge_free == ("InvariantAttention",)
    pairs = qo.find_symmetries(InvariantAttention(8, 2))
    assert pairs.gauge_free == ()
    assert len(pairs.heads) == 2


class Other(InvariantAttention):
    """Computes something else."""

    def forward(self, *args, **kwargs):
        return -super().forward(*args, **kwargs)


def test_a_subclass_is_not_understood():
    found = qo.find_symmetries(Other(8, 2, parametrization="chart"))
    assert found.gauge_free == ()
    assert found.unrecognized == ("Other",)


def test_there_is_nothing_to_dress():
    with pytest.raises(ValueError, match=r"\A.*hold or read invariants\Z"):
        qo.dress_(with_charts(2))


def test_relational_transformers_are_understood(recwarn):
    model = RelationalTransformer(2, 2, features=4, readout="sum")
    found = qo.QuotientAdam(model, lr=1e-2).symmetries
    assert found.gauge_free == ("blocks.0.attention", "blocks.1.attention")
    assert found.unrecognized == ()
    assert found.heads == ()
    assert not recwarn.list
