"""A GPT, and a vision Transformer with the same blocks and the same exact symmetries.

Their residual stream has the exact symmetry O(d): RMS norms without gains, no biases. In reading
order: the block (:class:`GPTBlock`), the decoder (:class:`GPT`), the classifier of images
(:class:`ViT`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.models.attention import Attention, initialize_

NORM_EPS = 1e-6


def normalize(x: Tensor) -> Tensor:
    """Root-mean-square normalisation of the last axis, without a gain."""
    return functional.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


class GELUMLP(nn.Module):
    """``down(gelu(up(x)))`` without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis of `x`."""
        return self.down(functional.gelu(self.up(x)))


class GPTBlock(nn.Module):
    """Pre-norm attention, causal by default, and MLP."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=causal)
        self.mlp = GELUMLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream `x`."""
        x = x + self.attention(normalize(x))
        return x + self.mlp(normalize(x))


class GPT(nn.Module):
    """Decoder with learned positions, gain-free RMS norms, GELU MLPs and an untied head.

    Its symmetries: GL(r) on the query-key and on the value-output pair of every head, O(d) on the
    residual stream, all exact.

    Parameters
    ----------
    vocabulary, layers, width, heads, context : int
    generator : torch.Generator, optional
        Source of the initial weights. Default: the global generator.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 128,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialize_(self, layers, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, vocabulary) for integer `tokens` (batch, length)."""
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"{length} tokens, but the model has only {self.context} positions")
        x = self.embedding(tokens) + self.positions.weight[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(normalize(x))


class ViT(nn.Module):
    """Classifier of grey images: patches, learned positions, non-causal blocks, mean pooling.

    The blocks are those of `GPT` without the causal mask; the head, without a bias, reads the mean
    of the normalised tokens. Its symmetries: GL(r) on the query-key and on the value-output pair
    of every head, O(d) on the residual stream, all exact.

    Parameters
    ----------
    classes, layers, width, heads : int
    image, patch : int
        Sides of an image and of a patch, in pixels.
    generator : torch.Generator, optional
        Source of the initial weights. Default: the global generator.
    """

    def __init__(
        self,
        classes: int = 10,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        image: int = 28,
        patch: int = 4,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"image side {image} is not a multiple of patch side {patch}")
        self.image = image
        self.patch = patch
        self.patches = nn.Linear(patch * patch, width, bias=False)
        self.positions = nn.Embedding((image // patch) ** 2, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, causal=False) for _ in range(layers))
        self.head = nn.Linear(width, classes, bias=False)
        initialize_(self, layers, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for `images` of shape (batch, image, image)."""
        if images.ndim != 3 or tuple(images.shape[1:]) != (self.image, self.image):
            raise ValueError(
                f"images of shape {tuple(images.shape)}, but the model reads "
                f"(batch, {self.image}, {self.image})"
            )
        x = self.patches(split_patches(images, self.patch)) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(normalize(x).mean(dim=-2))


def split_patches(images: Tensor, patch: int) -> Tensor:
    """Cut images into square patches, row by row.

    Parameters
    ----------
    images : Tensor
        Shape (batch, height, width); both sides multiples of `patch`.
    patch : int

    Returns
    -------
    Tensor
        Shape (batch, height * width / patch**2, patch**2).
    """
    rows = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    return rows.transpose(-3, -2).flatten(-2).flatten(-3, -2)
