"""From tokens to their Gram matrix and back, up to O(d)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import compute_dtype, row_signs, wide
from quotientopt.nn.relational_arithmetic import check_size, full_precision, raised
from quotientopt.nn.relational_attention import check_tokens
from quotientopt.nn.relational_invariants import check_gram, gram_of_tokens


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
