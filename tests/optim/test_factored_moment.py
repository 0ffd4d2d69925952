"""A second moment of row and column means: the oracle, its law, what it saves."""

import copy
import io

import pytest
import torch

import quotientopt as qo
from quotientopt.compare.train import state_bytes
from quotientopt.optim.frames import transport_
from quotientopt.optim.update import moments_
from tests.optim.test_oracle import SETTINGS, oracle_losses
from tests.optim.test_twins import adamw, deviation, folded_llama
from tests.optim.training import small_model, train, twin_of

STEPS = 25


def factored(model, **options):
    return qo.QuotientAdam(model, **SETTINGS, second_moment="factored", **options)


@pytest.mark.parametrize("row_frame", ["per_head", "per_matrix"])
@pytest.mark.parametrize("polar", [True, False])
def test_equals_the_oracle_in_float64(polar, row_frame):
    model = small_model("gpt")
    options = {"nesterov": True, "polar": polar, "row_frame": row_frame}
    expected = oracle_losses(copy.deepcopy(model), factored=True, **options)
    whole = oracle_losses(copy.deepcopy(model), **options)
    for foreach in (None, False):
        fast = copy.deepcopy(model)
        losses = train(
            fast, factored(fast, polar=polar, row_frame=row_frame, foreach=foreach), STEPS
        )
        assert (losses - expected).abs()[:10].max() < 1e-11
        assert (losses - expected).abs().max() < 1e-9
        # The control: the whole second moment is another one.
        assert (losses - whole).abs().max() > 1e-4


@pytest.mark.parametrize("head_frame", ["balanced", "svd"])
@pytest.mark.parametrize("build", [small_model, folded_llama])
def test_twins_of_heads_and_stream(build, head_frame):
    model = build()
    twin, element = twin_of(model, cond=1000.0)
    assert "residual" in element
    # What svd frames leave to rotary planes is raw coordinates, whose polar factor amplifies.
    polar = head_frame == "balanced" or build is small_model
    make = {"head_frame": head_frame, "polar": polar}
    assert deviation(model, twin, lambda m: factored(m, **make)) < 1e-10
    assert deviation(model, twin, adamw) > 1e-4


def whole_of(bucket):
    """v of a bucket, from its factors."""
    rows, columns = bucket.state["exp_avg_sq_rows"], bucket.state["exp_avg_sq_columns"]
    return rows * columns / columns.mean(-1, keepdim=True)


@pytest.mark.parametrize("row_frame", ["per_head", "per_matrix"])
def test_the_law_of_the_factors_is_that_of_their_product(row_frame):
    """Any change of head frames on the left, of one head or all; a rotation on the right."""
    model = small_model("gpt")
    optimizer = factored(model, row_frame=row_frame)
    train(model, optimizer, 3)
    buckets = [b for b in optimizer._current_engine().buckets if b.factored and not b.embedding]
    assert {b.heads is None for b in buckets} == {True, False}
    generator = torch.Generator().manual_seed(0)
    for bucket in buckets:
        L, _, heads, r, n = bucket.shape
        left = torch.randn(L, heads, r, r, generator=generator, dtype=torch.float64)
        right = torch.randn(L, n, n, generator=generator, dtype=torch.float64)
        right = torch.linalg.qr(right)[0]
        before = whole_of(bucket)

        def law(left, right, before=before):
            return left.square()[:, None] @ before @ right.square()[:, None, None]

        transport_(bucket.state, left, right)
        after = whole_of(bucket)
        assert (after - law(left, right)).abs().max() < 1e-12 * after.abs().max()
        # The controls: a missing transpose on either side, and what is left as it was.
        for wrong in (law(left.mT, right), law(left, right.mT), before):
            assert (after - wrong).abs().max() > 1e-3 * after.abs().max()


def test_means_of_a_product_are_that_product():
    """Where squares have rank one, nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 1, 3, 5, 1, generator=generator, dtype=torch.float64)
    columns = torch.rand(2, 1, 1, 1, 4, generator=generator, dtype=torch.float64)
    gradient = (rows * columns).sqrt()
    mean, whole = (torch.zeros_like(gradient) for _ in range(2))
    factors = torch.zeros_like(rows), torch.zeros_like(columns)
    for step in range(3):
        betas = (0.9, 0.95)
        expected = moments_((1 + step) * gradient, mean.clone(), whole, betas=betas)
        v = moments_((1 + step) * gradient, mean, *factors, betas=betas)
        assert (v - expected).abs().max() < 1e-14
    other = torch.rand(gradient.shape, generator=generator, dtype=torch.float64)
    expected = moments_(other, mean.clone(), whole, betas=betas)
    assert (moments_(other, mean, *factors, betas=betas) - expected).abs().max() > 1e-3


def test_state_is_saved_and_goes_on_bit_for_bit():
    model = small_model("gpt", dtype=torch.float32)
    optimizer = factored(model, head_frame="svd")
    train(model, optimizer, 5)
    own = optimizer.state[model.blocks[0].mlp.up.weight]
    assert own["exp_avg_sq_rows"].shape == (1, 1, 128, 1)
    assert own["exp_avg_sq_columns"].shape == (1, 1, 1, 32)
    assert "exp_avg_sq" not in own
    other, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    loaded = qo.QuotientAdam(other, **SETTINGS)
    loaded.load_state_dict(torch.load(stored))
    assert torch.equal(train(model, optimizer, 12), train(other, loaded, 12))
    damaged = optimizer.state_dict()
    damaged["state"][0]["exp_avg_sq_rows"] = -damaged["state"][0]["exp_avg_sq_rows"]
    with pytest.raises(ValueError, match=r"'exp_avg_sq_rows' of .* has negative entries"):
        loaded.load_state_dict(damaged)


def test_frames_that_are_not_turned_keep_no_covariance():
    model = small_model("gpt")
    optimizer = qo.QuotientAdam(model, **SETTINGS, head_frame="svd")
    train(model, optimizer, 3)
    query = model.blocks[0].attention.query.weight
    assert "head_frame" in optimizer.state[query]
    assert "head_covariance" not in optimizer.state[query]
    # A state that has one, as those of version 0.1.0, is taken without.
    state = optimizer.state_dict()
    for own in state["state"].values():
        if "head_frame" in own:
            own["head_covariance"] = torch.zeros_like(own["head_frame"])
    other = copy.deepcopy(model)
    loaded = qo.QuotientAdam(other, **SETTINGS, head_frame="svd")
    loaded.load_state_dict(state)
    assert torch.equal(train(model, optimizer, 12), train(other, loaded, 12))
    assert all("head_covariance" not in own for own in loaded.state.values())


def test_state_is_hardly_more_than_adamws():
    """On the reference GPT at its usual size; the default has more than half as much again."""
    sizes = {}
    for name, options in (
        ("adamw", None),
        ("default", {}),
        ("small", {"second_moment": "factored", "head_frame": "svd"}),
    ):
        model = qo.models.reference_model("gpt", 0, vocabulary=256)
        optimizer = (
            torch.optim.AdamW(model.parameters())
            if options is None
            else qo.QuotientAdam(model, **options)
        )
        for parameter in model.parameters():
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
        optimizer.step()
        sizes[name] = state_bytes([optimizer])
    assert sizes["small"] <= 1.05 * sizes["adamw"]
    assert sizes["default"] > 1.5 * sizes["adamw"]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="second_moment must be 'full' or 'factored', got 'none'"):
        qo.QuotientAdam(small_model("gpt"), second_moment="none")
