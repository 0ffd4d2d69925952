"""Size of framed updates, and the precision of their products."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import quotientopt as qo
from quotientopt.optim.polar import polar_direction, products_at
from tests.optim.training import small_model, train


def movements(model, **options):
    """What one step adds to every trained parameter, by name."""
    own = copy.deepcopy(model)
    optimizer = qo.QuotientAdam(own, lr=1e-3, weight_decay=0.0, **options)
    ids = torch.arange(8)[None]
    own(ids, labels=ids).loss.backward()
    optimizer.step()
    before = dict(model.named_parameters())
    return {
        name: p.detach() - before[name].detach()
        for name, p in own.named_parameters()
        if p.requires_grad
    }


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=11)
    return GPT2LMHeadModel(config).eval().double()


@pytest.mark.parametrize("polar", [True, "step", False])
def test_framed_matrices_move_by_the_scale_and_nothing_else_does(polar):
    model = gpt2()
    one, three = (movements(model, update_scale=s, polar=polar) for s in (1.0, 3.0))
    for name, moved in one.items():
        factor = 3.0 if moved.ndim == 2 else 1.0
        if name == "transformer.h.0.attn.c_proj.bias":
            continue  # It takes what the values' bias puts out through the output matrix.
        assert moved.abs().max() > 0 or name.endswith("c_attn.bias")
        assert (three[name] - factor * moved).abs().max() <= 1e-12 * moved.abs().max()


@pytest.mark.parametrize("lora_frame", ["transported", "balanced", "orthonormal"])
def test_lora_pairs_have_adams_size(lora_frame):
    config = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(gpt2(), config)
    one, three = (movements(model, update_scale=s, lora_frame=lora_frame) for s in (1.0, 3.0))
    assert one
    for name, moved in one.items():
        assert moved.abs().max() > 0
        assert torch.equal(three[name], moved)


def test_decay_goes_at_the_rate_of_the_update():
    """Four times for matrices in frames, eight times for embeddings, once for biases."""
    model = gpt2()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    qo.QuotientAdam(model, lr=1e-2, weight_decay=0.5, update_scale=4.0).step()
    for name, parameter in model.named_parameters():
        times = 8 if "wte" in name or "wpe" in name else 4 if parameter.ndim == 2 else 1
        assert (parameter - before[name] * (1 - times * 5e-3)).abs().max() < 1e-7, name


@pytest.mark.parametrize("polar", [True, "step", False])
def test_precision_is_honoured(polar):
    model = small_model("gpt", dtype=torch.float32)
    curves = {}
    for precision in ("highest", "high", "fast"):
        own = copy.deepcopy(model)
        optimizer = qo.QuotientAdam(own, lr=1e-3, precision=precision, polar=polar)
        curves[precision] = train(own, optimizer, 12)
    # On a CPU there is no TF32.
    assert torch.equal(curves["high"], curves["highest"])
    difference = (curves["fast"] - curves["highest"]).abs().max()
    assert 1e-5 < difference < 0.4


def test_products_of_float64_are_never_rounded():
    model = small_model("gpt")
    curves = []
    for precision in ("highest", "fast"):
        own = copy.deepcopy(model)
        curves.append(train(own, qo.QuotientAdam(own, lr=1e-3, precision=precision), 12))
    assert torch.equal(*curves)


def test_fast_products_keep_the_polar_factor_within_a_few_percent():
    X = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    whole = polar_direction(X, None)
    with products_at("fast", torch.float32, cpu) as multiply:
        fast = polar_direction(X, None, multiply)
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    cosine = (fast * (U @ Vt)).sum((-2, -1)) / fast.norm(dim=(-2, -1)) / 32**0.5
    assert (cosine > 0.99).all()
    assert not torch.equal(fast, whole)
    assert ((fast - whole).norm(dim=(-2, -1)) < 0.1 * whole.norm(dim=(-2, -1))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "precision must be 'highest' or 'high' or 'fast', got 'bf16'"),
        ({"update_scale": 0}, "update_scale must be a positive number, got 0"),
        ({"embedding_scale": -1.0}, "embedding_scale must be a positive number, got -1.0"),
        ({"update_scale": float("nan")}, "update_scale must be a positive number, got nan"),
    ],
)
def test_what_is_no_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        qo.QuotientAdam(small_model("gpt"), **options)
