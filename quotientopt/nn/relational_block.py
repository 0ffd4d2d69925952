"""One layer of the relational transformer."""

import torch
from torch import Tensor, nn

from quotientopt.nn.relational_arithmetic import Dense, Standardize, perceptron
from quotientopt.nn.relational_attention import RelationalAttention, with_identity
from quotientopt.nn.relational_feed_forward import RelationalFeedForward
from quotientopt.nn.relational_invariants import token_invariants
from quotientopt.nn.relational_masks import AttentionMask
from quotientopt.nn.relational_norms import RelationalRMSNorm, scaled
from quotientopt.nn.relational_streams import Stream


class RelationalBlock(nn.Module):
    """Attention and feed-forward on the Gram matrix G and on invariant features f of the tokens.

    With N the normalisation (if any) and P the mixing matrix of :class:`RelationalAttention`::

        X ↦ X + P N(X),   f ↦ f + Σ_h P_h f V_h     attention
        f ↦ f + φ(f, |x|),  X ↦ s(f, |x|) X          feed-forward

    all of it as an action on G: ``X + P N(X) = (I + P D) X`` with D = diag(1/rms). Features go in
    standardised (layer normalisation over the features, which O(d) does not act on).

    Parameters
    ----------
    heads, features, hidden : int
        `features` of every token, shared evenly by the heads in attention.
    width : int, optional
        d, for normalisation; none by default.
    causal, max_relative_position
        As in :class:`RelationalAttention`.
    """

    def __init__(
        self,
        heads: int,
        features: int,
        hidden: int,
        width: int | None = None,
        causal: bool = False,
        max_relative_position: int | None = None,
    ) -> None:
        super().__init__()
        scale = 1.0 if width is None else 1 / width
        self.scale = scale
        self.norm = None if width is None else RelationalRMSNorm(width, check=False)
        self.attention = RelationalAttention(
            heads,
            hidden=hidden,
            features=features,
            scale=scale,
            causal=causal,
            max_relative_position=max_relative_position,
            check=False,
        )
        self.values = Dense(features, features, bias=False)
        self.output = Dense(features, features, bias=False)
        self.feature_map = perceptron(features + 1, 2 * features, features)
        self.feed_forward = RelationalFeedForward(hidden, features, scale=scale, check=False)
        self.before_attention = Standardize(features)
        self.before_map = Standardize(features)
        self.before_gate = Standardize(features)

    def forward(
        self,
        stream: Stream,
        features: Tensor,
        masks: AttentionMask,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Move the stream, and return the new features (*batch, N, features)."""
        features = self._attend(stream, features, masks, chunk_size)
        gram = stream.gram
        inputs = torch.cat((self.before_map(features), token_invariants(self.scale * gram)), dim=-1)
        features = features + self.feature_map(inputs)
        stream.scale(self.feed_forward.scales(gram, self.before_gate(features)))
        return features

    def _attend(
        self, stream: Stream, features: Tensor, masks: AttentionMask, chunk_size: int | None
    ) -> Tensor:
        gram = stream.gram
        scales = None if self.norm is None else self.norm.scales(gram)
        normal = gram if scales is None else scaled(gram, scales)
        standardised = self.before_attention(features)
        values = self.values(standardised).unflatten(-1, (self.attention.heads, -1))
        P, means = self.attention.attend(
            normal, standardised, masks, values.transpose(-3, -2), chunk_size
        )
        if means is not None:
            features = features + self.output(means.transpose(-3, -2).flatten(-2))
        stream.mix(with_identity(P if scales is None else P * scales.unsqueeze(-2)))
        return features
