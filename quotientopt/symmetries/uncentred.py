"""LayerNorm without its centring, which folding makes superfluous."""

from torch import Tensor, nn
from torch.nn import functional


class UncentredLayerNorm(nn.LayerNorm):
    """A LayerNorm that does not subtract the mean: ``γ ∘ x / √(mean(x²) + ε) + β``.

    :func:`quotientopt.fold_norms_` puts it in the place of a LayerNorm once everything that writes
    to the stream writes vectors of mean zero. On such vectors both compute the same, and this one
    commutes with all of O(d) (γ = 1). Parameters and ``state_dict`` keys are those of LayerNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axes of `x`."""
        x = functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return x if self.bias is None else x + self.bias
