"""Gauge twins: from x and from g·x an equivariant optimizer sees the same losses."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import quotientopt as qo
from tests.optim.training import (
    random_gains_,
    random_heads_and_rotation,
    small_model,
    train,
    twin_of,
)

STEPS = 30
COND = 1000.0


def heads_only(name):
    return name != "residual"


def quotient_adam(model, **options):
    options = {"lr": 7.5e-4, "weight_decay": 0.1} | options
    return qo.QuotientAdam(model, betas=(0.9, 0.95), **options)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def deviation(model, twin, make):
    first, second = copy.deepcopy(model), copy.deepcopy(twin)
    difference = train(first, make(first), STEPS) - train(second, make(second), STEPS)
    return difference.abs().max().item()


def folded_llama():
    model = random_gains_(small_model("llama", key_value_heads=2))
    qo.fold_norms_(model)
    return model


@pytest.mark.parametrize("head_frame", ["balanced", "orthonormal", "svd"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_gpt_twins_under_gl_on_all_heads(head_frame, nesterov):
    model = small_model("gpt")
    twin, element = twin_of(model, cond=COND, only=heads_only)
    assert len(element) == 4

    def make(m):
        return quotient_adam(m, residual_frame=None, head_frame=head_frame, nesterov=nesterov)

    assert deviation(model, twin, make) < 1e-10


# Acting with condition number 1000 rounds AᵀB to 1e-13, which training amplifies: by more than 1000
# in 30 steps with a shared frame and Nesterov momentum, or in the raw coordinates that the svd
# frames leave to rotary planes, with equal singular values. Those variants are left out.
@pytest.mark.parametrize(
    ("head_frame", "polar"),
    [("balanced", True), ("balanced", False), ("orthonormal", True), ("svd", False)],
)
def test_llama_twins_under_the_rotary_commutant_with_grouped_queries(head_frame, polar):
    model = random_gains_(small_model("llama", key_value_heads=2))
    twin, element = twin_of(model, cond=COND)
    assert len(element) == 4

    def make(m):
        return quotient_adam(m, residual_frame=None, head_frame=head_frame, polar=polar)

    assert deviation(model, twin, make) < 1e-10
    assert deviation(model, twin, adamw) > 1e-4


@pytest.mark.parametrize(
    ("residual_frame", "nesterov"), [("per_matrix", True), ("per_matrix", False), ("shared", False)]
)
@pytest.mark.parametrize("build", [small_model, folded_llama])
def test_twins_under_heads_and_residual_rotations_together(build, residual_frame, nesterov):
    model = build()
    twin, element = twin_of(model, cond=COND)
    assert "residual" in element

    def make(m):
        return quotient_adam(m, residual_frame=residual_frame, nesterov=nesterov)

    assert deviation(model, twin, make) < 1e-10


@pytest.mark.parametrize("build", [small_model, folded_llama])
def test_twins_in_frames_over_all_heads(build):
    """Eigenvalues of 32 rows lie closer than those of 8 and amplify rounding more."""
    model = build()
    twin, element = twin_of(model, cond=COND)
    assert "residual" in element
    assert (
        deviation(model, twin, lambda m: quotient_adam(m, row_frame="per_matrix", polar=True))
        < 1e-10
    )
    assert deviation(model, twin, adamw) > 1e-4


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_twins_with_fewer_tokens_than_rows(name, monkeypatch):
    """Head covariances are singular then; ties are broken by the weights, not by rounding."""
    model = small_model(name)
    twin, _ = twin_of(model, cond=COND, only=heads_only)

    def few(steps, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(32, (1, 5), generator=generator) for _ in range(steps))

    monkeypatch.setattr("tests.optim.training.batches", few)
    assert deviation(model, twin, lambda m: quotient_adam(m, residual_frame=None)) < 1e-8
    monkeypatch.setattr("quotientopt.optim.eigenframes.TIE_BREAK", 0.0)
    assert deviation(model, twin, lambda m: quotient_adam(m, residual_frame=None)) > 1e-5


@pytest.mark.parametrize(("row_frame", "bound"), [("per_head", 1e-10), ("per_matrix", 1e-9)])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_twins_from_a_zero_output_projection(name, row_frame, bound):
    """Zero at the start is common; the other half of the pair is then all there is to go by.

    Where half of the matrices start at zero, frames over all heads amplify rounding more.
    """
    model = small_model(name)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
    twin, _ = twin_of(model, cond=COND, only=heads_only)
    assert deviation(model, twin, lambda m: quotient_adam(m, row_frame=row_frame)) < bound
    assert deviation(model, twin, adamw) > 1e-4


def test_controls_deviate():
    """AdamW, head frames left out, and residual frames left out each see their gauge."""
    model = small_model("gpt")
    heads, _ = twin_of(model, cond=COND, only=heads_only)
    residual, _ = twin_of(model, cond=COND, only=lambda name: name == "residual")
    assert deviation(model, heads, adamw) > 1e-4
    assert deviation(model, residual, adamw) > 1e-4
    without_heads = {"head_frame": None, "residual_frame": None}
    assert deviation(model, heads, lambda m: quotient_adam(m, **without_heads)) > 1e-4
    assert deviation(model, residual, lambda m: quotient_adam(m, residual_frame=None)) > 1e-4


def test_a_signed_permutation_is_invisible_to_adam_itself():
    """What is left over after dressing: the control that the twins' own rounding stays small."""
    model = small_model("gpt")
    twin = copy.deepcopy(model)
    symmetries = qo.find_symmetries(twin)
    order = torch.tensor([3, 1, 0, 2, 5, 4, 7, 6])
    g = (torch.eye(8, dtype=torch.float64) * torch.tensor([1.0, -1.0] * 4))[order].expand(4, 8, 8)
    symmetries.act_({"blocks.0.attention.qk": g, "blocks.1.attention.vo": g})
    assert deviation(model, twin, adamw) < 1e-11


