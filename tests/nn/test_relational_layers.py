"""Attention, norms and feed-forwards on Gram matrices against the same maps on tokens."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quotientopt._linalg import random_orthogonal
from quotientopt.groups import StabilizerOfOnes
from quotientopt.nn.relational_invariants import pair_invariants, token_invariants
from quotientopt.nn.relational_layers import (
    RelationalAttention,
    RelationalLayerNorm,
    RelationalRMSNorm,
)
from tests.nn.relational_cases import BATCHES, LAYERS, D, N, attention, close, tokens


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", LAYERS)
def test_commutes_with_the_projection(kind, batch):
    layer, X = LAYERS[kind](), tokens(*batch)
    moved = layer.lifted(X)
    assert moved.shape == X.shape
    assert not close(moved, X, 1e-3)
    assert close(layer(X @ X.mT), moved @ moved.mT)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", LAYERS)
def test_invariant_on_grams_and_equivariant_on_tokens(kind, batch):
    layer, X = LAYERS[kind](), tokens(*batch)
    Y = X @ random_orthogonal(batch, D).mT
    assert not close(Y, X, 1e-1)
    assert close(layer(Y @ Y.mT), layer(X @ X.mT))
    Q = torch.linalg.lstsq(X, Y).solution
    assert close(layer.lifted(Y), layer.lifted(X) @ Q)


def test_a_layer_that_reads_a_coordinate_is_caught():
    """Control: scores that see the first coordinate of the tokens are not invariant."""
    layer, X = attention(features=1), tokens(3)
    Y = X @ random_orthogonal((3,), D).mT
    reads = [layer(Z @ Z.mT, Z[..., :1]) for Z in (X, Y)]
    assert not close(*reads, 1e-3)
    given = [layer(Z @ Z.mT, X[..., :1]) for Z in (X, Y)]
    assert close(*given)


def test_an_ordinary_encoder_layer_is_caught():
    """Control: torch's encoder neither is invariant nor passes to the quotient."""
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True).double()
    X = tokens(3)
    Q = random_orthogonal((3,), D)
    one, two = layer(X), layer(X @ Q.mT)
    assert not close(two @ two.mT, one @ one.mT, 1e-3)


@pytest.mark.parametrize("kind", ["attention", "feed-forward", "rms"])
def test_permutation_equivariant(kind):
    layer, X = LAYERS[kind](), tokens(3)
    order = torch.randperm(N)
    G = X @ X.mT
    permuted = layer(G[:, order][:, :, order])
    assert close(permuted, layer(G)[:, order][:, :, order])


