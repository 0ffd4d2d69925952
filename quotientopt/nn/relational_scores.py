"""Learned functions of the O(d)-invariants of pairs of tokens: hidden units, attention scores."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.nn.relational_arithmetic import Dense, check_size
from quotientopt.nn.relational_invariants import PAIR_INVARIANTS, pair_invariants


class PairUnits(nn.Module):
    """``silu(W ι(i, j) + b + U f_i + V f_j)``.

    ι are the five invariants of :func:`pair_invariants`, f_i invariant features of token i.

    Parameters
    ----------
    hidden : int
        Number of units.
    features : int
        Number of invariant features of a token, or 0.
    """

    def __init__(self, hidden: int, features: int = 0) -> None:
        super().__init__()
        check_size("features", features, least=0)
        self.features = features
        self.pair = Dense(PAIR_INVARIANTS, check_size("hidden", hidden))
        self.first = Dense(features, hidden, bias=False) if features else None
        self.second = Dense(features, hidden, bias=False) if features else None

    def forward(self, gram: Tensor, features: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """Units of the pairs whose first token is in `rows`, (*batch, n, N, hidden)."""
        units = self.pair(pair_invariants(gram, rows))
        if self.first is not None and self.second is not None and features is not None:
            features = features.to(units.dtype)
            units = units + self.first(features[..., rows, :]).unsqueeze(-2)
            units = units + self.second(features).unsqueeze(-3)
        return functional.silu(units)


class InvariantScores(nn.Module):
    """``s_h(i, j) = Σ_k W_hk u_k(i, j) + b_h(j − i)`` with the units u of :class:`PairUnits`.

    Parameters
    ----------
    heads : int
    hidden : int
        Number of units, shared by the heads.
    features : int
        Number of invariant features of a token, or 0.
    max_relative_position : int, optional
        Largest |j − i| that the position bias b tells apart; by default there is no bias.
    """

    def __init__(
        self,
        heads: int,
        hidden: int = 16,
        features: int = 0,
        max_relative_position: int | None = None,
    ) -> None:
        super().__init__()
        self.units = PairUnits(hidden, features)
        self.score = Dense(hidden, check_size("heads", heads), bias=False)
        self.position_bias: nn.Parameter | None = None
        if max_relative_position is not None:
            check_size("max_relative_position", max_relative_position)
            self.position_bias = nn.Parameter(torch.zeros(heads, 2 * max_relative_position + 1))

    def forward(
        self, gram: Tensor, features: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Scores of the queries in `rows`, (*batch, heads, n, N)."""
        scores = self.score(self.units(gram, features, rows)).movedim(-1, -3)
        if self.position_bias is not None:
            positions = torch.arange(gram.shape[-1], device=gram.device)
            limit = self.position_bias.shape[-1] // 2
            offsets = (positions - positions[rows, None]).clamp(-limit, limit) + limit
            scores = scores + self.position_bias.to(scores.dtype)[:, offsets]
        return scores
