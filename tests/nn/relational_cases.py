"""Layers and tokens that the tests of relational layers share."""

import torch

from quotientopt.nn.relational_layers import (
    RelationalAttention,
    RelationalFeedForward,
    RelationalRMSNorm,
)

N, D = 7, 4
BATCHES = [(), (3,), (2, 3)]


def tokens(*batch, n=N, d=D, dtype=torch.float64):
    return torch.randn(*batch, n, d, dtype=torch.float64).to(dtype)


def attention(**options):
    """Three heads that differ, and mix with weights of both signs."""
    layer = RelationalAttention(3, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        layer.head_weights.copy_(torch.tensor([0.75, -0.5, 1.25]))
    return layer


def feed_forward(**options):
    layer = RelationalFeedForward(8, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def close(one, two, tolerance=1e-10):
    return bool((one - two).abs().max() <= tolerance * two.abs().max())


LAYERS = {
    "attention": attention,
    "attention, causal, positions": lambda: attention(causal=True, max_relative_position=3),
    "feed-forward": feed_forward,
    "rms": lambda: RelationalRMSNorm(D).double(),
}
