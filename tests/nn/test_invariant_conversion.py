"""What InvariantAttention refuses, and which class it goes back to."""

import copy

import pytest
import torch
from torch import nn

import quotientopt as qo
from quotientopt.models import Attention, CausalAttention
from quotientopt.nn import InvariantAttention

WIDTH, HEADS = 24, 4


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


def half_frozen():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    module.out_proj.weight.requires_grad_(False)
    return module


def one_bias():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    module.out_proj.bias = None
    return module


def deficient():
    module = Attention(WIDTH, HEADS, 2)
    with torch.no_grad():
        module.value.weight[3] = module.value.weight[4]
    return module


def not_finite():
    module = Attention(WIDTH, HEADS)
    with torch.no_grad():
        module.key.weight[0, 0] = torch.nan
    return module


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), ValueError, "add_bias_kv"),
        (
            lambda: nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
            ValueError,
            "add_zero_attn",
        ),
        (lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=4), ValueError, "head_width 6"),
        (half_frozen, ValueError, "frozen"),
        (one_bias, ValueError, "bias on one side"),
        (deficient, ValueError, "vo: right factor B is rank-deficient"),
        (not_finite, ValueError, "qk: .* non-finite"),
        (lambda: Doubled(WIDTH, HEADS), TypeError, "Doubled"),
        (lambda: nn.Linear(3, 3), TypeError, "from_attention reads"),
    ],
)
@pytest.mark.parametrize("parametrization", ["fixed-rank", "chart"])
def test_sources_that_are_refused(build, error, message, parametrization):
    module = build()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        InvariantAttention.from_attention(module, parametrization=parametrization)
    for name, value in module.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7))


def test_no_section_for_pairs_that_lost_their_rank():
    module = InvariantAttention.from_attention(Attention(WIDTH, HEADS, 2))
    with torch.no_grad():
        module.value.weight[3] = module.value.weight[4]
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="vo: right factor B is rank-deficient"):
        module.to_section_()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parametrization": "factors"}, "parametrization must be 'fixed-rank' or 'chart'"),
        ({"section": "polar"}, "section must be one of"),
        ({"chart_scale": 0.0}, "chart_scale must be a positive number"),
        ({"key_value_heads": 3}, "multiple of key_value_heads, got 24, 4 and 3"),
        ({"head_width": 30}, "head_width 30 must be positive and at most 24"),
        ({"head_width": 0}, "head_width 0 must be positive"),
        ({"key_width": 5}, "at most 5, the columns of a factor of 'qk'"),
        ({"head_width": 3, "rotary": True}, "even head_width, got 3"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        InvariantAttention(WIDTH, HEADS, **options)


def test_width_that_heads_do_not_divide():
    with pytest.raises(TypeError, match=r"numbers of heads must be int, got 4\.0"):
        InvariantAttention(WIDTH, 4.0)
    with pytest.raises(ValueError, match="not a multiple of heads 5; give head_width"):
        InvariantAttention(WIDTH, 5)
    attention = InvariantAttention(WIDTH, 5, head_width=3, bias=True)
    assert attention(torch.randn(2, 4, WIDTH)).shape == (2, 4, WIDTH)


def test_bad_inputs():
    attention = InvariantAttention(WIDTH, HEADS, key_width=10, value_width=12, causal=True)
    query, key = torch.randn(2, 5, WIDTH), torch.randn(2, 7, 10)
    assert attention(query, key, torch.randn(2, 7, 12)).shape == query.shape
    with pytest.raises(ValueError, match=r"value must have .* the last of size 12"):
        attention(query, key)
    with pytest.raises(ValueError, match=r"key must have .* the last of size 10"):
        attention(query)
    rotary = InvariantAttention(WIDTH, HEADS, key_width=10, value_width=12, rotary=True)
    for module in (attention, rotary):
        with pytest.raises(ValueError, match="needs as many keys, got 3"):
            module(query, key[:, :3], torch.randn(2, 3, 12))


@pytest.mark.parametrize("parametrization", ["fixed-rank", "chart"])
def test_the_class_it_goes_back_to(parametrization):
    def converted(module):
        return InvariantAttention.from_attention(module, parametrization=parametrization)

    plain = Attention(WIDTH, HEADS)
    assert type(converted(plain).to_attention()) is Attention
    assert type(converted(plain).to_attention("torch")) is nn.MultiheadAttention
    causal = converted(CausalAttention(WIDTH, HEADS)).to_attention()
    assert type(causal) is Attention
    assert causal.causal
    unbiased = converted(nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True))
    assert type(unbiased.to_attention()) is nn.MultiheadAttention
    assert type(unbiased.to_attention("reference")) is Attention
    fresh = {"parametrization": parametrization}
    assert type(InvariantAttention(WIDTH, HEADS, **fresh).to_attention()) is Attention
    biased = InvariantAttention(WIDTH, HEADS, bias=True, **fresh)
    assert type(biased.to_attention()) is nn.MultiheadAttention
    for refused, kind, message in (
        (biased, "reference", "no place for bias=True"),
        (InvariantAttention(WIDTH, HEADS, causal=True, **fresh), "torch", "causal=True"),
        (InvariantAttention(WIDTH, HEADS, key_value_heads=2, **fresh), "torch", "key_value_heads"),
        (InvariantAttention(WIDTH, HEADS, head_width=3, **fresh), None, "head_width 3"),
        (InvariantAttention(WIDTH, HEADS, rotary=True, **fresh), "torch", "rotary=True"),
        (biased, "gpt", "kind must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            refused.to_attention(kind)


@pytest.mark.parametrize("parametrization", ["fixed-rank", "chart"])
def test_frozen_and_evaluated_modules_stay_so(parametrization):
    module = Attention(WIDTH, HEADS, 2).requires_grad_(False).eval()
    attention = InvariantAttention.from_attention(module, parametrization=parametrization)
    assert not any(parameter.requires_grad for parameter in attention.parameters())
    back = attention.to_attention()
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_a_subclass_that_computes_something_else_is_not_understood():
    class Halved(InvariantAttention):
        def forward(self, query, **kwargs):
            return super().forward(query, **kwargs) / 2

    class Named(InvariantAttention):
        pass

    assert len(qo.find_symmetries(Named(WIDTH, HEADS)).heads) == 2
    found = qo.find_symmetries(Halved(WIDTH, HEADS))
    assert found.heads == ()
    assert found.unrecognized == ("Halved",)
    replaced = InvariantAttention(WIDTH, HEADS)
    replaced.key = nn.Sequential(replaced.key)
    assert qo.find_symmetries(replaced).heads == ()
