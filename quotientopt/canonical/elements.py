"""Group elements that take the factor pairs of a model to a section.

In reading order: an :class:`Element`, and those of every section, from Gram matrices
(:func:`section_elements`, :func:`unit_elements`, :func:`balanced_elements`); the canonical one,
which the SVD section has with nothing left open (:func:`canonical_element`): signs and bases of
equal singular values are fixed by the rule of :mod:`quotientopt.sections.convention`, pairs of
deficient rank brought to the form of :func:`quotientopt.sections.section`; and compact groups.

The elements of compact groups are orthogonal and turn both factors alike. Normalised queries and
keys have one: O(r), its stabiliser of the all-ones vector, or the phases of rotary planes. A pair
under such a group is one matrix [A B], and orbits are compared by turning one representative to
where it is nearest to the other. Every other structure group here has a maximal compact subgroup of
this kind, which is what balancing a pair leaves of it (:func:`compact_factor`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import (
    Pair,
    first_largest,
    gram,
    locate_first,
    orthogonal_polar_factor,
    row_signs,
    wide_dtype,
)
from quotientopt.canonical.reading import (
    BlockView,
    columns_of,
    grams_of,
    is_compact,
    joint,
    moved_first,
    of_one_group,
    pair_of,
    split_heads,
    stored,
)
from quotientopt.groups import (
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StructureGroup,
)
from quotientopt.manifolds import FactorQuotient
from quotientopt.sections.factor import svd_dressing
from quotientopt.sections.gram import dress_matrix
from quotientopt.sections.rotary import rotary_svd_dressing
from quotientopt.symmetries import HeadSymmetry, SymmetryMap

SectionKind = Literal["svd", "balanced", "orthonormal", "triangular", "polar"]
Elements = Callable[[Tensor, Tensor], Pair]


class Element(NamedTuple):
    """The element of one symmetry.

    Attributes
    ----------
    g, contragredient : Tensor
        For B and for A, each ``(heads, r, r)`` in the widest precision.
    gap : Tensor, optional
        Smallest difference of neighbouring singular values, of those that do not vanish, over the
        largest, per head; only of the SVD section.
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
    columns = columns_of(symmetry)
    try:
        return FactorQuotient(
            symmetry.rank,
            *columns,
            group=symmetry.group,
            batch_shape=(symmetry.heads,),
            check=False,
        )
    except ValueError as error:
        raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None


def section_kinds(symmetry: HeadSymmetry) -> tuple[str, ...]:
    """The sections that a symmetry's group has: of pairs, under compact groups of [A B]."""
    if isinstance(symmetry.group, PlaneCommutant):
        return ("svd", "balanced", "orthonormal", "triangular")
    if isinstance(symmetry.group, RotaryPhases):
        return ("svd",)
    return (
        ("svd", "polar") if isinstance(symmetry.group, O) else manifold_of(symmetry).section_kinds
    )