@pytest.mark.parametrize("clip", [None, 0.05])
def test_moments_are_equivariant_too(clip):
    """Mid-training, state included: act on parameters and state together, and go on."""
    model = small_model("gpt")
    optimizer = quotient_adam(model, max_grad_norm=clip)
    train(model, optimizer, 13)
    twin = copy.deepcopy(model)
    moved = quotient_adam(twin, max_grad_norm=clip)
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    not_moved = copy.deepcopy((twin, moved))
    generator = torch.Generator().manual_seed(3)
    element = random_heads_and_rotation(moved.symmetries, cond=COND, generator=generator)
    moved.symmetries.act_(element)
    moved.move_state_(element)
    not_moved[1].symmetries.act_(element)
    losses = train(model, optimizer, STEPS, seed=5)
    assert (losses - train(twin, moved, STEPS, seed=5)).abs().max() < 1e-10
    assert (losses - train(*not_moved, STEPS, seed=5)).abs().max() > 1e-4


def test_moments_move_for_planes_and_shared_frames():
    model = folded_llama()
    optimizer = quotient_adam(model, residual_frame="shared", nesterov=True)
    train(model, optimizer, 7)
    twin, moved = copy.deepcopy((model, optimizer))
    element = random_heads_and_rotation(
        moved.symmetries, cond=COND, generator=torch.Generator().manual_seed(3)
    )
    moved.symmetries.act_(element)
    moved.move_state_(element)
    losses = train(model, optimizer, STEPS, seed=5)
    assert (losses - train(twin, moved, STEPS, seed=5)).abs().max() < 1e-10


def test_state_of_plain_adam_is_not_moved():
    model = small_model("gpt")
    optimizer = quotient_adam(model, residual_frame=None)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    element = random_heads_and_rotation(optimizer.symmetries)
    with pytest.raises(ValueError, match=r"cannot move .*'residual'.*plain"):
        optimizer.move_state_(element)
    with pytest.raises(ValueError, match="no symmetry called 'nobody'"):
        optimizer.move_state_({"nobody": torch.eye(8)})
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        for name, value in state.items():
            assert torch.equal(value, after[key][name])


def test_moving_accepts_translations_and_refuses_undressed_units():
    """Translations leave the state, which holds derivatives at fixed effective bias, as it is."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=11, activation_function="relu"
    )
    model = GPT2LMHeadModel(config).double()
    optimizer = qo.QuotientAdam(model, lr=3e-3)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    element = optimizer.symmetries.random_element()
    translations = {name: t for name, t in element.items() if name.endswith(".translation")}
    units = optimizer.symmetries.hidden_units[0].name
    assert len(translations) == 2
    optimizer.move_state_(translations)
    name, t = next(iter(translations.items()))
    with pytest.raises(ValueError, match="finite translation of shape"):
        optimizer.move_state_({name: t[:1]})
    with pytest.raises(ValueError, match=r"cannot move .*units.*hidden_units=True"):
        optimizer.move_state_(translations | {units: element[units]})
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        for entry, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key][entry]))


ADAMS_SIZE = {
    "update_scale": 1.0,
    "polar": "step",
    "row_frame": "per_head",
    "embedding_frame": "per_matrix",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_output_biases_take_the_compensation(dtype):
    """Steps below the rounding of a narrow bias add up in its master."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=11)
    model = GPT2LMHeadModel(config).eval()
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        for bias in (attention.c_attn.bias, attention.c_proj.bias):
            bias.normal_()
    model = model.to(dtype)
    optimizer = qo.QuotientAdam(model, lr=1e-5, master_weights=True, **ADAMS_SIZE)
    bias = attention.c_proj.bias
    outputs, ids = [], torch.arange(8)[None]
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        master = optimizer.state[bias]["master"]
        assert torch.equal(master.to(dtype), bias)
        outputs.append(
            master.double()
            + attention.c_proj.weight.double().mT @ attention.c_attn.bias[32:].double()
        )
    moved = torch.stack(outputs).diff(dim=0).abs().max()
    # About the rate in every step; a rounding of the bias itself would be 5e-4 at least.
    assert 0 < moved < 2e-5


def test_clipping_is_invariant():
    """The dressed norm does not see the gauge; the Euclidean norm does."""
    model = small_model("gpt")
    twin, _ = twin_of(model, cond=COND)
    assert (
        deviation(model, twin, lambda m: quotient_adam(m, max_grad_norm=0.05, polar=False)) < 1e-10
    )
    loose = train(copy.deepcopy(model), quotient_adam(model), 1)
    assert torch.isfinite(loose).all()

    class Clipped(qo.QuotientAdam):
        def step(self, closure=None):
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            return super().step(closure)

    assert deviation(model, twin, lambda m: Clipped(m, lr=3e-3)) > 1e-4


@pytest.mark.parametrize("cond", [1.0, 10.0, 100.0, 1000.0])
def test_float32_curves_agree_to_plotting_accuracy(cond):
    model = small_model("gpt", dtype=torch.float32)
    twin, _ = twin_of(model, cond=cond, only=heads_only)
    assert deviation(model, twin, lambda m: quotient_adam(m, residual_frame=None)) < 1e-2
