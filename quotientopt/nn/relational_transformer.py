"""A transformer on Gram matrices of tokens.

In reading order: `RelationalStream`, what flows through it, a Gram matrix or the tokens themselves;
`RelationalBlock`, one layer; `RelationalTransformer`.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quotientopt._linalg import check_floating
from quotientopt.nn.masks import AttentionMask
from quotientopt.nn.relational_embedding import PooledReadout, TokenReadout
from quotientopt.nn.relational_invariants import (
    Dense,
    Standardize,
    check_gram,
    check_size,
    congruence,
    full_precision,
    gram_of_tokens,
    perceptron,
    raised,
    token_invariants,
)
from quotientopt.nn.relational_layers import (
    RelationalAttention,
    RelationalFeedForward,
    RelationalRMSNorm,
    centred,
    check_features,
    check_ones,
    check_tokens,
    scaled,
    with_identity,
)


class RelationalStream(Protocol):
    """Something with a Gram matrix that moves when its tokens are mixed or scaled."""

    @property
    def gram(self) -> Tensor: ...

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""


class GramStream:
    """G and inner products R with reference vectors: ``G ↦ M G Mᵀ``, ``R ↦ M R``."""

    def __init__(self, gram: Tensor, references: Tensor | None) -> None:
        self.gram, self.references = gram, references

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""
        self.gram = congruence(M, self.gram)
        if self.references is not None:
            self.references = M @ self.references

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""
        self.gram = scaled(self.gram, scales)
        if self.references is not None:
            self.references = scales.unsqueeze(-1) * self.references


class TokenStream:
    """X, whose Gram matrix is made anew after every move."""

    def __init__(self, X: Tensor) -> None:
        self.X = X

    @property
    def gram(self) -> Tensor:
        """``X Xᵀ``."""
        return gram_of_tokens(self.X)

    def mix(self, M: Tensor) -> None:
        """``X ↦ M X``."""
        self.X = M @ self.X

    def scale(self, scales: Tensor) -> None:
        """``x_i ↦ s_i x_i``."""
        self.X = scales.unsqueeze(-1) * self.X


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
        stream: RelationalStream,
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
        self,
        stream: RelationalStream,
        features: Tensor,
        masks: AttentionMask,
        chunk_size: int | None,
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


NORMS = (None, "rms", "layer")
READOUTS = (None, "tokens", "sum", "mean")


class Relations(NamedTuple):
    """Relational data of tokens: all of it unchanged when the tokens are rotated."""

    gram: Tensor
    """``⟨x_i, x_j⟩``, shape (*batch, N, N)."""
    features: Tensor
    """Invariant features of every token, shape (*batch, N, features), in at least float32."""
    references: Tensor | None
    """``⟨x_i, r_k⟩`` with the reference vectors given, shape (*batch, N, k)."""


class RelationalTransformer(nn.Module):
    """Layers of relational attention and feed-forwards: Gram in, Gram (or numbers) out.

    Every layer (:class:`RelationalBlock`) acts on G by congruence, ``G ↦ M G Mᵀ``, and on invariant
    features of the tokens that start as a linear map of their norms and of `token_features`. The
    results are the same for X and XQᵀ, exactly; each is also that of the map :meth:`lifted` on X.

    Parameters
    ----------
    layers, heads : int
    features : int
        Invariant features per token, a multiple of `heads`, at least 2.
    hidden : int
        Width of the hidden layers of scores, gates and readout.
    token_features : int
        Number of features given with the tokens (types, charges), or 0.
    norm : None, "rms" or "layer"
        Normalisation before attention. "layer" centres the tokens, which needs their inner products
        with 1 (`ones` in :meth:`forward`) and leaves invariance under the stabiliser O(d−1) of 1:
        the layers move the centred part ``X (I − 11ᵀ/d)``, and ``X 1`` stays as it is.
    width : int, optional
        d, which normalisation needs (without materialising anything of that size); attention and
        readout then read the invariants of X/√d.
    causal : bool
        Whether tokens attend to themselves and earlier ones only.
    max_relative_position : int, optional
        Adds a position bias to the scores; by default the model is permutation-equivariant.
    readout : None, "tokens", "sum" or "mean"
        What :meth:`forward` returns: :class:`Relations`, or `out` numbers of every token, or their
        sum or mean over the tokens (:class:`TokenReadout`, :class:`PooledReadout`).
    out : int
        Numbers of the readout.
    check : bool
        Whether to look at the entries of Gram matrices, as in :class:`RelationalAttention`.

    Raises
    ------
    ValueError
        If the options do not fit; for input that is no Gram matrix, masks and features of another
        shape; with ``norm="layer"`` and no `ones`.

    Notes
    -----
    Memory: N² max(hidden, heads) numbers for the pairs in every layer, in chunks of queries if
    asked, and a few N² besides. Time: N³ for a congruence, where tokens would take N² d.
    Source: François and Ravera, arXiv 2602.18948; O(d)-equivariant attention on tokens with
    invariant scalars is known from networks for molecules.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        *,
        features: int = 32,
        hidden: int = 32,
        token_features: int = 0,
        norm: str | None = None,
        width: int | None = None,
        causal: bool = False,
        max_relative_position: int | None = None,
        readout: str | None = None,
        out: int = 1,
        check: bool = True,
    ) -> None:
        super().__init__()
        check_size("layers", layers)
        check_size("heads", heads)
        check_size("features", features, least=2)
        check_size("token_features", token_features, least=0)
        if features % heads:
            raise ValueError(f"features {features} is not a multiple of heads {heads}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {readout!r}")
        if norm is not None and width is None:
            raise ValueError(f"norm {norm!r} needs width, the d of the tokens")
        if norm is None and width is not None:
            raise ValueError("width is read by a norm only: pass norm='rms' or 'layer' too")
        if readout is None and out != 1:
            raise ValueError("out is read by a readout only: pass readout='tokens', 'sum', 'mean'")
        self.norm, self.width, self.check = norm, width, check
        self.token_features, self.causal = token_features, causal
        self.scale = 1.0 if width is None else 1 / check_size("width", width)
        self.embedding = Dense(token_features + 1, features)
        self.blocks = nn.ModuleList(
            RelationalBlock(heads, features, hidden, width, causal, max_relative_position)
            for _ in range(layers)
        )
        self.last = Standardize(features)
        self.readout: TokenReadout | PooledReadout | None = None
        if readout is not None:
            kind = TokenReadout if readout == "tokens" else PooledReadout
            self.readout = kind(
                out,
                hidden=hidden,
                features=features,
                pool="mean" if readout == "tokens" else readout,
                causal=causal,
                check=False,
            )

    def forward(
        self,
        gram: Tensor,
        token_features: Tensor | None = None,
        *,
        ones: Tensor | None = None,
        references: Tensor | None = None,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor | Relations:
        """The readout of the transformed Gram matrix, or without a readout :class:`Relations`.

        Parameters
        ----------
        gram : Tensor, shape (*batch, N, N)
        token_features : Tensor, shape (*batch, N, token_features)
            Wanted if the model has any.
        ones : Tensor, shape (*batch, N)
            ``⟨x_i, 1⟩``; wanted with ``norm="layer"``, else refused.
        references : Tensor, optional, shape (*batch, N, k)
            Inner products with k reference vectors, carried along by ``R ↦ M R``. Not with
            ``norm="layer"``. Only without a readout, which does not read them.
        mask, key_padding_mask, chunk_size
            As in :class:`RelationalAttention`. Padding is left out of means and sums.

        Returns
        -------
        Tensor, shape (*batch, N, out) or (*batch, out), or Relations
        """
        check_gram(gram, values=self.check)
        check_features(gram, token_features, self.token_features)
        self._check_references(gram, references)
        masks = AttentionMask(gram, mask, key_padding_mask, self.causal)
        c = self._checked_ones(gram, ones)
        with full_precision(gram):
            G = raised(gram)
            start = G if c is None or self.width is None else centred(G, c, self.width)
            stream = GramStream(start, None if references is None else raised(references))
            features = self._run(stream, token_features, masks, chunk_size)
            G = stream.gram
            if c is not None and self.width is not None:
                G = G + c.unsqueeze(-1) * c.unsqueeze(-2) / self.width
            if self.readout is not None:
                return self.readout(
                    self.scale * G,
                    features,
                    mask=mask,
                    key_padding_mask=key_padding_mask,
                    chunk_size=chunk_size,
                )
        moved = None if references is None or stream.references is None else stream.references
        return Relations(
            G.to(gram.dtype),
            features,
            None if moved is None or references is None else moved.to(references.dtype),
        )

    def lifted(
        self,
        X: Tensor,
        token_features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same layers on tokens: X (*batch, N, d) to the new X and the features.

        O(d)-equivariant (under the stabiliser of 1 with ``norm="layer"``): XQᵀ leads to the new X
        times Qᵀ.
        """
        check_tokens(X)
        if self.width is not None and X.shape[-1] != self.width:
            raise ValueError(f"X must have shape (*batch, N, {self.width}), got {tuple(X.shape)}")
        with full_precision(X):
            tokens = raised(X)
            check_features(gram_of_tokens(tokens), token_features, self.token_features)
            masks = AttentionMask(gram_of_tokens(tokens), mask, key_padding_mask, self.causal)
            mean = tokens.mean(dim=-1, keepdim=True) if self.norm == "layer" else 0
            stream = TokenStream(tokens - mean)
            features = self._run(stream, token_features, masks, chunk_size)
            return (stream.X + mean).to(X.dtype), features

    def _run(
        self,
        stream: RelationalStream,
        token_features: Tensor | None,
        masks: AttentionMask,
        chunk_size: int | None,
    ) -> Tensor:
        invariants = token_invariants(self.scale * stream.gram)
        if token_features is not None:
            invariants = torch.cat((invariants, token_features.to(invariants.dtype)), dim=-1)
        features = self.embedding(invariants)
        for block in self.blocks:
            features = block(stream, features, masks, chunk_size)
        return self.last(features)

    def _checked_ones(self, gram: Tensor, ones: Tensor | None) -> Tensor | None:
        if self.norm == "layer" and self.width is not None:
            return raised(check_ones(ones, gram, self.width, values=self.check))
        if ones is not None:
            raise ValueError(f"ones are read by norm='layer' only, and norm is {self.norm!r}")
        return None

    def _check_references(self, gram: Tensor, references: Tensor | None) -> None:
        if references is None:
            return
        check_floating("references", references)
        if references.ndim != gram.ndim or references.shape[:-1] != gram.shape[:-1]:
            raise ValueError(
                f"references must have shape {(*gram.shape[:-1], 'k')}, "
                f"got {tuple(references.shape)}"
            )
        if self.norm == "layer":
            raise ValueError("references are not carried through norm='layer': use 'rms' or None")
        if self.readout is not None:
            raise ValueError("references are not read by the readout: build with readout=None")
