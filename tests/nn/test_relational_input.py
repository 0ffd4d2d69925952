"""What relational layers refuse."""

import pytest
import torch

from quotientopt.nn.relational_layers import (
    RelationalAttention,
    RelationalFeedForward,
    RelationalLayerNorm,
    RelationalRMSNorm,
)
from tests.nn.relational_cases import N, attention, tokens

BAD_INPUT = {
    "not square": (lambda G: (G[:, 1:],), {}, ValueError, r"shape \(\*batch, N, N\), got"),
    "vector": (lambda G: (G[0, 0],), {}, ValueError, r"shape \(\*batch, N, N\), got"),
    "integers": (lambda G: (G.long(),), {}, TypeError, "floating-point"),
    "not symmetric": (lambda G: (G + G.triu(1),), {}, ValueError, "not symmetric"),
    "not finite": (lambda G: (G / 0,), {}, ValueError, "non-finite"),
    "negative": (lambda G: (-G,), {}, ValueError, "negative squared norm"),
    "mask of other size": (
        lambda G: (G,),
        {"mask": torch.ones(N, N - 1, dtype=torch.bool)},
        ValueError,
        "mask must broadcast",
    ),
    "mask of other batch": (
        lambda G: (G,),
        {"mask": torch.ones(3, N, N, dtype=torch.bool)},
        ValueError,
        "mask must broadcast",
    ),
    "mask of integers": (
        lambda G: (G,),
        {"mask": torch.ones(N, N, dtype=torch.long)},
        TypeError,
        "mask must have dtype",
    ),
    "padding of other size": (
        lambda G: (G,),
        {"key_padding_mask": torch.zeros(2, N + 1, dtype=torch.bool)},
        ValueError,
        "key_padding_mask must broadcast",
    ),
    "padding of numbers": (
        lambda G: (G,),
        {"key_padding_mask": torch.zeros(2, N)},
        TypeError,
        "key_padding_mask must have dtype bool",
    ),
    "features unasked": (lambda G: (G, G), {}, ValueError, "none are read"),
    "chunks of nothing": (lambda G: (G,), {"chunk_size": 0}, ValueError, "chunk_size"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(case):
    change, options, error, message = BAD_INPUT[case]
    X = tokens(2)
    with pytest.raises(error, match=message) as caught:
        attention()(*change(X @ X.mT), **options)
    assert "\n" not in str(caught.value)


def test_missing_features_are_refused():
    X = tokens(2)
    layer = attention(features=2)
    with pytest.raises(ValueError, match=r"features of shape \(2, 7, 2\) are missing"):
        layer(X @ X.mT)
    with pytest.raises(ValueError, match=r"must have shape \(2, 7, 2\), got \(2, 7, 3\)"):
        layer(X @ X.mT, X[..., :3])


def test_rounding_is_no_asymmetry():
    """Gram matrices as they come out of matrix products pass, in every precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        X = tokens(2, n=30, d=300, dtype=dtype)
        G = X @ X.mT
        noise = 4 * torch.finfo(dtype).eps * torch.randn(2, 30, 30).to(dtype)
        result = attention().to(dtype)(G + noise * G)
        assert torch.isfinite(result).all()


def test_layer_norm_of_tokens_reads_numbers_of_its_width():
    norm = RelationalLayerNorm(4)
    with pytest.raises(TypeError, match="floating-point"):
        norm.lifted(torch.arange(12).reshape(3, 4))
    with pytest.raises(ValueError, match=r"shape \(\*batch, N, 4\)"):
        norm.lifted(torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
        norm.lifted([[1.0, 2.0, 3.0, 4.0]])


def scaled_feed_forward(scale):
    return RelationalFeedForward(2, scale=scale)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="heads must be at least 1"):
        RelationalAttention(0)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        for layer in (lambda s: RelationalAttention(1, scale=s), scaled_feed_forward):
            with pytest.raises(ValueError, match="scale must be a positive number"):
                layer(scale)
    with pytest.raises(ValueError, match="eps must not be negative"):
        RelationalRMSNorm(4, eps=-1e-5)
    with pytest.raises(ValueError, match="max_relative_position"):
        RelationalAttention(1, max_relative_position=0)
    with pytest.raises(TypeError, match="width must be an int"):
        RelationalRMSNorm(4.0)
