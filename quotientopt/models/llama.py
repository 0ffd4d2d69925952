"""A Llama: rotary positions, grouped queries, SwiGLU and RMS norms with gains."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.models.attention import CausalAttention, initialize_

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, times a trainable gain `weight`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, NORM_EPS)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis of `x`."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, key_value_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = CausalAttention(width, heads, key_value_heads, rotary=True)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream `x`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Decoder in the Llama layout with an untied head and no biases.

    Its symmetries: (C*)^{r/2} on the query-key pair and GL(r) on the value-output pair of every
    key-value head. The trainable gains leave only signed permutations of the residual stream.

    Parameters
    ----------
    vocabulary, layers, width, heads, key_value_heads : int
    context : int
        Longest input accepted, for parity with `GPT`; no parameter depends on it.
    hidden : int, optional
        Width of the MLPs. Default: 8/3 of `width`, rounded up to a multiple of 32.
    generator : torch.Generator, optional
        Source of the initial weights. Default: the global generator.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        key_value_heads: int = 2,
        context: int = 128,
        hidden: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden = -(-8 * width // 96) * 32 if hidden is None else hidden
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, heads, key_value_heads, hidden) for _ in range(layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialize_(self, layers, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, vocabulary) for integer `tokens` (batch, length)."""
        if tokens.shape[-1] > self.context:
            raise ValueError(f"{tokens.shape[-1]} tokens, but the context is {self.context}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