def refuse_unknown_section(symmetries: Sequence[HeadSymmetry], kind: str) -> None:
    """Refuse a section that some symmetry's group does not have.

    Raises
    ------
    ValueError
        Naming the symmetry, its group and the sections it has.
    """
    for symmetry in symmetries:
        known = section_kinds(symmetry)
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
        If a group has no such section, a pair is not finite, or, for other sections than ``"svd"``,
        lacks full rank; the symmetry is named.
    """
    refuse_unknown_section(symmetries, kind)
    found: dict[str, Element] = {}
    for members in of_one_group(symmetries):
        if kind == "svd":
            found |= {s.name: Element(*canonical_element(s, pair_of(s, view))) for s in members}
            continue
        elements = _elements(members[0].group, kind)
        first = _name_failures(members, elements, [_summary(s, kind, view) for s in members])
        again = [
            _summary(s, kind, view, (g, contragredient))
            for s, g, contragredient in zip(members, *first, strict=True)
        ]
        second = _name_failures(members, elements, again)
        for i, symmetry in enumerate(members):
            g, contragredient = (new[i] @ old[i] for new, old in zip(second, first, strict=True))
            found[symmetry.name] = Element(g, contragredient)
    return found


def unit_elements(symmetry: HeadSymmetry, view: BlockView = stored) -> Element:
    """Factors that make incoming and outgoing weights of hidden units equally long.

    ``g² = |a| / |b|``. Where one of them vanishes the other gets length one, and where both do
    nothing happens: dead units are no error. Under GL(1) the entry of largest modulus of the
    incoming weights (of the outgoing ones, where those vanish) becomes positive; positive scales
    keep all signs.

    Raises
    ------
    ValueError
        If an entry is not finite.
    """
    A, B = pair_of(symmetry, view)
    a, b = (torch.linalg.vector_norm(X, dim=-1, keepdim=True) for X in (A, B))
    if not bool((a + b).isfinite().all()):
        raise ValueError(f"symmetry {symmetry.name!r} has non-finite entries")
    g = (torch.where(a > 0, a, 1 / b) / torch.where(b > 0, b, 1 / a)).sqrt()
    g = torch.where((a > 0) | (b > 0), g, 1)
    if not isinstance(symmetry.group, Scale):
        g = g * torch.where(b > 0, row_signs(B), row_signs(A))
    return Element(g, 1 / g)


def elements_of(
    symmetries: SymmetryMap, kind: str, view: BlockView = stored, *, units: bool = True
) -> dict[str, Element]:
    """:func:`section_elements` of the heads, and :func:`unit_elements` of the hidden units."""
    found = section_elements(symmetries.heads, kind, view)
    if units:
        found |= {unit.name: unit_elements(unit, view) for unit in symmetries.hidden_units}
    return found


def balanced_elements(symmetries: SymmetryMap) -> dict[str, Element]:
    """Elements of the balanced section, and the identity where the group is compact."""
    compact = [symmetry for symmetry in symmetries.heads if is_compact(symmetry.group)]
    found = _balanced_or_svd([s for s in symmetries.heads if s not in compact])
    found |= {unit.name: unit_elements(unit) for unit in symmetries.hidden_units}
    for symmetry in compact:
        device = symmetry.blocks[0].parameter.device
        identity = symmetry.group.identity((symmetry.heads,), wide_dtype(device), device)
        found[symmetry.name] = Element(identity, identity)
    return found


def _balanced_or_svd(symmetries: Sequence[HeadSymmetry]) -> dict[str, Element]:
    """Balanced elements, or those of the SVD section where a pair lacks full rank.

    At full rank the two differ by a rotation, which those who ask for balanced ones do not see.
    """
    try:
        return section_elements(symmetries, "balanced")
    except ValueError:
        found: dict[str, Element] = {}
        for symmetry in symmetries:
            try:
                found |= section_elements([symmetry], "balanced")
            except ValueError:
                found |= section_elements([symmetry], "svd")
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
    if isinstance(group, RotaryCommutant | PlaneCommutant):
        return lambda SA, SB: sections.rotary_element(kind, group, SA, SB)
    if not is_compact(group):
        return lambda SA, SB: sections.element(kind, SA, SB)

    def turning_both(leading: Tensor, _: Tensor) -> Pair:
        assert isinstance(group, O)  # phases have "svd" alone
        g = sections.gram_section(kind, leading.mT, stabilizer=group)[1]
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
                first = moved_first(symmetry)
                without = "" if first is None else f" (without the bias {first.name!r})"
                raise ValueError(f"symmetry {symmetry.name!r}: {error}{without}") from None
        raise
    g, contragredient = (list(split_heads(symmetries, side).values()) for side in stacked)
    return g, contragredient


def canonical_element(symmetry: HeadSymmetry, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The element that leads to the canonical representative, its contragredient, and the gap.

    Parameters
    ----------
    symmetry : HeadSymmetry
    pair : tuple of Tensor
        Its factors, ``(heads, r, n)`` and ``(heads, r, m)``, in the widest precision. Under GL(r),
        and for the passing rows of a rotary commutant, B tells signs; for a plane the phase that
        makes the entry of largest modulus of the complex row b real and positive (of a, where b
        vanishes); under compact groups the rows of [A B]. Planes that share a frequency have the
        complex singular vectors of their rows.

    Raises
    ------
    ValueError
        If an entry is not finite; the symmetry is named.
    """
    group, stored = symmetry.group, symmetry.blocks[0].parameter.dtype
    try:
        if isinstance(group, RotaryPhases):
            return _phases(group, joint(pair), stored)
        if isinstance(group, O):
            rows = _finite(joint(pair))
            found = dress_matrix("svd", group.moving_part(rows.mT), stored)
            g = group.element_of_moving(found.element)
            return g, g, found.gap
        if isinstance(group, RotaryCommutant | PlaneCommutant):
            _, _, g, contragredient, gap = rotary_svd_dressing(group, *pair, stored)
        else:
            _, _, g, contragredient, gap = svd_dressing(*pair, stored)
    except ValueError as error:
        raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None
    return g, contragredient, gap


