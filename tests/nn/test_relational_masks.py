"""Masks, causality, padding, chunks of queries."""

import pytest
import torch

from quotientopt.nn.relational_layers import RelationalAttention
from tests.nn.relational_cases import N, attention, close, tokens


@pytest.mark.parametrize("t", [1, 3, 6])
def test_causal_attention_does_not_leak(t):
    layer = attention(causal=True, max_relative_position=2)
    X, Y = tokens(2), tokens(2)
    Y[:, :t] = X[:, :t]
    one, two = layer(X @ X.mT), layer(Y @ Y.mT)
    assert close(two[:, :t, :t], one[:, :t, :t], 1e-13)
    assert not close(two[:, t:, t:], one[:, t:, t:], 1e-3)
    prefix = X[:, :t]
    assert close(layer(prefix @ prefix.mT), one[:, :t, :t], 1e-13)
    plain = attention(max_relative_position=2)
    assert not close(plain(Y @ Y.mT)[:, :t, :t], plain(X @ X.mT)[:, :t, :t], 1e-3)


def test_masks_agree():
    """A boolean mask, the same as −∞, and causality are one and the same."""
    layer, X = attention(), tokens(2)
    G = X @ X.mT
    past = torch.ones(N, N, dtype=torch.bool).tril()
    added = torch.zeros(N, N, dtype=torch.float64).masked_fill(~past, -torch.inf)
    boolean = layer(G, mask=past)
    assert close(layer(G, mask=added), boolean, 1e-14)
    layer.causal = True
    assert close(layer(G), boolean, 1e-14)
    layer.causal = False
    assert not close(layer(G), boolean, 1e-3)


def test_a_real_mask_is_added_to_the_scores():
    layer, X = RelationalAttention(1).double(), tokens(2)
    G, mask = X @ X.mT, torch.randn(2, N, N, dtype=torch.float64)
    expected = (layer.scores(G)[:, 0] + mask).softmax(-1)
    assert close(layer.weights(G, mask=mask)[:, 0], expected, 1e-13)


def test_padding_is_not_read():
    layer, X = attention(), tokens(2)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[0, 5:] = True
    result = layer(X @ X.mT, key_padding_mask=padding)
    short = X[0, :5]
    assert close(result[0, :5, :5], layer(short @ short.mT), 1e-13)
    assert close(result[1], layer(X[1] @ X[1].mT), 1e-13)


def test_a_token_that_may_attend_to_nobody_stays():
    layer, X = attention(), tokens()
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[2] = False
    moved = layer.lifted(X, mask=mask)
    assert torch.equal(moved[2], X[2])
    X.requires_grad_()
    layer(X @ X.mT, mask=mask).sum().backward()
    assert torch.isfinite(X.grad).all()


def test_a_mask_that_is_no_number_is_seen():
    """It is not taken for −∞, which would hide it."""
    layer, X = attention(), tokens()
    mask = torch.zeros(N, N, dtype=torch.float64)
    mask[2, 3] = torch.nan
    moved = layer.lifted(X, mask=mask)
    assert moved[2].isnan().all()
    assert torch.isfinite(moved[:2]).all()


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("training", [False, True])
def test_chunks_change_nothing(size, training):
    layer = attention(causal=True, max_relative_position=2, features=2)
    X, f = tokens(2), tokens(2, d=2)
    mask = torch.randn(N, N, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        plain = layer(X @ X.mT, f, mask=mask)
        chunked = layer(X @ X.mT, f, mask=mask, chunk_size=size)
    assert close(chunked, plain, 1e-12)
    if training:
        parameters = list(layer.parameters())
        one = torch.autograd.grad(plain.square().sum(), parameters)
        two = torch.autograd.grad(chunked.square().sum(), parameters)
        assert all(close(b, a, 1e-12) for a, b in zip(one, two, strict=True))


def test_chunks_save_memory_in_training():
    """What autograd keeps: one number per pair, not one per pair, hidden unit and head."""
    layer, X = attention(), tokens(n=64)
    G = X @ X.mT

    def kept(chunk_size):
        sizes = []

        def count(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            layer(G, chunk_size=chunk_size)
        return sum(sizes)

    assert kept(None) > 30 * 64**2
    assert kept(8) < 15 * 64**2
