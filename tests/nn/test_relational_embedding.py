"""Tokens to Gram matrices and back."""

import pytest
import torch
from torch import nn

from quotientopt._linalg import random_orthogonal
from quotientopt.nn.relational_embedding import RelationalEmbedding, embed_tokens, tokens_of_gram
from quotientopt.sections import gram_svd

BATCHES = [(), (3,), (2, 3)]


def tokens(*batch, n=6, d=3):
    return torch.randn(*batch, n, d, dtype=torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
def test_there_and_back(batch):
    """The factor has the Gram matrix it came from, and is the section of the quotient."""
    X = tokens(*batch)
    Y = tokens_of_gram(embed_tokens(X), 3)
    assert Y.shape == X.shape
    assert (Y @ Y.mT - X @ X.mT).abs().max() < 1e-12
    assert (Y - gram_svd(X)[0]).abs().max() < 1e-10
    rotated = X @ random_orthogonal(batch, 3).mT
    assert (tokens_of_gram(embed_tokens(rotated), 3) - Y).abs().max() < 1e-10
    assert (rotated - X).abs().max() > 1e-1


def test_more_width_than_tokens():
    X = tokens(2, n=2, d=5)
    Y = tokens_of_gram(embed_tokens(X), 5)
    assert Y.shape == (2, 2, 5)
    assert (Y @ Y.mT - X @ X.mT).abs().max() < 1e-12
    assert torch.equal(Y[..., 2:], torch.zeros(2, 2, 3, dtype=torch.float64))


def test_rank_deficient_tokens_come_back():
    X = tokens() @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    X.requires_grad_()
    Y = tokens_of_gram(embed_tokens(X), 2)
    assert (Y @ Y.mT - X @ X.mT).abs().max() < 1e-12


def test_what_no_tokens_have_is_refused():
    X = tokens()
    G = embed_tokens(X)
    with pytest.raises(ValueError, match="rank 3: no tokens of width 2"):
        tokens_of_gram(G, 2)
    indefinite = G.clone()
    indefinite[0, 1] = indefinite[1, 0] = 2 * (G[0, 0] * G[1, 1]).sqrt()
    with pytest.raises(ValueError, match="not positive semidefinite"):
        tokens_of_gram(indefinite, 6)
    with pytest.raises(ValueError, match="not symmetric"):
        tokens_of_gram(G + G.triu(1), 3)
    with pytest.raises(ValueError, match="width must be at least 1"):
        tokens_of_gram(G, 0)


def test_gradcheck_away_from_equal_eigenvalues():
    X = tokens(n=3, d=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: tokens_of_gram(X @ X.mT, 3), (X,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    X = tokens(2).to(dtype)
    G = embed_tokens(X)
    assert G.dtype == dtype
    assert torch.equal(G, G.mT)
    Y = tokens_of_gram(G, 3, check=dtype == torch.float32)
    assert Y.dtype == dtype
    error = (Y.double() @ Y.double().mT - G.double()).abs().max() / G.double().abs().max()
    assert error < 10 * torch.finfo(dtype).eps


def test_embedding_of_a_sequence():
    layer = RelationalEmbedding(11, 4, max_positions=8).double()
    ids = torch.randint(11, (2, 3, 6))
    X = layer.tokens[ids] + layer.positions[:6]
    assert (layer(ids) - X @ X.mT).abs().max() < 1e-13
    assert (layer.ones(ids) - X.sum(-1)).abs().max() < 1e-13
    assert (layer.references(ids) - X @ layer.tokens.mT).abs().max() < 1e-13
    before = layer(ids).detach(), layer.references(ids).detach(), layer.ones(ids).detach()
    Q = random_orthogonal((), 4)
    with torch.no_grad():
        layer.tokens.copy_(layer.tokens @ Q)
        layer.positions.copy_(layer.positions @ Q)
    assert (layer(ids) - before[0]).abs().max() < 1e-12
    assert (layer.references(ids) - before[1]).abs().max() < 1e-12
    assert (layer.ones(ids) - before[2]).abs().max() > 1e-2
    with torch.no_grad():
        layer.positions.copy_(layer.positions @ Q)
    assert (layer(ids) - before[0]).abs().max() > 1e-2


def test_bad_token_numbers_are_refused():
    layer = RelationalEmbedding(11, 4, max_positions=8)
    assert isinstance(layer.tokens, nn.Parameter)
    with pytest.raises(TypeError, match="must be integers"):
        layer(torch.rand(3))
    with pytest.raises(ValueError, match=r"lie in 0 … 10, got 0 … 11"):
        layer(torch.arange(12))
    with pytest.raises(ValueError, match="9 tokens, but max_positions is 8"):
        layer(torch.arange(9))
    with pytest.raises(ValueError, match=r"shape \(\*batch, N\)"):
        layer(torch.tensor(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_token_numbers_of_every_integer_dtype(dtype):
    """Also as many bytes as there are tokens, which indexing would take for a mask."""
    layer = RelationalEmbedding(11, 4)
    ids = torch.randint(11, (11,))
    assert torch.equal(layer.lifted(ids.to(dtype)), layer.tokens[ids])


def test_without_looking_at_the_numbers():
    layer = RelationalEmbedding(11, 4, check=False)
    ids = torch.randint(11, (3, 6))
    assert torch.equal(torch.func.vmap(layer)(ids), RelationalEmbedding.forward(layer, ids))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), layer(ids))
    with pytest.raises(IndexError):
        layer(ids - 11)
