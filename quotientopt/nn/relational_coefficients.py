"""A residual stream kept as the coefficients of what was written to it, and Grams of rows.

Tokens ``x = Σ c_a w_a`` are read through ``⟨x, w⟩ = Σ c_a ⟨w_a, w⟩``: what the relational form of
an ordinary model runs on (:mod:`quotientopt.nn.relational_form`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quotientopt._linalg import wide
from quotientopt.models.attention import rotate
from quotientopt.nn.masks import merge_masks
from quotientopt.nn.relational_plan import ONES, Attend, Perceive, PlannedNorm

Rotation = tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """What of a model's weights is invariant: everything its relational form computes with.

    Attributes
    ----------
    grams : dict of (str, str) to Tensor
        Inner products of two stacks of rows, by their names.
    squares : dict of str to Tensor
        ``⟨w, w⟩`` of rows that are written one at a time (embeddings).
    offsets : dict of str to Tensor
        Biases of hidden axes, those of norms folded in.
    """

    grams: dict[tuple[str, str], Tensor]
    squares: dict[str, Tensor]
    offsets: dict[str, Tensor]


class JointGram(NamedTuple):
    """The Gram matrix of tokens and rows, in its parts: what a form without embeddings takes.

    Attributes
    ----------
    tokens : Tensor, shape (*batch, N, N)
        ``⟨x_i, x_j⟩``.
    products : Tensor, shape (*batch, N, M)
        ``⟨x_i, w⟩`` with the M rows of :attr:`RelationalForm.rows`, in their order.
    weights : Weights, optional
        Of the rows; by default those the form was made with.
    """

    tokens: Tensor
    products: Tensor
    weights: Weights | None = None


class Term(NamedTuple):
    """``Σ c_a w_a``: coefficients of a stack; of one row each, by index; or of the input tokens."""

    name: str | None
    coefficients: Tensor
    rows: Tensor | None = None


class CoefficientStream:
    """Tokens as terms, with ``⟨x, x⟩`` carried along."""

    def __init__(self, grams: RowGrams, width: int) -> None:
        self.grams, self.width = grams, width
        self.terms: list[Term] = []
        self.squares = torch.empty(0)
        self.record: dict[tuple[str, str], Tensor] | None = None
        self._given: JointGram | None = None
        self._slices: dict[str, slice] = {}

    def begin(self, given: JointGram, rows: Mapping[str, int]) -> None:
        """Start from tokens of which the inner products are given."""
        self._given = given
        self.squares = given.tokens.diagonal(dim1=-2, dim2=-1)
        self.terms = [Term(None, torch.ones_like(self.squares).unsqueeze(-1))]
        self._slices = dict(zip(rows, slices_of(rows), strict=True))

    def embed(self, name: str, index: Tensor) -> None:
        """Add the row of that number to every token."""
        square = self.grams.square(name)[index]
        if self.terms:
            cross = self.read(name).gather(-1, index.unsqueeze(-1)).squeeze(-1)
            self.squares = self.squares + 2 * cross + square
        else:
            self.squares = square
        ones = torch.ones_like(self.squares).unsqueeze(-1)
        self.terms.append(Term(name, ones, index))

    def read(self, name: str) -> Tensor:
        """``⟨x, w⟩`` with a stack of rows, (*batch, N, m)."""
        parts = [self._part(term, name) for term in self.terms]
        if self.record is not None:
            for term, part in zip(self.terms, parts, strict=True):
                key = ("input" if term.name is None else term.name, name)
                self.record[key] = part.detach().square().mean().sqrt()
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def reading(self, norm: PlannedNorm | None) -> Callable[[str], Tensor]:
        """How a layer behind that norm reads rows, its offsets added."""
        if norm is None:
            return lambda name: self._with_offset(name, self.read(name))
        scale, mean = self._scale(norm)

        def read(name: str) -> Tensor:
            products = self.read(name)
            if mean is not None:
                products = products - mean * self.grams.gram(ONES, name)
            return self._with_offset(name, scale * products)

        return read

    def write(self, name: str, coefficients: Tensor) -> None:
        """``x + Σ c_a w_a``."""
        if self.terms:
            self.squares = self.squares + 2 * (coefficients * self.read(name)).sum(-1)
        among = self.grams.applied(coefficients, name, name)
        self.squares = self.squares + (coefficients * among).sum(-1)
        self.terms.append(Term(name, coefficients))

    def normalise(self, norm: PlannedNorm) -> None:
        """Normalise the stream itself."""
        scale, mean = self._scale(norm)
        scale = norm.gain * scale
        squares = self.squares if mean is None else self.squares - self.width * mean[..., 0] ** 2
        self.terms = [t._replace(coefficients=scale * t.coefficients) for t in self.terms]
        self.squares = scale[..., 0] ** 2 * squares
        if mean is not None:
            self.terms.append(Term(ONES, -scale * mean))
        if norm.shift is not None:
            self.write(norm.shift, torch.ones_like(scale))

    def gram(self) -> Tensor:
        """Inner products of the tokens with each other."""
        total = torch.zeros(())
        for term in self.terms:
            if term.name is not None:
                products = self.read(term.name) @ term.coefficients.mT
            else:
                assert self._given is not None
                products = torch.zeros(())
                for other in self.terms:
                    if other.name is None:
                        part = other.coefficients * self._given.tokens
                    else:
                        inner = self._given.products[..., self._slices[other.name]]
                        part = other.coefficients @ inner.mT
                    products = products + part
                products = products * term.coefficients.mT
            total = total + products
        return (total + total.mT) / 2

    def _part(self, term: Term, name: str) -> Tensor:
        if term.name is None:
            assert self._given is not None
            return term.coefficients * self._given.products[..., self._slices[name]]
        if term.rows is not None:
            return term.coefficients * self.grams.picked(term.rows, term.name, name)
        return self.grams.applied(term.coefficients, term.name, name)

    def _with_offset(self, name: str, products: Tensor) -> Tensor:
        offset = self.grams.offsets.get(name)
        return products if offset is None else products + offset

    def _scale(self, norm: PlannedNorm) -> tuple[Tensor, Tensor | None]:
        """``1 / √(variance + ε)`` and the mean, both (*batch, N, 1)."""
        squares, mean = self.squares.unsqueeze(-1), None
        if norm.centres:
            mean = self.read(ONES) / self.width
            # Where the mean is much larger than the rest this is rounding, of either sign.
            squares = (squares - self.width * mean.square()).clamp_min(0)
        return (squares / self.width + norm.eps).rsqrt(), mean


class Masks(NamedTuple):
    shape: tuple[int, ...]
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None


def attend(
    body: Attend, read: Callable[[str], Tensor], masks: Masks, rotation: Rotation | None
) -> Tensor:
    """Coefficients of the output rows: r numbers for every token and head."""

    def heads(name: str, count: int) -> Tensor:
        products = read(name)
        split = products.reshape(-1, products.shape[-2], count, body.rank)
        return split.transpose(-3, -2)

    query, key = heads(body.query, body.heads), heads(body.key, body.shared)
    value = heads(body.value, body.shared)
    if rotation is not None:
        query, key = rotate(query, *rotation), rotate(key, *rotation)
    mask, causal = merge_masks(query, key, masks.attn_mask, masks.key_padding_mask, body.causal)
    mixed = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=body.scale,
        enable_gqa=body.shared != body.heads,
    )
    return mixed.transpose(-3, -2).reshape(*masks.shape, body.heads * body.rank)


def perceive(body: Perceive, read: Callable[[str], Tensor]) -> Tensor:
    """Coefficients of the output rows: the hidden units."""
    if body.gate is None:
        return body.activation(read(body.up))
    return body.activation(read(body.gate)) * read(body.up)


# ---- inner products of rows ----------------------------------------------------------------------


class RowGrams:
    """Where inner products of stacks of rows come from."""

    offsets: Mapping[str, Tensor]

    def gram(self, first: str, second: str) -> Tensor:
        """``⟨w_a, w_b⟩``, (rows of the first, rows of the second)."""
        raise NotImplementedError

    def square(self, name: str) -> Tensor:
        """``⟨w_a, w_a⟩``."""
        raise NotImplementedError

    def applied(self, coefficients: Tensor, first: str, second: str) -> Tensor:
        """``Σ c_a ⟨w_a, w_b⟩``."""
        return coefficients @ self.gram(first, second)

    def picked(self, index: Tensor, first: str, second: str) -> Tensor:
        """``⟨w_a, w_b⟩`` for a in `index`, (*index.shape, rows of the second)."""
        return self.gram(first, second)[index]


class KeptGrams(RowGrams):
    """Computed beforehand."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.offsets = weights, weights.offsets

    def gram(self, first: str, second: str) -> Tensor:
        return self.weights.grams[first, second]

    def square(self, name: str) -> Tensor:
        return self.weights.squares[name]


