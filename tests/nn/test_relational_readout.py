"""Readouts of pairs, tokens and sets."""

from quotientopt._linalg import random_orthogonal
from quotientopt.nn.relational_embedding import (
    PairReadout,
    PooledReadout,
    TokenReadout,
    embed_tokens,
)
from tests.nn.relational_cases import D, N, close, tokens


def test_pair_readout():
    X, f = tokens(2), tokens(2, d=2)
    readout = PairReadout(3, features=2).double()
    pairs = readout(embed_tokens(X), f)
    assert pairs.shape == (2, N, N, 3)
    Y = X @ random_orthogonal((2,), D).mT
    assert close(readout(embed_tokens(Y), f), pairs)
    assert not close(readout(embed_tokens(X), -f), pairs, 1e-3)
    two = X[:, [1, 4]]
    alone = readout(embed_tokens(two), f[:, [1, 4]])
    assert close(alone, pairs[:, [1, 4]][:, :, [1, 4]])


def test_token_readout_is_the_formula():
    X = tokens(2)
    G = embed_tokens(X)
    readout = TokenReadout(3).double()
    pairs = readout.pairs(G)
    sums = pairs.sum(-2) - pairs.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
    expected = readout.head(sums) + readout.single(X.norm(dim=-1, keepdim=True).log1p())
    assert close(readout(G), expected, 1e-7)
    pooled = PooledReadout(3).double()
    pooled.tokens.load_state_dict(readout.state_dict())
    assert close(pooled(G), expected.sum(-2), 1e-7)
