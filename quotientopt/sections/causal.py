"""The LQ decomposition ``X = L Q`` of token matrices, one token after the other.

Row i of L reads the inner products of the tokens up to i and nothing else: among all sections of
R^{N×d} / O(d) by a formula it is the one that a causal model can use. Here this holds to the last
bit, whatever comes later, in whatever batch, and on whatever device: tokens are brought to their
coordinates by Householder reflections, of which every operation is one of IEEE's correctly rounded
ones on each token by itself, sums being taken in a fixed order. A blocked decomposition of LAPACK
or a matrix product rounds differently when rows are appended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 64
"""Tokens taken at a time on the processor, so that they stay in its caches."""


class CausalAxes(NamedTuple):
    """What later tokens need to know of earlier ones: axes, one for each independent token.

    Attributes
    ----------
    reflectors : Tensor, shape (*batch, k, d)
        v with ``|v|² = 2`` of the reflections ``x ↦ x − ⟨x, v⟩ v``, in the order in which they act;
        zero where a batch item has fewer.
    signs : Tensor, shape (*batch, d)
        Of the axes, so that the diagonal of L is positive.
    rank : Tensor, shape (*batch, 1, 1)
        Number of axes, an integer.
    """

    reflectors: Tensor
    signs: Tensor
    rank: Tensor

    @classmethod
    def none(cls, X: Tensor) -> CausalAxes:
        """Those of no tokens at all, like `X` (*batch, N, d)."""
        batch, size = X.shape[:-2], X.shape[-1]
        rank = torch.zeros(*batch, 1, 1, dtype=torch.long, device=X.device)
        return cls(X.new_zeros(*batch, 0, size), X.new_ones(*batch, size), rank)


class CausalLQ(NamedTuple):
    """What :func:`causal_lq` finds.

    Attributes
    ----------
    tokens : Tensor, shape (*batch, N, d)
        L, with columns of zeros past the rank.
    axes : CausalAxes
        Of these tokens and those before them.
    distance : Tensor, shape (*batch, N)
        Of each token from the span of those before it, over its length; zero where it depends on
        them, infinite where they span all of R^d.
    """

    tokens: Tensor
    axes: CausalAxes
    distance: Tensor


def causal_lq(
    X: Tensor, axes: CausalAxes | None = None, *, floor: float, stop_early: bool = True
) -> CausalLQ:
    """L of ``X = L Q``, rows of Q orthonormal, L lower triangular with positive diagonal.

    A token in the span of those before it has no axis of its own, and the next independent one has
    the next column: L is in echelon form. Any N and d. Once there are d axes, L is no longer
    triangular but the coordinates in them.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
        No gradients are taken: see :func:`differentiable_lq`.
    axes : CausalAxes, optional
        Of the tokens before these.
    floor : float
        A token counts as dependent if its distance from the span is at most `floor` times its
        length.
    stop_early : bool
        Whether to look when all of R^d is spanned, which waits for the device, rather than to go
        through all tokens.
    """
    axes = CausalAxes.none(X) if axes is None else axes
    tokens, distances = [], []
    for part in X.split(_ROWS if X.device.type == "cpu" else X.shape[-2], dim=-2):
        found = _next_tokens(part, axes, floor, stop_early)
        axes = found.axes
        tokens.append(found.tokens)
        distances.append(found.distance)
    return CausalLQ(torch.cat(tokens, dim=-2), axes, torch.cat(distances, dim=-1))


def _next_tokens(X: Tensor, axes: CausalAxes, floor: float, stop_early: bool) -> CausalLQ:
    """:func:`causal_lq` in one piece."""
    size = X.shape[-1]
    columns = torch.arange(size, device=X.device)
    signs, rank = axes.signs, axes.rank
    rest = _reflected(X, axes.reflectors)
    lengths = _row_sums(X * X).sqrt()
    rows, ranks, found, distances = [], [], [], []
    for index in range(X.shape[-2]):
        if stop_early and index + axes.reflectors.shape[-2] >= size and bool((rank == size).all()):
            break
        row = rest[..., :1, :]
        tail = torch.where(columns >= rank, row, 0)
        distance = _row_sums(tail * tail).sqrt()
        independent = (distance > floor * lengths[..., index : index + 1, :]) & (rank < size)
        own = columns == rank
        first = torch.where(own, row, 0).sum(dim=-1, keepdim=True)  # one term: exact
        sign = torch.where(first < 0, -1.0, 1.0).to(X.dtype)
        reflector = torch.where(own, tail + sign * distance, tail)
        root = (distance * (distance + first.abs())).sqrt()
        reflector = torch.where(independent, reflector / torch.where(independent, root, 1), 0)
        rest = _reflect(rest, reflector)
        rows.append(rest[..., :1, :])
        rest = rest[..., 1:, :]
        signs = torch.where((independent & own).squeeze(-2), -sign.squeeze(-2), signs)
        open_space = rank < size
        rank = rank + independent
        found.append(reflector)
        ranks.append(rank)
        length = lengths[..., index : index + 1, :]
        share = distance / torch.where(length > 0, length, 1)
        share = torch.where(independent, share, torch.where(open_space, 0, torch.inf))
        distances.append(share.squeeze(-1))
    remaining = rest.shape[-2]
    ranks.append(rank.expand(*rank.shape[:-2], remaining, 1))
    distances.append(X.new_full((*X.shape[:-2], remaining), torch.inf))
    tokens = torch.cat((*rows, rest), dim=-2)
    tokens = torch.where(columns < torch.cat(ranks, dim=-2), signs.unsqueeze(-2) * tokens, 0)
    reflectors = torch.cat((axes.reflectors, *found), dim=-2)
    return CausalLQ(
        tokens,
        CausalAxes(_compressed(reflectors, size), signs, rank),
        torch.cat(distances, dim=-1),
    )


def orthogonal_factor(axes: CausalAxes) -> Tensor:
    """Q, orthogonal of shape (*batch, d, d): the axes as rows, and past the rank a complement.

    ``H_1 ⋯ H_k = I − Rᵀ T R`` for reflectors R, with T the inverse of I plus the strict upper
    triangle of ``R Rᵀ`` (Schreiber & Van Loan 1989): by matrix products, equal to rounding.
    """
    R = axes.reflectors
    size = R.shape[-1]
    inverse = (R @ R.mT).triu(1) + torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)
    product = R.mT @ torch.linalg.solve_triangular(inverse, R, upper=True)
    identity = torch.eye(size, dtype=R.dtype, device=R.device)
    return (axes.signs.unsqueeze(-2) * (identity - product)).mT


def differentiable_lq(X: Tensor, found: CausalLQ) -> tuple[Tensor, Tensor]:
    """L and Q as functions of X, of shapes (*batch, N, d) and (*batch, d, d).

    With ``M = L₁^{-1} dX₁ Qᵀ`` of the independent tokens X₁, ``K`` its strictly upper triangle less
    the transposed: ``dL = dX Qᵀ − L K``. Entries that are zero for every X stay zero, so that the
    gradient of a function of the first tokens is exactly zero at later ones. What a dependent token
    would add outside the span of those before it is left out. Rows of Q past the rank are
    constants. Differentiable to any order.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
    found : CausalLQ
        Of X, without tokens before it.
    """
    rank = found.axes.rank
    size = X.shape[-1]
    kept = min(X.shape[-2:])
    independent = (found.distance > 0) & torch.isfinite(found.distance)
    pivots = _first(independent)[..., :kept].unsqueeze(-1)
    present = (torch.arange(kept, device=X.device) < rank.squeeze(-1)).unsqueeze(-1)
    columns = torch.arange(kept, device=X.device)
    allowed = columns < independent.cumsum(dim=-1).unsqueeze(-1)
    Q = orthogonal_factor(found.axes)
    axes = torch.where(present, Q[..., :kept, :], 0)
    tokens, leading = _LQ.apply(X, found.tokens[..., :kept], axes, pivots, present, allowed)
    leading = torch.where(present, leading, Q[..., :kept, :])
    Q = torch.cat((leading, Q[..., kept:, :]), dim=-2)
    return functional.pad(tokens, (0, size - kept)), Q


class _LQ(torch.autograd.Function):
    """(L, Q) of X, given them, with the places of independent tokens and of entries."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        X: Tensor, L: Tensor, Q: Tensor, pivots: Tensor, present: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor]:
        return L.clone(), Q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output, *inputs[3:])
        ctx.save_for_forward(*output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        L, Q, pivots, present, allowed = ctx.saved_tensors
        along = torch.where(allowed, gradients[0], 0)
        turning = gradients[1] @ Q.mT - L.mT @ along
        inner = (turning - turning.mT).triu(1)
        moved = inner @ Q + gradients[1] - gradients[1] @ Q.mT @ Q
        moved = torch.linalg.solve_triangular(
            _independent_rows(L, pivots, present).mT, moved, upper=True
        )
        moved = torch.where(present, moved, 0)
        whole = along @ Q
        index = pivots.expand(moved.shape)
        return whole.scatter_add(-2, index, moved), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        L, Q, pivots, present, allowed = ctx.saved_tensors
        change = tangents[0]
        rows = change.gather(-2, pivots.expand(*pivots.shape[:-1], change.shape[-1]))
        rows = torch.linalg.solve_triangular(
            _independent_rows(L, pivots, present), torch.where(present, rows, 0), upper=False
        )
        inner = (rows @ Q.mT).triu(1)
        turning = inner - inner.mT
        moved = torch.where(allowed, change @ Q.mT - L @ turning, 0)
        return moved, turning @ Q + rows - rows @ Q.mT @ Q


def _independent_rows(L: Tensor, pivots: Tensor, present: Tensor) -> Tensor:
    """The invertible triangular block of L, the identity where tokens are missing."""
    rows = L.gather(-2, pivots.expand(*pivots.shape[:-1], L.shape[-1]))
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.where(present, rows, identity)


def _row_sums(X: Tensor) -> Tensor:
    """Sums over the last axis, kept, by halving: the order depends on its length alone."""
    X = functional.pad(X, (0, (1 << (X.shape[-1] - 1).bit_length()) - X.shape[-1]))
    while X.shape[-1] > 1:
        half = X.shape[-1] // 2
        X = X[..., :half] + X[..., half:]
    return X


def _reflect(X: Tensor, v: Tensor) -> Tensor:
    """``x − ⟨x, v⟩ v`` for every row of X, in two roundings, never in a fused one."""
    return X - _row_sums(X * v) * v


def _reflected(X: Tensor, reflectors: Tensor) -> Tensor:
    for index in range(reflectors.shape[-2]):
        X = _reflect(X, reflectors[..., index : index + 1, :])
    return X


def _first(flags: Tensor) -> Tensor:
    """Indices of the true entries of the last axis, in order, then of the others."""
    return torch.argsort((~flags).to(torch.uint8), dim=-1, stable=True)


def _compressed(reflectors: Tensor, size: int) -> Tensor:
    """At most `size` reflectors, without those that are zero where there is no need to."""
    if reflectors.shape[-2] <= size:
        return reflectors
    order = _first((reflectors != 0).any(dim=-1))[..., :size].unsqueeze(-1)
    return reflectors.gather(-2, order.expand(*order.shape[:-1], size))
