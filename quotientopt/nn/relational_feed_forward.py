"""Token-wise layers on Gram matrices."""

import torch
from torch import Tensor, nn

from quotientopt.nn.relational_arithmetic import (
    check_scale,
    check_size,
    full_precision,
    perceptron,
    raised,
)
from quotientopt.nn.relational_attention import check_features, check_tokens
from quotientopt.nn.relational_invariants import check_gram, gram_of_tokens, token_invariants
from quotientopt.nn.relational_norms import scaled


class RelationalFeedForward(nn.Module):
    """``G ↦ D G D``, D = diag(s_i), ``s_i = 1 + tanh φ(log(1 + |x_i|), f_i)`` with φ learned.

    On tokens it is ``x ↦ s(|x|, f) x``. A token-wise map that commutes with O(d), d > 1, is of this
    form: a multiple of x by a function of its norm (and of invariant features f). Scales are
    positive, so the rank and the sign of G stay.

    Parameters
    ----------
    hidden : int
        Width of the hidden layer of φ.
    features : int
        Number of invariant features of a token that φ reads, or 0.
    scale : float
        φ reads the norms of ``√scale X``.
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(
        self, hidden: int = 16, features: int = 0, *, scale: float = 1.0, check: bool = True
    ) -> None:
        super().__init__()
        check_scale(scale)
        self.features, self.scale, self.check = features, scale, check
        check_size("features", features, least=0)
        self.gate = perceptron(1 + features, check_size("hidden", hidden), 1)

    def forward(self, gram: Tensor, features: Tensor | None = None) -> Tensor:
        """``D G D`` for gram (*batch, N, N), features (*batch, N, features)."""
        check_gram(gram, values=self.check)
        with full_precision(gram):
            return scaled(raised(gram), self.scales(gram, features)).to(gram.dtype)

    def lifted(self, X: Tensor, features: Tensor | None = None) -> Tensor:
        """``D X`` for X (*batch, N, d)."""
        check_tokens(X)
        with full_precision(X):
            tokens = raised(X)
            scales = self.scales(gram_of_tokens(tokens), features)
            return (scales.unsqueeze(-1) * tokens).to(X.dtype)

    def scales(self, gram: Tensor, features: Tensor | None = None) -> Tensor:
        """The s_i, shape (*batch, N), in at least float32."""
        check_features(gram, features, self.features)
        inputs = token_invariants(self.scale * raised(gram))
        if features is not None:
            inputs = torch.cat((inputs, features.to(inputs.dtype)), dim=-1)
        return 1 + self.gate(inputs).squeeze(-1).tanh()