@pytest.mark.parametrize("options", [{"causal": True}, {"max_relative_position": 2}])
def test_order_breaks_permutations(options):
    """Control for the test above."""
    layer, X = attention(**options), tokens()
    with torch.no_grad():
        for parameter in layer.scores.parameters():
            parameter.add_(torch.randn_like(parameter))
    order = torch.arange(N).flip(0)
    G = X @ X.mT
    assert not close(layer(G[order][:, order]), layer(G)[order][:, order], 1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_rank_and_sign_stay(kind):
    layer, X = LAYERS[kind](), tokens(5)
    values = torch.linalg.eigvalsh(layer(X @ X.mT))
    floor = 1e-13 * values[:, -1:]
    assert (values >= -floor).all()
    assert ((values > 1e-6 * values[:, -1:]).sum(-1) == D).all()


def test_one_head_is_the_formula():
    """One head of weight one: rows of P sum to one, and G ↦ (I + P) G (I + P)ᵀ."""
    layer, X = RelationalAttention(1).double(), tokens(2)
    G = X @ X.mT
    P = layer.weights(G).squeeze(-3)
    assert close(P.sum(-1), torch.ones(2, N, dtype=torch.float64), 1e-14)
    assert (P > 0).all()
    M = torch.eye(N, dtype=torch.float64) + P
    assert close(layer(G), M @ G @ M.mT, 1e-14)


def test_heads_are_mixed_by_their_weights():
    layer, X = attention(), tokens(2)
    G = X @ X.mT
    weights = layer.weights(G)
    expected = 0.75 * weights[:, 0] - 0.5 * weights[:, 1] + 1.25 * weights[:, 2]
    assert weights.shape == (2, 3, N, N)
    assert close(layer.mixing(G), expected, 1e-14)


def test_invariants_by_hand():
    X = tokens(2)
    got = pair_invariants(X @ X.mT, slice(1, 3))
    norm = X.norm(dim=-1)
    for i in (1, 2):
        for j in range(N):
            x, y = X[:, i], X[:, j]
            inner = (x * y).sum(-1)
            expected = (inner, inner / (norm[:, i] * norm[:, j]), (x - y).norm(dim=-1))
            given = got[:, i - 1, j]
            assert torch.allclose(given[:, 0], inner, rtol=1e-13, atol=1e-13)
            assert torch.allclose(given[:, 1], expected[1], rtol=1e-6)
            if i != j:
                assert torch.allclose(given[:, 2], expected[2], rtol=1e-4)
            assert torch.allclose(given[:, 3], norm[:, i], rtol=1e-6)
            assert torch.allclose(given[:, 4], norm[:, j], rtol=1e-6)
    assert torch.allclose(token_invariants(X @ X.mT)[..., 0], norm.log1p(), rtol=1e-6)


@pytest.mark.parametrize("batch", BATCHES)
def test_rms_norm_is_that_of_the_tokens(batch):
    X = tokens(*batch)
    reference = functional.rms_norm(X, (D,), eps=1e-5)
    assert close(RelationalRMSNorm(D).double()(X @ X.mT), reference @ reference.mT, 1e-13)


@pytest.mark.parametrize("batch", BATCHES)
def test_layer_norm_is_that_of_the_tokens(batch):
    X = tokens(*batch)
    layer = RelationalLayerNorm(D).double()
    reference = functional.layer_norm(X, (D,), eps=1e-5)
    assert close(layer(X @ X.mT, X.sum(-1)), reference @ reference.mT, 1e-12)
    assert close(layer.lifted(X), reference, 1e-13)


def test_layer_norm_breaks_the_group_to_the_stabiliser_of_ones():
    """Invariant under O(d−1); under O(d) the row ⟨x, 1⟩ changes, and the result with it."""
    layer, X = RelationalLayerNorm(D).double(), tokens(3)
    result = layer(X @ X.mT, X.sum(-1))
    for Q, stays in (
        (StabilizerOfOnes(D).random((3,), dtype=torch.float64), True),
        (random_orthogonal((3,), D), False),
    ):
        Y = X @ Q.mT
        assert close(Y @ Y.mT, X @ X.mT)
        assert close(Y.sum(-1), X.sum(-1)) is stays
        assert close(layer(Y @ Y.mT, Y.sum(-1)), result, 1e-10 if stays else 1e-3) is stays


def test_layer_norm_without_the_row_of_ones_is_refused():
    X = tokens()
    with pytest.raises(ValueError, match="needs ones"):
        RelationalLayerNorm(D).double()(X @ X.mT)
    with pytest.raises(ValueError, match="no tokens of width 4"):
        RelationalLayerNorm(D).double()(X @ X.mT, 3 * X.norm(dim=-1))


@pytest.mark.parametrize("kind", ["attention", "feed-forward", "rms"])
def test_gradcheck(kind):
    layer, X = LAYERS[kind](), tokens(n=4, d=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: layer(X @ X.mT), (X,))
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]
    G = (X @ X.mT).detach()

    def of_parameters(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (G,))

    assert torch.autograd.gradcheck(of_parameters, parameters)


def test_gradcheck_of_layer_norm():
    layer, X = RelationalLayerNorm(3).double(), tokens(n=4, d=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: layer(X @ X.mT, X.sum(-1)), (X,))


def test_gradients_at_zero_and_equal_tokens_are_finite():
    layer, X = attention(), tokens()
    X[1], X[3] = X[0], 0.0
    X.requires_grad_()
    layer(X @ X.mT).sum().backward()
    assert torch.isfinite(X.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("kind", LAYERS)
def test_low_precision(kind, dtype, tolerance):
    """Same dtype out, computed in float32: only the rounding of input and output is left."""
    layer, X = LAYERS[kind](), tokens(2, d=D)
    G = (X @ X.mT).to(dtype)
    exact = layer(G.double())
    low = layer.to(dtype)(G)
    assert low.dtype == dtype
    assert close(low.double(), exact, tolerance)
    assert layer.lifted(X.to(dtype)).dtype == dtype


def test_autocast_does_not_lower_the_precision():
    layer, X = attention().float(), tokens(2, dtype=torch.float32)
    G = X @ X.mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(G)
    assert torch.equal(result, layer(G))
