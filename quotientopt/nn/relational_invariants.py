"""O(d)-invariants of tokens read off their Gram matrix, and what is learned from them.

The tokens X ∈ R^{N×d} enter only as G = X Xᵀ, so that X and X Qᵀ are the same thing and d is never
seen. In reading order: precision (in at least float32, outside autocast) and what else the
relational layers share; invariants of tokens and of pairs, and how Gram matrices move; learned
functions of pairs, `PairUnits` and `InvariantScores`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quotientopt._linalg import check_finite, check_floating, compute_dtype

Result = TypeVar("Result")


class Dense(nn.Linear):
    """``x Wᵀ + b`` in the precision of `x`, whatever the dtype in which W and b are stored."""

    def forward(self, input: Tensor) -> Tensor:
        """Map the last axis of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class Standardize(nn.LayerNorm):
    """Layer normalisation of invariant features in the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of `input`."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear maps around a SiLU, which is smooth, as gradients of scores should be."""
    return nn.Sequential(Dense(inputs, hidden), nn.SiLU(), Dense(hidden, outputs))


def raised(tensor: Tensor) -> Tensor:
    """`tensor` in the precision in which it is computed with: float64, or float32."""
    return tensor.to(compute_dtype(tensor.dtype))


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """Switch autocast off: products of Gram matrices lose their symmetry and sign in bfloat16."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield


def chunks(size: int, chunk_size: int) -> list[slice]:
    """Slices of `chunk_size` rows that cover ``range(size)``."""
    check_size("chunk_size", chunk_size)
    return [slice(start, min(start + chunk_size, size)) for start in range(0, size, chunk_size)]


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, whose intermediate results are not kept for the backward pass."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def check_scale(scale: float) -> None:
    """Raise ``ValueError`` unless `scale` is a positive number."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")


def check_size(name: str, value: object, least: int = 1) -> int:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


PAIR_INVARIANTS = 5
"""Inner product, cosine, distance, and the norms of the first and of the second token."""

TINY = 1e-8
"""Added to squared norms under roots, which have no derivative at zero."""

SOFTNESS = 1e-6
"""Share of the squared norms of a pair that is added to its squared distance under the root."""

MOST_ASYMMETRY = 0.05


def check_gram(gram: Tensor, name: str = "Gram matrix", *, values: bool = True) -> None:
    """Raise unless `gram` can be a Gram matrix of tokens.

    Parameters
    ----------
    gram : Tensor, shape (*batch, N, N)
    name : str
        What to call it in the message.
    values : bool
        Whether to look at the entries too, which waits for the device. Positive semidefiniteness is
        looked for on the diagonal only; :func:`tokens_of_gram` looks at the eigenvalues.

    Raises
    ------
    TypeError
        If the dtype is not floating-point.
    ValueError
        If it is not square or empty, has non-finite entries, is not symmetric up to rounding
        (``|G − Gᵀ| ≤ min(1000 ε, 0.05) max |G|``) or has a negative diagonal beyond it.
    """
    check_floating(name, gram)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (*batch, N, N), got {tuple(gram.shape)}")
    if not values or gram.numel() == 0:
        return
    check_finite(name, gram)
    entries = gram.detach()
    largest = entries.abs().amax(dim=(-2, -1))
    slack = largest * min(1000 * torch.finfo(gram.dtype).eps, MOST_ASYMMETRY)
    if bool(((entries - entries.mT).abs().amax(dim=(-2, -1)) > slack).any()):
        raise ValueError(f"{name} is not symmetric up to rounding: pass X @ X.mT or (G + G.mT) / 2")
    if bool((entries.diagonal(dim1=-2, dim2=-1).amin(dim=-1) < -slack).any()):
        raise ValueError(f"{name} has a negative squared norm on its diagonal: no tokens have it")


def gram_of_tokens(X: Tensor) -> Tensor:
    """``X Xᵀ`` of X (*batch, N, d), in the precision of X and symmetric to the last bit."""
    return symmetric(X @ X.mT)


def symmetric(matrix: Tensor) -> Tensor:
    """``(M + Mᵀ) / 2``."""
    return (matrix + matrix.mT) / 2


def congruence(M: Tensor, gram: Tensor) -> Tensor:
    """``M G Mᵀ``: the Gram matrix of M X, positive semidefinite where G is."""
    return symmetric(M @ gram @ M.mT)


def squared_norms(gram: Tensor) -> Tensor:
    """``|x_i|²``, the diagonal, (*batch, N, N) -> (*batch, N); negative rounding becomes zero."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0)


def norms(gram: Tensor) -> Tensor:
    """``√(|x_i|² + 1e-8)``, (*batch, N, N) -> (*batch, N), smooth also at zero tokens."""
    return (squared_norms(gram) + TINY).sqrt()


def token_invariants(gram: Tensor) -> Tensor:
    """All that O(d) leaves of a single token, its norm, as ``log(1 + |x_i|)``.

    (*batch, N, N) -> (*batch, N, 1).
    """
    return norms(gram).log1p().unsqueeze(-1)


def pair_invariants(gram: Tensor, rows: slice = slice(None)) -> Tensor:
    """All that O(d) leaves of a pair of tokens, in five numbers.

    ``⟨x_i, x_j⟩``, cosine, ``|x_i − x_j|``, ``|x_i|`` and ``|x_j|``. They depend on each other; the
    five of them spare the learned functions divisions and roots. Distances are
    ``√(|x_i − x_j|² + 1e-6 (|x_i|² + |x_j|²) + 1e-8)``: the root of a difference that is zero on
    the diagonal would have no derivative there and would magnify rounding.

    Parameters
    ----------
    gram : Tensor, shape (*batch, N, N)
    rows : slice
        The i for which they are wanted.

    Returns
    -------
    Tensor, shape (*batch, n, N, 5)
        n the number of rows.
    """
    inner = gram[..., rows, :]
    squared, norm = squared_norms(gram), norms(gram)
    sums = squared[..., rows].unsqueeze(-1) + squared.unsqueeze(-2)
    first = norm[..., rows].unsqueeze(-1).expand_as(inner)
    second = norm.unsqueeze(-2).expand_as(inner)
    distance = ((sums - 2 * inner).clamp_min(0) + SOFTNESS * sums + TINY).sqrt()
    return torch.stack((inner, inner / (first * second), distance, first, second), dim=-1)


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
