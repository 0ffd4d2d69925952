"""The gauge, head order and residual frame of a model nearest to those of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast, wide_dtype
from quotientopt.canonical.distance import common_residual_group, overlap_outside, refuse_different
from quotientopt.canonical.elements import Element, balanced_elements, compact_factor
from quotientopt.canonical.moving import (
    HeadOrder,
    attentions,
    best_order,
    complete,
    exchangeable,
    move_,
    overlaps,
    refuse_sparse_gradients,
    refuse_uneven,
    reorder_,
    reordered,
)
from quotientopt.canonical.reading import (
    BlockView,
    Outside,
    of_unit_length,
    outside_of,
    query_groups,
    require_pairs,
    residual_axes,
    right_blocks,
    rotated,
    stored,
    symmetries_of,
    translations_to_zero,
    unit_lengths,
    untranslated,
)
from quotientopt.groups import O, Scale
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION
from quotientopt.symmetries.verification import unchanged_outputs, without_gradients

MOST_ROUNDS = 20
IMPROVEMENT = 1e-6


class Alignment(dict[str, Tensor]):
    """What moved a model towards a reference: a group element, symmetry name to tensor.

    The element acts after the heads have changed places.

    Attributes
    ----------
    head_order : dict of str to Tensor
        Attention to the order of its query heads: the i-th of now was number ``order[i]``.
    unordered : tuple of str
        Attentions of several heads that were left in their order, because something besides their
        pairs may tell the heads apart.
    """

    def __init__(
        self,
        element: Mapping[str, Tensor],
        head_order: Mapping[str, Tensor],
        unordered: Sequence[str],
    ) -> None:
        super().__init__(element)
        self.head_order = dict(head_order)
        self.unordered = tuple(unordered)


@dataclass(frozen=True, eq=False)
class _Match:
    """One answer: orders, turns of the balanced pairs, and the distance that is left, squared."""

    rotation: Tensor | None
    orders: Mapping[str, HeadOrder]
    turns: Mapping[str, Tensor]
    squared: float
    overlap: Tensor


@torch.no_grad()
@outside_autocast()
def align_(
    model: nn.Module,
    reference: nn.Module,
    *,
    symmetries: tuple[SymmetryMap, SymmetryMap] | None = None,
    residual: bool = True,
    permute_heads: bool | Collection[str] = True,
    example_inputs: Any = None,
) -> Alignment:
    """Move a model along its orbit, and reorder its heads, to where it is nearest to a reference.

    In place; what the model computes stays the same up to rounding. Three problems, each solved
    exactly for given solutions of the others:

    1. order of heads: the linear assignment that maximises the overlap of the invariants of both
       pairs of an attention together (query heads within those of their key-value head);
    2. gauge of each head: both pairs in their balanced section, which leaves a compact group, and
       there the Procrustes problem (O(r); phases and O for rotary planes and passing rows);
    3. the residual stream, where both have O(d) or O(d − 1) on it: Procrustes over all matrices on
       it, head pairs in their balanced gauge.

    The third starts from the matrices outside the head pairs; then all are repeated while that
    brings the models closer. The model ends in the gauge of the reference: a gauge twin of the
    reference becomes the reference.

    Parameters
    ----------
    model, reference : Module
        With parameters of the same names and shapes, and the same symmetries. `reference` is not
        changed.
    symmetries : pair of SymmetryMap, optional
        Those of both models; found by default.
    residual : bool
        Whether to rotate the residual stream, where both models have a symmetry there.
    permute_heads : bool or collection of str
        Whether to reorder heads. True: of attentions in which nothing but the pairs is known to
        tell heads apart (:data:`quotientopt.canonical.moving.EXCHANGEABLE`); names of
        attentions: of those, on your word that there is no slope, bias or gain per head. Needs
        SciPy.
    example_inputs : Tensor, tuple or mapping, optional
        Arguments of the model: what no class tells is found from them
        (:func:`quotientopt.find_symmetries`), and the outputs on them, in float64, are compared
        before and after.

    Returns
    -------
    Alignment
        The group element, with the orders of heads.

    Raises
    ------
    ValueError
        If the models differ in names, shapes or symmetries, a pair is not finite, of mixed dtypes
        or half frozen, or the outputs on `example_inputs` change. Nothing is changed then.
    ImportError
        If heads are to be matched and SciPy is missing.

    Notes
    -----
    Gradients move along; the state of an optimizer does not: make it anew. Attention weights that
    the model returns come in the new order of heads, and masks given head by head have to follow.
    Biases that may be translated become those of the reference, hidden units of MLPs and normalised
    queries and keys get its scales. Hidden units are left in their order. Permutations of all of a
    network's units are matched by Ainsworth, Hayase & Srinivasa, *Git Re-Basin*, arXiv 2209.04836.
    """
    own, other = symmetries or (None, None)
    own = symmetries_of(model, own, example_inputs)
    other = symmetries_of(reference, other, example_inputs)
    require_pairs(model, own)
    refuse_different(model, reference, own, other)
    refuse_uneven(own)
    refuse_sparse_gradients(own)
    if not isinstance(permute_heads, bool):
        permute_heads = {permute_heads} if isinstance(permute_heads, str) else set(permute_heads)
        _refuse_unknown(permute_heads, own)
    search = _Search(model, reference, own, other, permute_heads=permute_heads)
    best = search.run(common_residual_group(own, other) if residual else None)
    element = {} if best.rotation is None else {RESIDUAL: best.rotation}
    orders = {
        symmetry.name: best.orders[name]
        for name, pair in search.attentions.items()
        for symmetry in pair
        if name in best.orders
    }
    for symmetry in own.pairs:
        g = search.element(symmetry, best.turns[symmetry.name], orders.get(symmetry.name))
        symmetry.check_element(g)
        order = orders.get(symmetry.name)
        view = stored if order is None else reordered(symmetry, order, stored)
        symmetry.refuse_overflow(g, view)  # before heads change places
        element[symmetry.name] = g
    element |= _lengths_of(own, other)
    affine = [symmetry for symmetry in own.heads if symmetry.translation is not None]
    biases = {s.name: -t for s, t in _translations(search.fixed[s.name] for s in affine)}
    for symmetry, t in _translations(affine):
        symmetry.check_translation(t)
        symmetry.check_translation(biases[symmetry.name])

    def reorder_heads_() -> None:
        for symmetry in own.heads:
            if symmetry.name in orders and not orders[symmetry.name].trivial:
                reorder_(symmetry, orders[symmetry.name])

    def shifts() -> dict[str, Tensor]:
        # Of the biases as they are now: b + (b_ref − b) is that of the reference to the last bit.
        return {s.name + TRANSLATION: biases[s.name].to(t) + t for s, t in _translations(affine)}

    with unchanged_outputs(model, example_inputs, "this alignment", put_back=True):
        if example_inputs is not None:
            with without_gradients(model):
                reorder_heads_()
                own.act_(element)
                own.act_(shifts())
    reorder_heads_()
    move_(own, element)
    translation = shifts()
    move_(own, translation)
    flat = {name: order.flat for name, order in best.orders.items()}
    return Alignment(element | translation, flat, search.unordered)


def _translations(
    symmetries: Iterable[HeadSymmetry],
) -> Iterable[tuple[HeadSymmetry, Tensor]]:
    """Symmetries with the translations that make their biases zero."""
    symmetries = list(symmetries)
    return zip(symmetries, translations_to_zero(symmetries).values(), strict=True)


def _lengths_of(own: SymmetryMap, other: SymmetryMap) -> dict[str, Tensor]:
    """Factors that bring normalised queries and keys to the lengths that the reference has."""
    ours, theirs = unit_lengths(own.scales), unit_lengths(other.scales)
    return {name: factor / theirs[name].to(factor) for name, factor in ours.items()}


def _refuse_unknown(names: Collection[str], symmetries: SymmetryMap) -> None:
    known = {name for name, pair in attentions(symmetries.heads).items() if complete(pair)}
    for name in sorted(names):
        if name not in known:
            raise ValueError(
                f"no attention {name!r} with a query-key and a value-output pair, whose heads "
                f"could change places; known: {sorted(known)}"
            )


class _Search:
    """Two models with their pairs balanced, and the alternating search for the nearest match."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        own: SymmetryMap,
        other: SymmetryMap,
        *,
        permute_heads: bool | Collection[str],
    ) -> None:
        self.own, self.axes = own, residual_axes(own.residual)
        self.fixed = {symmetry.name: symmetry for symmetry in other.pairs}
        self.outside = outside_of(model, own), outside_of(reference, other)
        self.dressings = balanced_elements(own), balanced_elements(other)
        self.reference_view = of_unit_length(other)
        self.attentions = attentions(own.heads)
        self.movable, unordered = {}, []
        for name, pair in self.attentions.items():
            asked = permute_heads if isinstance(permute_heads, bool) else name in permute_heads
            if not asked or pair[0].heads * len(query_groups(pair[0])) == 1:
                continue
            if complete(pair) and (permute_heads is not True or exchangeable(model, name)):
                self.movable[name] = pair
            else:
                unordered.append(name)
        self.unordered = tuple(unordered)

    def run(self, group: O | None) -> _Match:
        """The best match, alternating between the residual stream, if it has a group, and heads."""
        stream = self.own.residual
        if group is None or stream is None:
            return self._match(None)
        overlap = overlap_outside(*self.outside, stream.dimension)
        if not bool(overlap.isfinite().all()):
            raise ValueError("the residual stream of one of the models has non-finite entries")
        best = self._match(compact_factor(group, overlap))
        for _ in range(MOST_ROUNDS):
            match = self._match(compact_factor(group, best.overlap))
            if match.squared >= (1 - IMPROVEMENT) * best.squared:
                break
            best = match
        return best

    def element(self, symmetry: HeadSymmetry, turn: Tensor, order: HeadOrder | None) -> Tensor:
        """``g_ref^{-1} k g``: from the model's gauge to the balanced and the reference's one."""
        own, fixed = (dressing[symmetry.name] for dressing in self.dressings)
        g = own.g if order is None else own.g[order.heads.to(own.g.device)]
        return fixed.contragredient.mT.to(g.device) @ turn @ g

    def _match(self, rotation: Tensor | None) -> _Match:
        """Orders and gauges for a given rotation of the residual stream."""
        stream = self.own.residual
        view = stored if rotation is None or stream is None else rotated(stream, rotation)
        view = of_unit_length(self.own, view)
        orders = {
            name: best_order(
                torch.stack(
                    [overlaps(self.fixed[s.name], s, view, self.reference_view) for s in pair]
                ).sum(0),
                len(query_groups(pair[0])),
            )
            for name, pair in self.movable.items()
        }
        squared, turns = _squared_difference(*self.outside, rotation), {}
        device = self.own.pairs[0].blocks[0].parameter.device
        size = 0 if stream is None or rotation is None else stream.dimension
        overlap = torch.zeros(size, size, dtype=wide_dtype(device), device=device)
        ordered = [(s, orders.get(name)) for name, pair in self.attentions.items() for s in pair]
        for symmetry, order in [*ordered, *((unit, None) for unit in self.own.hidden_units)]:
            turn, apart, cross = self._turn(symmetry, order, view)
            turns[symmetry.name] = turn
            squared += apart
            if size and cross is not None:
                overlap += cross.to(overlap)
        if rotation is not None:
            # Those of the pairs were formed with rotated blocks.
            overlap = overlap @ rotation + overlap_outside(*self.outside, size)
        return _Match(rotation, orders, turns, squared, overlap)

    def _turn(
        self, symmetry: HeadSymmetry, order: HeadOrder | None, view: BlockView
    ) -> tuple[Tensor, float, Tensor | None]:
        """The turn of a balanced pair nearest to the reference's, what is left, and the overlap."""
        own, fixed = (dressing[symmetry.name] for dressing in self.dressings)
        if order is not None:
            index = order.heads.to(own.g.device)
            own = Element(own.g[index], own.contragredient[index])
            view = reordered(symmetry, order, view)
        reference = self.fixed[symmetry.name]
        moving = _dressed(symmetry, own, view)
        still = _dressed(reference, fixed, self.reference_view)
        still = [rows.to(moving[0].device) for rows in still]
        products = torch.stack([y @ x.mT for x, y in zip(moving, still, strict=True)]).sum(0)
        if symmetry in self.own.hidden_units:
            keeps_signs = isinstance(symmetry.group, Scale)
            turn = torch.where((products < 0) & (not keeps_signs), -1.0, 1.0).to(products)
        else:
            turn = compact_factor(symmetry.group, products)
        moving = [turn @ rows for rows in moving]
        blocks = (*symmetry.left_blocks, *right_blocks(symmetry))
        apart = sum((x - y).square().sum().item() for x, y in zip(moving, still, strict=True))
        cross = [
            y.flatten(0, 1).mT @ x.flatten(0, 1)
            for block, x, y in zip(blocks, moving, still, strict=True)
            if self._on_stream(block)
        ]
        return turn, apart, torch.stack(cross).sum(0) if cross else None

    def _on_stream(self, block: Block) -> bool:
        axis = self.axes.get(id(block.parameter))
        return axis is not None and block.column_axis == axis


def _dressed(symmetry: HeadSymmetry, dressing: Element, view: BlockView) -> list[Tensor]:
    """All blocks in the balanced gauge, those of the left factor first."""
    left = [dressing.contragredient @ view(block) for block in symmetry.left_blocks]
    view = untranslated(symmetry, view)
    return left + [dressing.g @ view(block) for block in right_blocks(symmetry)]


def _squared_difference(
    moving: Mapping[str, Outside], fixed: Mapping[str, Outside], rotation: Tensor | None
) -> float:
    """What lies between the parameters outside the factor pairs."""
    differences = (
        fixed[name].values().to(part.parameter.device) - part.values(rotation)
        for name, part in moving.items()
    )
    return sum(torch.linalg.vector_norm(part).square().item() for part in differences)
