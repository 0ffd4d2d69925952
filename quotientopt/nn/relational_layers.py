"""Layers from Gram matrices to Gram matrices, O(d)-invariant by construction.

In reading order: `RelationalAttention`; `RelationalRMSNorm` and `RelationalLayerNorm`;
`RelationalFeedForward`, token by token.
"""

import torch
from torch import Tensor, nn

from quotientopt._linalg import check_finite, check_floating
from quotientopt.nn.masks import AttentionMask
from quotientopt.nn.relational_invariants import (
    InvariantScores,
    check_gram,
    check_scale,
    check_size,
    chunks,
    congruence,
    full_precision,
    gram_of_tokens,
    perceptron,
    raised,
    recomputed,
    squared_norms,
    symmetric,
    token_invariants,
)


class RelationalAttention(nn.Module):
    """Multi-head attention ``G ↦ (I + P) G (I + P)ᵀ`` on Gram matrices of tokens.

    ``P = Σ_h a_h softmax(s_h)``, with scores s_h that are learned functions of O(d)-invariants
    (:class:`InvariantScores`) and learned numbers a_h that mix the heads. It is the attention
    ``X ↦ (I + P(XXᵀ)) X`` on tokens (:meth:`lifted`) seen through ``X ↦ XXᵀ``: both commute, the
    result is positive semidefinite, of rank at most d, and the same for X and XQᵀ. A value matrix
    would act on the axis d; only multiples of the identity commute with O(d): the a_h are these.

    Without `chunk_size` it holds the pairs (i, j) once per hidden unit and once per head, ``N² max(
    hidden, heads)`` numbers; with it, that many for `chunk_size` queries at a time, and N² for P,
    also in training, where the scores of a chunk are computed again in the backward pass. d never
    appears.

    Parameters
    ----------
    heads : int
    hidden : int
        Width of the hidden layer of the scores.
    features : int
        Number of invariant features of every token that the scores read too (types, charges).
    scale : float
        The scores read the invariants of ``√scale X``; 1/d where tokens have norm √d.
    causal : bool
        Whether tokens attend to themselves and earlier ones only. Then the leading block
        ``G[:t, :t]`` of the result depends on that of the argument only.
    max_relative_position : int, optional
        Adds a learned bias b_h(j − i), clipped at this distance; by default nothing knows the order
        of the tokens, and the layer is permutation-equivariant.
    check : bool
        Whether to look at the entries of Gram matrices (finite, symmetric, diagonal not negative),
        which waits for the device. Shapes and dtypes are always checked.

    Raises
    ------
    TypeError, ValueError
        If a Gram matrix is not square, not symmetric beyond rounding or not finite; if masks or
        features do not fit.

    Notes
    -----
    Source: François and Ravera, arXiv 2602.18948 (relational representations). Inputs are computed
    with in at least float32, outside autocast, and results returned in the dtype of the input.
    """

    def __init__(
        self,
        heads: int,
        *,
        hidden: int = 16,
        features: int = 0,
        scale: float = 1.0,
        causal: bool = False,
        max_relative_position: int | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        check_scale(scale)
        self.heads, self.scale, self.causal, self.check = heads, scale, causal, check
        self.scores = InvariantScores(heads, hidden, features, max_relative_position)
        self.head_weights = nn.Parameter(torch.full((heads,), 1 / heads))

    def forward(
        self,
        gram: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """``(I + P) G (I + P)ᵀ``.

        Parameters
        ----------
        gram : Tensor, shape (*batch, N, N)
        features : Tensor, optional, shape (*batch, N, features)
            Invariant features of the tokens.
        mask : Tensor, optional, broadcastable to (*batch, N, N)
            Boolean (true: may attend) or real (added to the scores).
        key_padding_mask : Tensor of bool, optional, broadcastable to (*batch, N)
            True for padding, to which nobody attends.
        chunk_size : int, optional
            Number of queries at a time.

        Returns
        -------
        Tensor, shape (*batch, N, N)
            Symmetric to the last bit.
        """
        P = self.mixing(
            gram, features, mask=mask, key_padding_mask=key_padding_mask, chunk_size=chunk_size
        )
        with full_precision(gram):
            return congruence(with_identity(P), raised(gram)).to(gram.dtype)

    def lifted(
        self,
        X: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """``X + P(XXᵀ) X``, the same map on tokens X (*batch, N, d)."""
        check_tokens(X)
        with full_precision(X):
            tokens = raised(X)
            P = self.mixing(
                gram_of_tokens(tokens),
                features,
                mask=mask,
                key_padding_mask=key_padding_mask,
                chunk_size=chunk_size,
            )
            return (tokens + P @ tokens).to(X.dtype)

    def mixing(
        self,
        gram: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """P, shape (*batch, N, N), in at least float32; its rows sum to ``Σ_h a_h``."""
        check_gram(gram, values=self.check)
        masks = AttentionMask(gram, mask, key_padding_mask, self.causal)
        return self.attend(gram, features, masks, chunk_size=chunk_size)[0]

    def weights(
        self,
        gram: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The softmax of every head, shape (*batch, heads, N, N), in at least float32."""
        check_gram(gram, values=self.check)
        masks = AttentionMask(gram, mask, key_padding_mask, self.causal)
        check_features(gram, features, self.scores.units.features)
        with full_precision(gram):
            return self._weights(raised(gram), _raised_or_none(features), masks, slice(None))

    def attend(
        self,
        gram: Tensor,
        features: Tensor | None,
        masks: AttentionMask,
        values: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """P, and the heads' weighted means of `values`, in chunks of queries.

        Parameters
        ----------
        gram, features
            As for :meth:`forward`.
        masks : AttentionMask
        values : Tensor, optional, shape (*batch, heads, N, k)
            Invariant values of the heads.
        chunk_size : int, optional
            Number of queries at a time.

        Returns
        -------
        mixing : Tensor, shape (*batch, N, N)
        means : Tensor, shape (*batch, heads, N, k), or None
        """
        check_features(gram, features, self.scores.units.features)
        inputs = (raised(gram), _raised_or_none(features), masks, values)
        with full_precision(gram):
            if chunk_size is None:
                return self._rows(*inputs, slice(None))
            parts = [
                recomputed(self._rows, *inputs, rows) for rows in chunks(gram.shape[-1], chunk_size)
            ]
        mixing = torch.cat([part[0] for part in parts], dim=-2)
        means = [part[1] for part in parts if part[1] is not None]
        return mixing, torch.cat(means, dim=-2) if means else None

    def _weights(
        self, gram: Tensor, features: Tensor | None, masks: AttentionMask, rows: slice
    ) -> Tensor:
        return masks.weights(self.scores(self.scale * gram, features, rows), rows)

    def _rows(
        self,
        gram: Tensor,
        features: Tensor | None,
        masks: AttentionMask,
        values: Tensor | None,
        rows: slice,
    ) -> tuple[Tensor, Tensor | None]:
        weights = self._weights(gram, features, masks, rows)
        mixed = torch.einsum("h,...hij->...ij", self.head_weights.to(weights.dtype), weights)
        return mixed, None if values is None else weights @ values


def with_identity(P: Tensor) -> Tensor:
    """``I + P``."""
    return P + torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)


def check_tokens(X: Tensor) -> None:
    """Raise unless X is a floating-point tensor of shape (*batch, N, d)."""
    check_floating("X", X)
    if X.ndim < 2 or 0 in X.shape[-2:]:
        raise ValueError(f"X must have shape (*batch, N, d), got {tuple(X.shape)}")


def check_features(gram: Tensor, features: Tensor | None, size: int) -> None:
    """Raise unless `features` are there exactly if `size` > 0 and have shape (*batch, N, size)."""
    wanted = (*gram.shape[:-1], size)
    if features is None:
        if size:
            raise ValueError(f"features of shape {wanted} are missing")
        return
    check_floating("features", features)
    if not size:
        raise ValueError(
            f"features were given, of shape {tuple(features.shape)}, but none are read"
        )
    if tuple(features.shape) != wanted:
        raise ValueError(f"features must have shape {wanted}, got {tuple(features.shape)}")


def _raised_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else raised(tensor)


MISSING_ONES = (
    "LayerNorm on Grams needs ones = X @ 1, shape (*batch, N): its centring is not a function of "
    "X @ X.mT. Pass ones=X.sum(-1), or use RMSNorm"
)


def rms_scales(gram: Tensor, width: int, eps: float) -> Tensor:
    """``1 / √(|x_i|²/d + ε)``, (*batch, N, N) -> (*batch, N)."""
    return (squared_norms(gram) / width + eps).rsqrt()


def scaled(gram: Tensor, scales: Tensor) -> Tensor:
    """``D G D`` with D = diag(scales): the Gram matrix of D X."""
    return scales.unsqueeze(-1) * gram * scales.unsqueeze(-2)


def centred(gram: Tensor, ones: Tensor, width: int) -> Tensor:
    """``G − c cᵀ/d`` with c = X 1: the Gram matrix of ``X (I − 11ᵀ/d)``."""
    return symmetric(gram - ones.unsqueeze(-1) * ones.unsqueeze(-2) / width)


def check_ones(ones: Tensor | None, gram: Tensor, width: int, *, values: bool = True) -> Tensor:
    """Raise ``ValueError`` unless `ones` can be ``X 1`` of tokens of width d with Gram `gram`.

    Besides its shape, and that it is there, ``⟨x_i, 1⟩² ≤ d |x_i|²`` is looked at, up to rounding,
    if `values` is set.
    """
    if ones is None:
        raise ValueError(MISSING_ONES)
    check_floating("ones", ones)
    if ones.shape != gram.shape[:-1]:
        raise ValueError(f"ones must have shape {tuple(gram.shape[:-1])}, got {tuple(ones.shape)}")
    if values and ones.numel():
        bound = width * squared_norms(gram.detach())
        slack = 1e4 * max(torch.finfo(gram.dtype).eps, torch.finfo(ones.dtype).eps)
        excess = ones.detach().square() > bound * (1 + slack) + slack * bound.amax()
        check_finite("ones", ones)
        if bool(excess.any()):
            raise ValueError(f"no tokens of width {width} have these ones: ⟨x, 1⟩² exceeds d |x|²")
    return ones


class RelationalRMSNorm(nn.Module):
    """``G_ij ↦ γ² G_ij / √((G_ii/d + ε)(G_jj/d + ε))``: RMS normalisation of the tokens.

    It reads the diagonal only, and is invariant under O(d). The gain γ is one number: gains of
    channels would break O(d) to signed permutations.

    Parameters
    ----------
    width : int
        d, the width of the tokens.
    eps : float
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, check: bool = True) -> None:
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.width, self.eps, self.check = check_size("width", width), eps, check
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, gram: Tensor) -> Tensor:
        """Gram matrix of the normalised tokens, (*batch, N, N) -> (*batch, N, N)."""
        check_gram(gram, values=self.check)
        with full_precision(gram):
            G = raised(gram)
            return scaled(G, self.scales(G)).to(gram.dtype)

    def lifted(self, X: Tensor) -> Tensor:
        """The same on tokens, ``γ x / √(|x|²/d + ε)``, for X (*batch, N, width)."""
        _check_width(X, self.width)
        x = raised(X)
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return (self.gain.to(x.dtype) * x * (mean_square + self.eps).rsqrt()).to(X.dtype)

    def scales(self, gram: Tensor) -> Tensor:
        """``γ / √(G_ii/d + ε)``, (*batch, N, N) -> (*batch, N)."""
        return self.gain.to(gram.dtype) * rms_scales(gram, self.width, self.eps)


class RelationalLayerNorm(nn.Module):
    """Layer normalisation of the tokens: centring, then :class:`RelationalRMSNorm`.

    Centring ``X ↦ X (I − 11ᵀ/d)`` singles out the vector 1 and is no function of G = XXᵀ. It needs
    the explicit row c = X 1 of inner products with 1, ``G ↦ G − c cᵀ/d``: this is the breaking of
    O(d) to the stabiliser O(d−1) of 1, under which c is invariant. The result is centred: its own
    row c is zero.

    Parameters
    ----------
    width : int
        d, the width of the tokens.
    eps : float
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, check: bool = True) -> None:
        super().__init__()
        self.rms = RelationalRMSNorm(width, eps, check=check)

    def forward(self, gram: Tensor, ones: Tensor | None = None) -> Tensor:
        """Gram matrix of the normalised tokens.

        Parameters
        ----------
        gram : Tensor, shape (*batch, N, N)
        ones : Tensor, shape (*batch, N)
            ``⟨x_i, 1⟩``. Required.

        Raises
        ------
        ValueError
            Without `ones`, or if ``⟨x_i, 1⟩² > d |x_i|²`` beyond rounding.
        """
        width = self.rms.width
        check_gram(gram, values=self.rms.check)
        ones = check_ones(ones, gram, width, values=self.rms.check)
        with full_precision(gram):
            K = centred(raised(gram), raised(ones), width)
            return scaled(K, self.rms.scales(K)).to(gram.dtype)

    def lifted(self, X: Tensor) -> Tensor:
        """The same on tokens X (*batch, N, width)."""
        _check_width(X, self.rms.width)
        x = raised(X)
        return self.rms.lifted(x - x.mean(dim=-1, keepdim=True)).to(X.dtype)


def _check_width(X: Tensor, width: int) -> None:
    check_tokens(X)
    if X.shape[-1] != width:
        raise ValueError(f"X must have shape (*batch, N, {width}), got {tuple(X.shape)}")


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
