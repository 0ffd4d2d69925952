"""A vision Transformer with the same blocks, and the same exact symmetries, as `GPT`."""

import torch
from torch import Tensor, nn

from quotientopt.models.gpt import GPTBlock, normalize
from quotientopt.models.initialization import initialize_


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
