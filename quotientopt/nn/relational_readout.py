"""From Gram matrices to numbers: of pairs, of tokens, of the whole set."""

import torch
from torch import Tensor, nn

from quotientopt.nn.relational_arithmetic import (
    Dense,
    check_size,
    chunks,
    full_precision,
    perceptron,
    raised,
    recomputed,
)
from quotientopt.nn.relational_attention import check_features
from quotientopt.nn.relational_invariants import check_gram, token_invariants
from quotientopt.nn.relational_masks import AttentionMask
from quotientopt.nn.relational_scores import PairUnits

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