class GramsOfRows(RowGrams):
    """From the rows, whole or in chunks, in the widest precision."""

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        chunk_size: int | None,
        offsets: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.rows, self.chunk_size, self.offsets = rows, chunk_size, offsets or {}

    def gram(self, first: str, second: str) -> Tensor:
        one, two = self.rows[first], self.rows[second]
        return (wide(one) @ wide(two).mT).to(one.dtype)

    def square(self, name: str) -> Tensor:
        rows = self.rows[name]
        return wide(rows).square().sum(-1).to(rows.dtype)

    def applied(self, coefficients: Tensor, first: str, second: str) -> Tensor:
        size = self.chunk_size
        if size is None:
            return super().applied(coefficients, first, second)
        columns = []
        for two in self.rows[second].split(size):
            parts = zip(coefficients.split(size, dim=-1), self.rows[first].split(size), strict=True)
            total = torch.zeros((), dtype=coefficients.dtype, device=coefficients.device)
            for part, one in parts:
                total = total + part @ (wide(one) @ wide(two).mT).to(one.dtype)
            columns.append(total)
        return torch.cat(columns, dim=-1)

    def picked(self, index: Tensor, first: str, second: str) -> Tensor:
        one = self.rows[first][index]
        columns = [
            (wide(one) @ wide(two).mT).to(one.dtype)
            for two in self.rows[second].split(self.chunk_size or len(self.rows[second]))
        ]
        return torch.cat(columns, dim=-1)


class RecordingGrams(RowGrams):
    """Remembers what is asked for, and answers with zeros."""

    def __init__(self, rows: Mapping[str, int], like: Tensor) -> None:
        self.rows, self.like, self.offsets = rows, like.detach(), {}
        self.pairs: dict[tuple[str, str], None] = {}
        self.single: dict[str, None] = {}

    def gram(self, first: str, second: str) -> Tensor:
        self.pairs[first, second] = None
        return self.like.new_zeros(self.rows[first], self.rows[second])

    def square(self, name: str) -> Tensor:
        self.single[name] = None
        return self.like.new_zeros(self.rows[name])


def slices_of(rows: Mapping[str, int]) -> Iterator[slice]:
    start = 0
    for length in rows.values():
        yield slice(start, start + length)
        start += length
