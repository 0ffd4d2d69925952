"""Attention of the reference models: plain or rotary, causal or not, with grouped heads.

Last come the initial weights of the models that are made of it (:func:`initialize_`): random,
reproducible, of full rank everywhere.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10_000.0


def rotary_angles(length: int, head_width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, one row per position.

    Parameters
    ----------
    length : int
        Number of positions.
    head_width : int
        Width r of a head; plane j pairs the rows (j, j + r/2) and turns with frequency
        ``ROTARY_BASE ** (-2 j / r)``, so all frequencies are distinct.
    like : Tensor
        Gives device and dtype. They are recomputed at every call rather than kept in a buffer:
        a buffer made in float32 stays at float32 precision when the model is cast to float64.

    Returns
    -------
    tuple of Tensor
        Two tensors of shape (length, head_width / 2).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    planes = torch.arange(head_width // 2, device=like.device, dtype=dtype)
    frequencies = ROTARY_BASE ** (-2 * planes / head_width)
    positions = torch.arange(length, device=like.device, dtype=dtype)
    angles = positions[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn every plane (j, j + r/2) of the last axis of `x` by its angle (rotate-half layout)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class Attention(nn.Module):
    """Self-attention with four separate linear maps and no biases.

    Parameters
    ----------
    width : int
        Width of the residual stream.
    heads : int
        Number of query heads, of width ``width // heads`` each.
    key_value_heads : int, optional
        Number of key-value heads; query head h reads key-value head
        ``h // (heads // key_value_heads)``. Default: `heads`.
    rotary : bool
        Whether queries and keys are turned by rotary position embeddings.
    causal : bool
        Whether a position attends to itself and earlier positions only.

    Attributes
    ----------
    query, key, value, output : nn.Linear
        Rows of `query`, `key`, `value` and columns of `output` are grouped by head.
    heads, key_value_heads, head_width : int
    rotary, causal : bool
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        rotary: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        key_value_heads = heads if key_value_heads is None else key_value_heads
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if heads % key_value_heads:
            raise ValueError(
                f"heads {heads} is not a multiple of key_value_heads {key_value_heads}"
            )
        if rotary and (width // heads) % 2:
            raise ValueError(f"rotary attention needs an even head width, got {width // heads}")
        self.heads = heads
        self.key_value_heads = key_value_heads
        self.head_width = width // heads
        self.rotary = rotary
        self.causal = causal
        self.query = nn.Linear(width, heads * self.head_width, bias=False)
        self.key = nn.Linear(width, key_value_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, key_value_heads * self.head_width, bias=False)
        self.output = nn.Linear(heads * self.head_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the second-to-last axis of `x`, of shape (batch, length, width)."""
        query = self._split(self.query(x), self.heads)
        key = self._split(self.key(x), self.key_value_heads)
        value = self._split(self.value(x), self.key_value_heads)
        if self.rotary:
            cosines, sines = rotary_angles(x.shape[-2], self.head_width, query)
            query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=self.causal,
            enable_gqa=self.key_value_heads != self.heads,
        )
        return self.output(mixed.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, length, heads * r) to (batch, heads, length, r)."""
        return x.unflatten(-1, (heads, self.head_width)).transpose(-3, -2)


class CausalAttention(Attention):
    """`Attention` in which a position attends to itself and earlier positions only."""

    def __init__(
        self, width: int, heads: int, key_value_heads: int | None = None, rotary: bool = False
    ) -> None:
        super().__init__(width, heads, key_value_heads, rotary, causal=True)


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
