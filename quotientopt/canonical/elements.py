"""Group elements that take the factor pairs of a model to a section, from their Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair, gram, wide_dtype
from quotientopt.canonical.compact import is_compact, section_element, section_kinds
from quotientopt.canonical.convention import canonical_turn
from quotientopt.canonical.reading import (
    BlockView,
    grams_of,
    of_one_group,
    pair_of,
    split_heads,
    stored,
)
from quotientopt.groups import RotaryCommutant, StructureGroup
from quotientopt.manifolds import FactorQuotient
from quotientopt.symmetries import HeadSymmetry

Elements = Callable[[Tensor, Tensor], Pair]


class Element(NamedTuple):
    """The element of one symmetry.

    Attributes
    ----------
    g, contragredient : Tensor
        For B and for A, each ``(heads, r, r)`` in the widest precision.
    gap : Tensor, optional
        See :class:`~quotientopt.canonical.convention.Turn`; only of the SVD section.
    """

    g: Tensor
    contragredient: Tensor
    gap: Tensor | None = None


def manifold_of(symmetry: HeadSymmetry) -> FactorQuotient:
    """The quotient manifold of a symmetry's factor pairs.

    Raises
    ------
    ValueError
        If its group is none that factor pairs are divided by.
    """
    try:
        return FactorQuotient(
            symmetry.rank,
            *symmetry.columns,
            group=symmetry.group,
            batch_shape=(symmetry.heads,),
            check=False,
        )
    except ValueError as error:
        raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None


def refuse_unknown_section(symmetries: Sequence[HeadSymmetry], kind: str) -> None:
    """Refuse a section that some symmetry's group does not have.

    Raises
    ------
    ValueError
        Naming the symmetry, its group and the sections it has.
    """
    for symmetry in symmetries:
        compact = is_compact(symmetry.group)
        known = section_kinds(symmetry.group) if compact else manifold_of(symmetry).section_kinds
        if kind not in known:
            raise ValueError(
                f"symmetry {symmetry.name!r}: section must be one of {known} for "
                f"{symmetry.group!r}, got {kind!r}; take one of those, or leave the symmetry out "
                "with symmetries="
            )


@torch.no_grad()
def section_elements(
    symmetries: Sequence[HeadSymmetry], kind: str, view: BlockView = stored
) -> dict[str, Element]:
    """Elements that take every symmetry to its section, by name; nothing is changed.

    A Gram matrix squares the condition number of its factor, so that the element of an
    ill-conditioned pair is accurate to fewer digits. A second pass, over the pair that the first
    one has dressed, brings them back.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
    kind : str
        See :meth:`quotientopt.manifolds.FactorQuotient.section`.
    view : callable
        How blocks are read.

    Raises
    ------
    ValueError
        If a group has no such section, or a pair lacks full rank or is not finite; the symmetry is
        named.
    """
    refuse_unknown_section(symmetries, kind)
    found: dict[str, Element] = {}
    for members in of_one_group(symmetries):
        elements = _elements(members[0].group, kind)
        first = _name_failures(members, elements, [_summary(s, kind, view) for s in members])
        again = [
            _summary(s, kind, view, (g, contragredient))
            for s, g, contragredient in zip(members, *first, strict=True)
        ]
        second = _name_failures(members, elements, again)
        for i, symmetry in enumerate(members):
            g, contragredient = (new[i] @ old[i] for new, old in zip(second, first, strict=True))
            gap = None
            if kind == "svd":
                A, B = pair_of(symmetry, view)
                dtype = symmetry.blocks[0].parameter.dtype
                turn, gap = canonical_turn(symmetry.group, (contragredient @ A, g @ B), dtype)
                g, contragredient = turn @ g, turn @ contragredient
            found[symmetry.name] = Element(g, contragredient, gap)
    return found


def balanced_elements(symmetries: Sequence[HeadSymmetry]) -> dict[str, Element]:
    """Elements of the balanced section, and the identity where the group is compact."""
    compact = [symmetry for symmetry in symmetries if is_compact(symmetry.group)]
    found = section_elements([s for s in symmetries if s not in compact], "balanced")
    for symmetry in compact:
        device = symmetry.blocks[0].parameter.device
        identity = symmetry.group.identity((symmetry.heads,), wide_dtype(device), device)
        found[symmetry.name] = Element(identity, identity)
    return found


def _summary(
    symmetry: HeadSymmetry, kind: str, view: BlockView, dressing: Pair | None = None
) -> Pair:
    """What a section is computed from: the Gram matrices, or the leading block of [A B]."""
    if kind == "polar":
        leading = pair_of(symmetry, view)[0][..., : symmetry.rank]
        leading = leading if dressing is None else dressing[1] @ leading
        return leading, leading
    # Gram matrices do not see a rotation of the residual stream: no view is needed.
    if dressing is None:
        return grams_of(symmetry)
    A, B = pair_of(symmetry)
    g, contragredient = dressing
    return gram(contragredient @ A), gram(g @ B)


def _elements(group: StructureGroup, kind: str) -> Elements:
    """The function from two stacks of r×r matrices to the element and its inverse transpose."""
    if isinstance(group, RotaryCommutant):
        return lambda SA, SB: sections.rotary_element(kind, group, SA, SB)
    if not is_compact(group):
        return lambda SA, SB: sections.element(kind, SA, SB)

    def turning_both(SA: Tensor, SB: Tensor) -> Pair:
        g = section_element(kind, group, SA if kind == "polar" else SA + SB)
        return g, g

    return turning_both


def _name_failures(
    symmetries: Sequence[HeadSymmetry], elements: Elements, summaries: Sequence[Pair]
) -> tuple[list[Tensor], list[Tensor]]:
    """Elements of all symmetries at once, then head by head again to name one that has none."""
    left, right = (torch.cat(side) for side in zip(*summaries, strict=True))
    try:
        stacked = elements(left, right)
    except ValueError:
        for symmetry, summary in zip(symmetries, summaries, strict=True):
            try:
                elements(*summary)
            except ValueError as error:
                raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None
        raise
    g, contragredient = (list(split_heads(symmetries, side).values()) for side in stacked)
    return g, contragredient
