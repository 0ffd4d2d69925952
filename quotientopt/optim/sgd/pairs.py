"""Riemannian gradient descent on stacked factor pairs: gradient, projection, one step.

The vector that represents a differential and the horizontal part of a momentum are those of
:mod:`quotientopt.manifolds`, at points measured as in :mod:`quotientopt.optim.sgd.metrics`; then
the pairs of an optimizer, in batches of one shape.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, compute_dtype, wide
from quotientopt.groups import O
from quotientopt.manifolds.metrics import METRICS, Factor, FactorPoint
from quotientopt.manifolds.vertical import (
    algebra_preconditioned,
    algebra_right_invariant,
    skew_preconditioned,
)
from quotientopt.optim.bookkeeping.checks import GradientError, RankError
from quotientopt.optim.gauge import seen_weights
from quotientopt.optim.sgd.metrics import (
    PairGrams,
    heads_without_metric,
    inverse_of_root,
    measure,
    without_metric,
)
from quotientopt.symmetries import Block, HeadSymmetry
from quotientopt.symmetries.pairs import as_stored, columns_of, in_order, shape_key, stack_factors


class StackedFactor(Factor):
    """A factor in the dtype it is stacked in, beside r × r matrices in the widest precision.

    What is as wide as the factor is multiplied in its own dtype: the rows of an optimizer's pairs
    are many, and the quotient's formulas need the precision where they solve equations.
    """

    __slots__ = ()

    @classmethod
    def of(cls, rows: Tensor, root: Tensor) -> StackedFactor:
        """From rows X and the Cholesky factor L of their Gram matrix."""
        return cls(rows, root, inverse_of_root(root).to(rows.dtype) @ rows)

    def solve(self, Y: Tensor) -> Tensor:
        """``S^{-1} Y``, one root after the other: their product has the square of the condition."""
        inverse = inverse_of_root(self.root).to(Y.dtype)
        return inverse.mT @ (inverse @ Y)

    def times_gram(self, Y: Tensor) -> Tensor:
        """``S Y``."""
        root = self.root.to(Y.dtype)
        return root @ (root.mT @ Y)

    def coordinates(self, xi: Tensor) -> Tensor:
        """``ξ (L^{-1} X)ᵀ``, of shape (*batch, r, r)."""
        assert self.orthonormal is not None
        return wide(xi @ self.orthonormal.mT)


def riemannian_gradient(metric: str, geometry: PairGrams, partials: Pair) -> Pair:
    """The vector that represents a differential (:mod:`quotientopt.manifolds.metrics`).

    Preconditioned: ``(S_B^{-1} ∂_A, S_A^{-1} ∂_B)``; right-invariant: ``(S_A ∂_A, S_B ∂_B)``.
    Horizontal if the function is invariant.

    Parameters
    ----------
    metric : {"preconditioned", "right-invariant"}
    geometry : PairGrams
    partials : tuple of Tensor
        ``(∂_A, ∂_B)``, stacked like the factors.
    """
    # Only Gram matrices enter, and the roots have those of the factors.
    A, B = (StackedFactor(L, L, None) for L in (geometry.left_root, geometry.right_root))
    return METRICS[metric].gradient(FactorPoint(A, B, geometry.group), partials)


def horizontal_component(
    metric: str,
    geometry: PairGrams,
    factors: Pair,
    vector: Pair,
    left_out: Tensor | None = None,
) -> Pair:
    """The part of a tangent vector that is orthogonal to the orbit.

    The vector less its vertical component (:mod:`quotientopt.manifolds.vertical`), r × r matrices
    times rows: those of O(r) for all of its subgroups, and those of GL(r) for every group that is
    the units of an algebra, of which `geometry.group` tells the products of rows.

    Parameters
    ----------
    metric : {"preconditioned", "right-invariant"}
    geometry : PairGrams
        Of `factors`.
    factors, vector : tuple of Tensor
        ``(A, B)`` and ``(u_A, u_B)``.
    left_out : Tensor, optional
        Heads whose vectors stay as they are, ``(…)``.
    """
    of_algebra = algebra_preconditioned if metric == "preconditioned" else algebra_right_invariant
    component = skew_preconditioned if isinstance(geometry.group, O) else of_algebra
    A = StackedFactor.of(factors[0], geometry.left_root)
    B = StackedFactor.of(factors[1], geometry.right_root)
    C_A, C_B, rows_A, rows_B = component(FactorPoint(A, B, geometry.group), vector)
    if left_out is not None:
        C_A, C_B = (C.masked_fill(left_out[..., None, None], 0) for C in (C_A, C_B))
    u_A, u_B = vector
    return u_A - C_A.to(u_A.dtype) @ rows_A, u_B - C_B.to(u_B.dtype) @ rows_B


SHARED_OPTIONS = ("metric", "momentum", "nesterov", "maximize")

Groups = Sequence[Mapping[str, Any]]
Buffers = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SymmetricPair:
    """A symmetry and the param group of each of its blocks, None for one outside the optimizer."""

    symmetry: HeadSymmetry
    owners: tuple[int | None, ...]

    @property
    def owner(self) -> int:
        """The param group whose metric and momentum the pair follows."""
        return next(index for index in self.owners if index is not None)

    @property
    def active(self) -> tuple[bool, ...]:
        """Which blocks take part in this step."""
        return tuple(
            owner is not None and block.parameter.grad is not None
            for owner, block in zip(self.owners, self.symmetry.blocks, strict=True)
        )

    def refuse_mixed_options(self, groups: Groups, name_of: Callable[[Tensor], str]) -> None:
        """Refuse blocks in param groups that differ in more than lr and weight decay.

        Raises
        ------
        ValueError
            Naming the option and both parameters.
        """
        blocks = zip(self.symmetry.blocks, self.owners, strict=True)
        own = [(block.parameter, index) for block, index in blocks if index is not None]
        if len({index for _, index in own}) == 1:
            return
        for parameter, index in own[1:]:
            for option in SHARED_OPTIONS:
                first, other = groups[own[0][1]][option], groups[index][option]
                if first != other:
                    raise ValueError(
                        f"symmetry {self.symmetry.name!r}: {option} is {first!r} for "
                        f"{name_of(own[0][0])!r} and {other!r} for {name_of(parameter)!r}; the "
                        "parameters of a pair may differ in lr and weight_decay only"
                    )


class Change(NamedTuple):
    """New values of one block of a stack of pairs, ``(S, heads, r, n)``."""

    blocks: tuple[Block, ...]
    weights: Tensor
    momenta: Tensor | None

    def commit_(self, buffers: Buffers) -> None:
        """Write the new values to the parameters and to their momentum buffers."""
        views = [block.view() for block in self.blocks]
        torch._foreach_copy_(views, list(self.weights.unbind()))
        if self.momenta is not None:
            views = [block.view(buffers(block.parameter)) for block in self.blocks]
            torch._foreach_copy_(views, list(self.momenta.unbind()))


def batches(pairs: Sequence[SymmetricPair], groups: Groups) -> list[PairBatch]:
    """Pairs that have a gradient, those alike together; one by one where ``foreach`` is False."""
    alike: dict[tuple[object, ...], list[SymmetricPair]] = defaultdict(list)
    for pair in pairs:
        active = pair.active
        if any(active):
            alone = id(pair) if groups[pair.owner]["foreach"] is False else None
            alike[shape_key(pair.symmetry), pair.owners, active, alone].append(pair)
    return [PairBatch(members, groups) for members in alike.values()]


class PairBatch:
    """S pairs of one shape with the same options and the same blocks active.

    Nothing is changed before the changes are committed. A pair of which a factor is rank-deficient
    is no point of the quotient: it takes the steps of SGD until it is one again.

    A factor block that is frozen or has no gradient in this step keeps its place in the geometry;
    moving along the orbit would move it too, so that such a pair has no vertical directions, and
    its momentum is not projected.

    Parameters
    ----------
    pairs : sequence of SymmetricPair
    groups : sequence of dict
        The optimizer's param groups.
    """

    def __init__(self, pairs: Sequence[SymmetricPair], groups: Groups) -> None:
        self.symmetries = [pair.symmetry for pair in pairs]
        self.owners = pairs[0].owners
        self.active = pairs[0].active
        self.groups = groups
        self.options = groups[pairs[0].owner]
        self._taking_part = {
            id(block.parameter)
            for symmetry in self.symmetries
            for block, active in zip(symmetry.blocks, self.active, strict=True)
            if active
        }
        dtypes = [block.parameter.dtype for block in self.symmetries[0].blocks]
        self.dtype = compute_dtype(functools.reduce(torch.promote_types, dtypes))
        self.weights = stack_factors(self.symmetries, Block.view, self.dtype)
        # Biases that may be translated are no part of the geometry, or it would see by how much.
        self.seen = self.weights
        if any(symmetry.translation is not None for symmetry in self.symmetries):
            self.seen = stack_factors(self.symmetries, seen_weights(self.symmetries), self.dtype)
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.group = self.symmetries[0].group
        geometry = measure(in_order(self.group), *self.seen, precision)
        self.flat = heads_without_metric(geometry)
        self.geometry = without_metric(geometry, self.flat)
        self.directions: Sequence[Tensor] = ()

    def changes(self, buffers: Buffers) -> list[Change]:
        """New weights and momenta of every active block.

        Momentum ``u ← μ P(u) + grad`` with P the horizontal projection at the current point;
        weights ``W ← (1 − ηλ) W − η u``, with Nesterov ``W ← (1 − ηλ) W − η (grad + μ u)``.

        Parameters
        ----------
        buffers : callable
            Parameter to its momentum buffer.
        """
        metric, momentum = self.options["metric"], self.options["momentum"]
        partials = self._stack(lambda block: block.view(block.parameter.grad))
        directions: Sequence[Tensor] = riemannian_gradient(metric, self.geometry, partials)
        if self.options["maximize"]:
            directions = [-direction for direction in directions]
        momenta: Sequence[Tensor] = ()
        if momentum != 0:
            transported = self._stack(lambda block: block.view(buffers(block.parameter)))
            if all(self.active):
                transported = horizontal_component(
                    metric, self.geometry, self.seen, transported, self.flat
                )
            momenta = [
                grad.add(u, alpha=momentum) for grad, u in zip(directions, transported, strict=True)
            ]
            if self.options["nesterov"]:
                directions = [
                    grad.add(u, alpha=momentum) for grad, u in zip(directions, momenta, strict=True)
                ]
            else:
                directions = momenta
        self.directions = directions
        return self._split(momenta)

    def _stack(self, read: Callable[[Block], Tensor]) -> Pair:
        """Blocks read and stacked, with zeros for those that do not take part."""

        def read_or_zero(block: Block) -> Tensor:
            if id(block.parameter) in self._taking_part:
                return read(block)
            return torch.zeros(block.size, dtype=self.dtype, device=block.parameter.device)

        return stack_factors(self.symmetries, read_or_zero, self.dtype)

    def _split(self, momenta: Sequence[Tensor]) -> list[Change]:
        """One change per place of an active block."""
        found = []
        count = len(self.symmetries[0].left_blocks)
        sides = (
            (0, [symmetry.left_blocks for symmetry in self.symmetries], slice(count)),
            (1, [symmetry.right_blocks for symmetry in self.symmetries], slice(count, None)),
        )
        for side, blocks, places in sides:
            parts = zip(columns_of(blocks[0]), zip(*blocks, strict=True), strict=True)
            settings = zip(parts, self.owners[places], self.active[places], strict=True)
            for (columns, members), owner, active in settings:
                if owner is None or not active:
                    continue
                lr, decay = self.groups[owner]["lr"], self.groups[owner]["weight_decay"]
                weights = self.weights[side][..., columns] * (1 - lr * decay)
                weights = weights - lr * self.directions[side][..., columns]
                kept = as_stored(self.group, momenta[side][..., columns]) if momenta else None
                found.append(Change(members, as_stored(self.group, weights), kept))
        return found

    def refuse(self) -> None:
        """Raise for the first pair that is not finite or whose direction overflows.

        Raises
        ------
        RankError
            Naming the symmetry, the side and the head.
        GradientError
            Naming the symmetry.
        """
        broken = ~self.geometry.finite
        if bool(broken.any()):
            side, entry, head = broken.nonzero()[0].tolist()
            raise RankError(
                f"symmetry {self.symmetries[entry].name!r}: the {('left', 'right')[side]} factor "
                f"of head {head} is not finite; nothing was updated. Give its parameters the "
                "values of a checkpoint"
            )
        for direction in self.directions:
            bad = ~direction.isfinite().flatten(1).all(1)
            if bool(bad.any()):
                name = self.symmetries[int(bad.nonzero()[0])].name
                raise GradientError(
                    f"symmetry {name!r}: the Riemannian gradient overflows; nothing was updated. "
                    "Lower the learning rate, or scale the gradient down"
                )

    def flags(self) -> list[Tensor]:
        """Whether :meth:`refuse` would raise, as tensors."""
        finite = torch.stack([direction.isfinite().all() for direction in self.directions])
        return [~self.geometry.finite.all(), ~finite.all()]


def refuse_sparse_of_pairs(gradients: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sparse gradients of parameters that belong to a symmetry."""
    for name, gradient in gradients:
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name!r} is sparse, and the parameter belongs to a symmetry; "
                "use dense gradients (for an embedding: sparse=False)"
            )


def largest_entries(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Largest modulus of each gradient, which is finite where all its entries are."""
    values = [g._values() if g.is_sparse else g for g in gradients]
    values = [value for value in values if value.numel()]
    return list(torch._foreach_norm(values, float("inf"))) if values else []


def refuse_nonfinite_entries(
    gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]
) -> None:
    """Refuse gradients with NaN or infinite entries.

    Raises
    ------
    GradientError
        Naming the first parameter.
    """
    bad = [
        name_of(parameter)
        for parameter, gradient in gradients.items()
        if not all(bool(largest.isfinite()) for largest in largest_entries([gradient]))
    ]
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise GradientError(
            f"the gradient of {bad[0]!r}{others} has NaN or infinite entries; nothing was updated. "
            "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
        )
