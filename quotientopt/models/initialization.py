"""Initial weights of the reference models: random, reproducible, of full rank everywhere."""

import math

import torch
from torch import nn

EMBEDDING_STD = 0.02
WRITING_LAYERS = ("attention.output", "mlp.down")


def initialize_(model: nn.Module, layers: int, generator: torch.Generator | None) -> None:
    """Draw all matrices of `model` in place.

    Linear layers get standard deviation 1/sqrt(fan_in), embeddings 0.02. Nothing is zero, so
    every attention pair has full rank and lies on the quotient manifold from the first step on.

    Parameters
    ----------
    model : nn.Module
    layers : int
        Depth; the linear layers that write into the residual stream (those named in
        `WRITING_LAYERS`) are divided by sqrt(2 * layers) besides.
    generator : torch.Generator, optional
        Default: the global generator.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            depth = 2 * layers if name.endswith(WRITING_LAYERS) else 1
            std = 1 / math.sqrt(module.in_features * depth)
            nn.init.normal_(module.weight, std=std, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD, generator=generator)
