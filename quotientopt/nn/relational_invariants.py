"""O(d)-invariants of tokens read off their Gram matrix, and how Gram matrices move.

The tokens X ∈ R^{N×d} enter only as G = X Xᵀ, so that X and X Qᵀ are the same thing and d is never
seen.
"""

import torch
from torch import Tensor

from quotientopt._linalg import check_finite, check_floating

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