def _phases(
    group: RotaryPhases, rows: Tensor, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Phases that put the largest entry of every complex row of [A B] on the positive axis."""
    commutant = group.commutant
    rows = _finite(rows)
    if isinstance(commutant, PlaneCommutant):
        return _unitary(commutant, rows, stored)
    planes = commutant.complex_rows(rows)
    largest = first_largest(planes).squeeze(-1) if commutant.planes else planes[..., 0]
    modulus = largest.abs()
    phase = torch.where(modulus > 0, largest.conj() / torch.where(modulus > 0, modulus, 1), 1)
    block, gap = None, modulus.new_full(rows.shape[:-2], torch.inf)
    if commutant.pass_rows:
        found = dress_matrix("svd", rows[..., commutant.rotary_dim :, :].mT, stored)
        block, gap = found.element, found.gap
    g = commutant.element(phase, block)
    return g, g, gap


def _unitary(
    commutant: PlaneCommutant, rows: Tensor, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where planes share a frequency: left singular vectors of their complex rows."""
    planes, passing = commutant.complex_rows(rows)
    gap = rows.new_full(rows.shape[:-2], torch.inf)
    parts = []
    for own in planes:
        U, values, Vh = torch.linalg.svd(own, full_matrices=False)
        largest = first_largest(Vh)
        parts.append(largest.conj() / largest.abs() * U.mH)
        if values.shape[-1] > 1:
            gaps = -values.diff(dim=-1).amax(dim=-1) / values[..., 0]
            gap = torch.minimum(gap, gaps.amin(dim=-1))
    block = passing[..., :0]
    if commutant.pass_rows:
        found = dress_matrix("svd", passing.mT, stored)
        block, gap = found.element, torch.minimum(gap, found.gap)
    g = commutant.element(parts, block)
    return g, g, gap


def _finite(rows: Tensor) -> Tensor:
    finite = torch.isfinite(rows).all(dim=-1).all(dim=-1)
    if not bool(finite.all()):
        raise ValueError(f"[A B] has non-finite entries{locate_first(~finite)}")
    return rows


def compact_factor(group: StructureGroup, matrix: Tensor) -> Tensor:
    """The element of the group's maximal compact subgroup that is closest to r×r matrices.

    The solution k of the Procrustes problem ``min ‖k X − Y‖`` for ``matrix = Y Xᵀ``.
    """
    if isinstance(group, RotaryPhases):
        return group.commutant.unitary_factor(matrix)
    if isinstance(group, RotaryCommutant | PlaneCommutant):
        return group.unitary_factor(matrix)
    if isinstance(group, O):
        return group.element_of_moving(orthogonal_polar_factor(moving_block(group, matrix)))
    return orthogonal_polar_factor(matrix)


def moving_block(group: O, matrix: Tensor) -> Tensor:
    """A square matrix in the coordinates that the group moves, on both sides."""
    return group.moving_part(group.moving_part(matrix).mT).mT
