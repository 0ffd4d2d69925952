"""From tokens to their Gram matrix, and from Gram matrices to tokens and numbers.

In reading order: `embed_tokens`, `tokens_of_gram` (up to O(d)) and `RelationalEmbedding`; readouts
of pairs, of tokens, of the whole set.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import compute_dtype, row_signs, wide
from quotientopt.nn.masks import AttentionMask
from quotientopt.nn.relational_invariants import (
    Dense,
    PairUnits,
    check_gram,
    check_size,
    chunks,
    full_precision,
    gram_of_tokens,
    perceptron,
    raised,
    recomputed,
    token_invariants,
)
from quotientopt.nn.relational_layers import check_features, check_tokens


def embed_tokens(X: Tensor) -> Tensor:
    """Gram matrix ``X Xᵀ`` of tokens, the canonical projection of R^{N×d} / O(d).

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)

    Returns
    -------
    Tensor, shape (*batch, N, N)
        In the dtype of X, symmetric to the last bit.
    """
    check_tokens(X)
    with full_precision(X):
        return gram_of_tokens(raised(X)).to(X.dtype)


def tokens_of_gram(gram: Tensor, width: int, *, check: bool = True) -> Tensor:
    """The dressed tokens of a Gram matrix: X with ``X Xᵀ = G`` along its principal axes.

    ``X = U √Λ`` from the eigenvectors of G of largest eigenvalue. Columns come in decreasing
    length; in each the entry of largest modulus is positive. Of all tokens with this Gram matrix,
    which differ by O(d), it is the representative of ``qo.sections.gram_svd``.

    Derivatives by autograd need distinct eigenvalues, and N ≤ `width` or those beyond `width` apart
    from the others.

    Parameters
    ----------
    gram : Tensor, shape (*batch, N, N)
    width : int
        d. Columns beyond N are zero.
    check : bool
        Whether to refuse Gram matrices that no tokens of this width have; waits for the device.

    Returns
    -------
    Tensor, shape (*batch, N, width)

    Raises
    ------
    ValueError
        If G is not symmetric, has an eigenvalue below zero beyond rounding
        (``−100 N ε max λ``), or more than `width` above.
    """
    check_size("width", width)
    check_gram(gram, values=check)
    values, vectors = torch.linalg.eigh(wide(gram))
    values, vectors = values.flip(-1), vectors.flip(-1)
    if check and gram.numel():
        eps = torch.finfo(gram.dtype).eps
        floor = 100 * gram.shape[-1] * eps * values[..., :1].clamp_min(0)
        least = values[..., -1:]
        if bool((least < -floor).any()):
            raise ValueError(
                f"Gram matrix is not positive semidefinite (least eigenvalue {least.min():.3g}): "
                "no tokens have it"
            )
        rank = int((values > floor).sum(dim=-1).max())
        if rank > width:
            raise ValueError(f"Gram matrix has rank {rank}: no tokens of width {width} have it")
    kept = values[..., :width].clamp_min(0)
    # A root at zero has no derivative; a zero column has none to give.
    positive = kept > 0
    roots = torch.where(positive, torch.where(positive, kept, 1).sqrt(), 0)
    X = vectors[..., :width] * roots.unsqueeze(-2)
    X = X * row_signs(X.detach().mT).mT
    missing = width - X.shape[-1]
    if missing > 0:
        X = torch.cat((X, X.new_zeros(*X.shape[:-1], missing)), dim=-1)
    return X.to(gram.dtype)


class RelationalEmbedding(nn.Module):
    """Sequences of token numbers as Gram matrices, and inner products with the vocabulary.

    Tokens are ``x_i = e(t_i) + p_i`` with learned vectors e of the vocabulary and, if wanted, p of
    the positions. Only their inner products leave the layer, so that rotating all learned vectors
    together changes nothing.

    Parameters
    ----------
    vocabulary : int
        Number of token types.
    width : int
        d.
    max_positions : int, optional
        Number of position vectors; by default there are none, and order enters through the position
        bias of the attention, if at all.
    check : bool
        Whether to look at the token numbers, which waits for the device.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        max_positions: int | None = None,
        *,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.check = check
        self.vocabulary, self.width = (
            check_size("vocabulary", vocabulary),
            check_size("width", width),
        )
        self.tokens = nn.Parameter(torch.randn(vocabulary, width))
        self.positions: nn.Parameter | None = None
        if max_positions is not None:
            check_size("max_positions", max_positions)
            self.positions = nn.Parameter(torch.randn(max_positions, width))

    def forward(self, ids: Tensor) -> Tensor:
        """``⟨x_i, x_j⟩``, (*batch, N) -> (*batch, N, N)."""
        return embed_tokens(self.lifted(ids))

    def lifted(self, ids: Tensor) -> Tensor:
        """The tokens themselves, (*batch, N) -> (*batch, N, width)."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"token numbers must be integers, got {ids.dtype}")
        if ids.ndim == 0 or ids.shape[-1] == 0:
            raise ValueError(f"token numbers must have shape (*batch, N), got {tuple(ids.shape)}")
        if (
            self.check
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary
        ):
            raise ValueError(
                f"token numbers must lie in 0 … {self.vocabulary - 1}, "
                f"got {int(ids.min())} … {int(ids.max())}"
            )
        X = functional.embedding(ids.long(), self.tokens)
        if self.positions is None:
            return X
        if ids.shape[-1] > len(self.positions):
            raise ValueError(f"{ids.shape[-1]} tokens, but max_positions is {len(self.positions)}")
        return X + self.positions[: ids.shape[-1]]

    def references(self, ids: Tensor) -> Tensor:
        """``⟨x_i, e_v⟩`` with every token type v, (*batch, N) -> (*batch, N, vocabulary).

        A :class:`RelationalTransformer` carries them along, and those of its result are the logits
        of an output head tied to the embedding.
        """
        with full_precision(self.tokens):
            return self.lifted(ids) @ self.tokens.mT

    def ones(self, ids: Tensor) -> Tensor:
        """``⟨x_i, 1⟩``, which layer normalisation needs, (*batch, N) -> (*batch, N)."""
        X = self.lifted(ids)
        return X.to(compute_dtype(X.dtype)).sum(dim=-1).to(X.dtype)


POOLS = ("sum", "mean")


class PairReadout(nn.Module):
    """A learned function of the invariants of a pair: ``y(i, j) = ψ(ι(i, j), f_i, f_j)``.

    ψ has two hidden layers. The N × N × hidden numbers are held at once.

    Parameters
    ----------
    out : int
        Numbers per pair.
    hidden : int
        Width of the hidden layers.
    features : int
        Number of invariant features of a token, or 0.
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(
        self, out: int, *, hidden: int = 32, features: int = 0, check: bool = True
    ) -> None:
        super().__init__()
        self.check = check
        self.units = PairUnits(hidden, features)
        self.function = perceptron(hidden, hidden, check_size("out", out))

    def forward(self, gram: Tensor, features: Tensor | None = None) -> Tensor:
        """(*batch, N, N), (*batch, N, features) -> (*batch, N, N, out), at least float32."""
        check_gram(gram, values=self.check)
        check_features(gram, features, self.units.features)
        with full_precision(gram):
            return self.rows(raised(gram), features)

    def rows(self, gram: Tensor, features: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """Of the pairs whose first token is in `rows`, (*batch, n, N, out)."""
        return self.function(self.units(gram, features, rows))


class TokenReadout(nn.Module):
    """``y_i = Σ_{j≠i} ψ(ι(i, j), f_i, f_j) + φ(|x_i|, f_i)``, permutation-equivariant.

    Parameters
    ----------
    out : int
        Numbers per token.
    hidden : int
        Width of the hidden layers of ψ and φ.
    features : int
        Number of invariant features of a token, or 0.
    pool : "sum" or "mean"
        Whether ψ is summed over the other tokens or averaged.
    causal : bool
        Whether j is earlier than i only.
    check : bool
        Whether to look at the entries, as in :class:`RelationalAttention`.
    """

    def __init__(
        self,
        out: int,
        *,
        hidden: int = 32,
        features: int = 0,
        pool: str = "sum",
        causal: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
        self.pool, self.causal, self.check = pool, causal, check
        self.pairs = PairReadout(hidden, hidden=hidden, features=features, check=False)
        self.head = Dense(hidden, check_size("out", out))
        self.single = perceptron(1 + features, hidden, out)

    def forward(
        self,
        gram: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Numbers of every token, in at least float32.

        Parameters
        ----------
        gram : Tensor, shape (*batch, N, N)
        features : Tensor, optional, shape (*batch, N, features)
        mask : Tensor, optional, broadcastable to (*batch, N, N)
            Where it is false, or −∞, i does not read j.
        key_padding_mask : Tensor of bool, optional, broadcastable to (*batch, N)
            True for tokens that the others do not read.
        chunk_size : int, optional
            Number of tokens i at a time; by default all, at N × N × hidden numbers.

        Returns
        -------
        Tensor, shape (*batch, N, out)
        """
        check_gram(gram, values=self.check)
        check_features(gram, features, self.pairs.units.features)
        masks = AttentionMask(gram, mask, key_padding_mask, self.causal)
        size = gram.shape[-1]
        with full_precision(gram):
            G = raised(gram)
            others = ~torch.eye(size, dtype=torch.bool, device=G.device)
            allowed = masks.allowed(slice(None))
            if allowed is not None:
                others = others & allowed
            inputs = (G, features, others)
            if chunk_size is None:
                sums = self._sums(*inputs, slice(None))
            else:
                parts = [recomputed(self._sums, *inputs, part) for part in chunks(size, chunk_size)]
                sums = torch.cat(parts, dim=-2)
            if self.pool == "mean":
                sums = sums / others.sum(dim=-1).clamp_min(1).unsqueeze(-1)
            single = token_invariants(G)
            if features is not None:
                single = torch.cat((single, features.to(single.dtype)), dim=-1)
            return self.head(sums) + self.single(single)

    def _sums(self, gram: Tensor, features: Tensor | None, others: Tensor, rows: slice) -> Tensor:
        return (self.pairs.rows(gram, features, rows) * others[..., rows, :, None]).sum(dim=-2)


class PooledReadout(nn.Module):
    """Sum or mean over the tokens of a :class:`TokenReadout`: permutation-invariant.

    Scalars such as energies (`pool` "sum": they grow with the number of tokens), class logits
    ("mean"). The sum over tokens of their sums over others holds every sum over pairs.

    Parameters
    ----------
    out, hidden, features, pool, causal, check
        As for :class:`TokenReadout`; `pool` holds for both sums.
    """

    def __init__(
        self,
        out: int,
        *,
        hidden: int = 32,
        features: int = 0,
        pool: str = "sum",
        causal: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = TokenReadout(
            out, hidden=hidden, features=features, pool=pool, causal=causal, check=check
        )

    def forward(
        self,
        gram: Tensor,
        features: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Numbers of the set, (*batch, out), in at least float32; arguments as for tokens."""
        values = self.tokens(
            gram,
            features,
            mask=mask,
            key_padding_mask=key_padding_mask,
            chunk_size=chunk_size,
        )
        count: Tensor | int = gram.shape[-1]
        if key_padding_mask is not None:
            keep = ~key_padding_mask.unsqueeze(-1)
            values = values * keep
            count = keep.sum(dim=-2).clamp_min(1)
        total = values.sum(dim=-2)
        return total / count if self.tokens.pool == "mean" else total
