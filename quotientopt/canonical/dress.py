"""A canonical representative of a model's weights: every head pair, and the residual stream.

:func:`dress_` comes first, then the rotation of the residual stream (:func:`canonical_rotation`).
All matrices on the stream, written with their residual axis last and stacked, are one point X of
the Gram quotient, on which Q acts by ``X ↦ X Qᵀ``. The stack is never formed: sums over its
matrices are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import first_largest, outside_autocast, row_signs, wide, wide_dtype
from quotientopt.canonical.elements import (
    SectionKind,
    balanced_elements,
    elements_of,
    moving_block,
)
from quotientopt.canonical.moving import (
    move_,
    refuse_foreign_optimizer,
    refuse_sparse_gradients,
    refuse_uneven,
)
from quotientopt.canonical.reading import (
    BlockView,
    Outside,
    of_unit_length,
    outside_of,
    require_pairs,
    residual_axes,
    right_blocks,
    rotated,
    stored,
    symmetries_of,
    translations_to_zero,
    unit_lengths,
)
from quotientopt.groups import O
from quotientopt.sections.convention import clusters, pivoted_rotation, smallest_gap
from quotientopt.symmetries import Block, HeadSymmetry, ResidualStream, SymmetryMap
from quotientopt.symmetries.fold import folding_obstacle
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION
from quotientopt.symmetries.verification import unchanged_outputs


class Dressing(dict[str, Tensor]):
    """The group element that dressed a model, symmetry name to tensor.

    ``(heads, r, r)`` for every head symmetry, ``(heads, r)`` for every translation, ``(units, 1,
    1)`` for hidden units and scales and, under ``"residual"``, ``(d, d)``: what
    :meth:`SymmetryMap.act_` takes.

    Attributes
    ----------
    section : str
    gaps : dict of str to Tensor
        For the SVD section, name to the smallest difference of neighbouring singular values, of
        those that do not vanish, over the largest, per head; infinite where there are fewer than
        two, as for rotary planes, which are not ordered. The canonical rows are determined to about
        the precision of the parameters divided by this gap. With ``residual=True`` also
        ``"residual"``, of shape (1,).
    """

    def __init__(
        self, element: Mapping[str, Tensor], section: str, gaps: Mapping[str, Tensor]
    ) -> None:
        super().__init__(element)
        self.section = section
        self.gaps = dict(gaps)

    def __str__(self) -> str:
        lines = [f"dressed by the {self.section} section"]
        for name, gap in self.gaps.items():
            lines.append(f"{name}  smallest spectral gap {gap.min().item():.1e}")
        return "\n".join(lines)


@torch.no_grad()
@outside_autocast()
def dress_(
    model: nn.Module,
    section: SectionKind = "svd",
    *,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    optimizer: Any = None,
    residual: bool = False,
    example_inputs: Any = None,
) -> Dressing:
    """Move a model to the canonical representative of its orbit, in place.

    Every head pair (A, B) goes to the given section of its orbit under its structure group, by
    ``(g^{-T} A, g B)``. Biases that may be translated become zero: that of the keys, and that of
    the values, which the output bias takes up. Hidden units of MLPs get incoming and outgoing
    weights of equal length, normalised queries and keys rows of unit length on the average. What
    the model computes stays the same up to rounding, and dressing again
    changes nothing. Representatives that differ by head gauges are dressed to the same weights by
    ``"svd"``, and to weights that differ by the section's residual group by the others;
    representatives that differ by a rotation of the residual stream as well need ``residual=True``.

    Parameters
    ----------
    model : Module
    section : {"svd", "balanced", "orthonormal", "triangular"}
        ``"svd"``: ``A Aᵀ = B Bᵀ = Σ``, the singular values of AᵀB in decreasing order (for a rotary
        plane ``|a| = |b|``). Signs: in each row of the dressed B the entry of largest modulus is
        positive. Rows of equal singular values: by a QR decomposition of B with column pivoting,
        which is the same rule for one row. Pairs of any rank, as padded heads, pruned channels and
        outputs that start at zero: what AᵀB does not see comes after its singular values, as
        orthonormal rows of one factor, see :func:`quotientopt.sections.section`. See
        :meth:`FactorQuotient.section` for the others, and for ``"svd"`` and ``"polar"`` under O(r).
        Under compact groups (normalised queries and keys) the rows of [A B] are dressed.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        What to dress; by default the optimizer's symmetries, or all that are found.
    optimizer : optional
        An optimizer with ``move_state_``, as :class:`quotientopt.QuotientAdam`: its state moves
        along, so that training goes on as if nothing had happened. Gradients move along always.
        Hidden units and scales stay then: their state is that of plain Adam, which has no law of
        transformation.
    residual : bool
        Rotate the residual stream too, to the principal axes of all matrices on it: for models
        with an exact O(d), or O(d − 1) where norms only centre.
    example_inputs : Tensor, tuple or mapping, optional
        Arguments of the model: what no class tells is found from them
        (:func:`quotientopt.find_symmetries`), and the outputs on them, in float64, are compared
        before and after. A
        model may have been altered where nobody looks (:func:`quotientopt.find_symmetries` looks
        for hooks and patches).

    Returns
    -------
    Dressing
        The group element that was used, a mapping as of :meth:`SymmetryMap.random_element`, with
        the spectral gaps.

    Raises
    ------
    TypeError
        If `model` is no Module, or the optimizer's state cannot be moved.
    ValueError
        If nothing is known to dress, a group lacks the section, a pair is not finite, lacks full
        rank (for other sections than ``"svd"``), is of mixed dtypes or half frozen, the dressed
        values do not fit the dtype, the outputs on `example_inputs` change, or `residual` is asked
        for where O(d) is broken. Nothing is changed then.

    Notes
    -----
    The dressing fields of François & Ravera, arXiv 2602.18948. Parameters stay in their memory, and
    no more than one pair at a time is copied, in float64.
    """
    if optimizer is not None and not hasattr(optimizer, "move_state_"):
        # Wrappers such as accelerate's do not hand it on.
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if symmetries is None and optimizer is not None:
        symmetries = getattr(optimizer, "symmetries", None)
    symmetries = symmetries_of(model, symmetries, example_inputs)
    if not residual:
        require_pairs(model, symmetries)
    if optimizer is not None:
        symmetries = _of_heads(symmetries)
    refuse_uneven(symmetries)
    refuse_sparse_gradients(symmetries)
    if optimizer is not None:
        refuse_foreign_optimizer(optimizer, symmetries)
    element: dict[str, Tensor] = {}
    gaps: dict[str, Tensor] = {}
    view: BlockView = stored
    if residual:
        stream, _ = require_group(symmetries, model)
        element[RESIDUAL], gaps[RESIDUAL] = canonical_rotation(model, symmetries)
        view = rotated(stream, element[RESIDUAL])
    view = of_unit_length(symmetries, view)
    found = elements_of(symmetries, section, view)
    for symmetry in symmetries.pairs:
        symmetry.refuse_overflow(found[symmetry.name].g)
        element[symmetry.name] = found[symmetry.name].g
        gap = found[symmetry.name].gap
        if gap is not None:
            gaps[symmetry.name] = gap
    element |= unit_lengths(symmetries.scales)
    affine = [symmetry for symmetry in symmetries.heads if symmetry.translation is not None]
    for symmetry, t in zip(affine, translations_to_zero(affine).values(), strict=True):
        symmetry.check_translation(t)

    def shifts() -> dict[str, Tensor]:
        # Of the biases as they are now, so that b − b is zero to the last bit.
        return {name + TRANSLATION: t for name, t in translations_to_zero(affine).items()}

    with unchanged_outputs(model, example_inputs, f"the {section} section", put_back=True):
        if example_inputs is not None:
            symmetries.act_(shifts())
            symmetries.act_(element)
    # First, while the weights are as they were: those in the section are rounded, and biases along
    # weak directions large there, by which output biases would take their rounding many times over.
    translation = shifts()
    move_(symmetries, translation)
    move_(symmetries, element, optimizer)
    return Dressing(element | _moved(affine, element, translation), section, gaps)


def _moved(
    affine: Sequence[HeadSymmetry], element: Mapping[str, Tensor], translation: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Translations as they are after the group elements: t ↦ g t, of the biases b ↦ g b."""
    found = {}
    for symmetry in affine:
        name = symmetry.name + TRANSLATION
        g, t = element.get(symmetry.name), translation[name]
        found[name] = t if g is None else (wide(g) @ wide(t)[..., None])[..., 0].to(t.dtype)
    return found


def _of_heads(symmetries: SymmetryMap) -> SymmetryMap:
    """The symmetries without hidden units and scales."""
    return SymmetryMap(
        symmetries.heads, symmetries.residual, residual_reason=symmetries.residual_reason
    )


def require_group(
    symmetries: SymmetryMap, model: nn.Module | None = None
) -> tuple[ResidualStream, O]:
    """The residual stream and its group, if it has one: O(d), or the stabiliser of ones.

    With the model, a refusal says whether folding its norms would help.

    Raises
    ------
    ValueError
        Naming what breaks it.
    """
    stream = symmetries.residual
    if stream is None:
        raise ValueError(
            f"residual=True needs a known residual stream: {symmetries.residual_reason}"
        )
    if stream.group is None:
        obstacle = None if model is None else folding_obstacle(model)
        advice = "fold_norms_(model, untie=True) makes it exact"
        if obstacle is not None:
            advice = f"folding cannot make it exact: {obstacle}"
        raise ValueError(
            "residual=True needs an exact symmetry of the residual stream, O(d) is broken by "
            f"{', '.join(stream.broken_by[:3])}; {advice}"
        )
    return stream, stream.group


@torch.no_grad()
def canonical_rotation(model: nn.Module, symmetries: SymmetryMap) -> tuple[Tensor, Tensor]:
    """The rotation into the principal axes of the residual stream.

    Q = Vᵀ with the eigenvectors V of ``XᵀX = Σ WᵀW``, factor pairs in their balanced section, which
    makes the sum independent of their gauge. Axes come in decreasing order of eigenvalues; signs
    and equal eigenvalues are fixed as in :mod:`quotientopt.canonical.elements`, by the columns of
    the matrices outside the head pairs. On a centred stream all this is done with the parts
    orthogonal to the all-ones vector.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap

    Returns
    -------
    rotation : Tensor
        Q, shape (d, d).
    gap : Tensor
        Smallest difference of neighbouring roots of eigenvalues over the largest, shape (1,).

    Raises
    ------
    ValueError
        If the stream has no symmetry, or no matrix outside the head pairs is there to fix signs.
    """
    stream, group = require_group(symmetries, model)
    axes = residual_axes(stream)
    outside = {n: o for n, o in outside_of(model, symmetries).items() if o.axis is not None}
    if not outside:
        raise ValueError(
            "residual=True needs a matrix on the residual stream outside the head pairs: their "
            "rows are known up to signs, which cannot fix those of the stream"
        )
    device = next(iter(outside.values())).parameter.device
    size = stream.dimension
    covariance = torch.zeros(size, size, dtype=wide_dtype(device), device=device)
    for part in outside.values():
        rows = part.rows()
        covariance += (rows.mT @ rows).to(device)
    covariance += _balanced_covariance(symmetries, axes, covariance)
    values, vectors = torch.linalg.eigh(moving_block(group, covariance))
    values, vectors = values.flip(-1).clamp_min(0).sqrt()[None], vectors.flip(-1)

    def dressed(part: Outside, columns: slice) -> Tensor:
        return (group.moving_part(part.rows()).to(device) @ vectors[:, columns]).mT

    largest = [first_largest(dressed(part, slice(None))) for part in outside.values()]
    turn = torch.diag_embed(row_signs(torch.cat(largest, dim=-1)).squeeze(-1))
    for start, stop in clusters(values, next(iter(outside.values())).parameter.dtype):
        equal = [dressed(part, slice(start, stop)) for part in outside.values()]
        turn[start:stop, start:stop] = pivoted_rotation(torch.cat(equal, dim=-1))
    return group.element_of_moving(turn @ vectors.mT), smallest_gap(values)


def _balanced_covariance(symmetries: SymmetryMap, axes: Mapping[int, int], like: Tensor) -> Tensor:
    """``Σ FᵀF`` over the blocks F of all factor pairs in their balanced section, shape (d, d)."""
    total = torch.zeros_like(like)
    elements, view = balanced_elements(symmetries), of_unit_length(symmetries)
    for symmetry in symmetries.pairs:
        g, contragredient, _ = elements[symmetry.name]
        sides = ((symmetry.left_blocks, contragredient), (right_blocks(symmetry), g))
        for blocks, element in sides:
            for block in blocks:
                rows = stream_rows(block, axes, view)
                if rows is not None:
                    rows = (element @ rows).flatten(0, -2)
                    total += (rows.mT @ rows).to(total)
    return total


def stream_rows(block: Block, axes: Mapping[int, int], view: BlockView = stored) -> Tensor | None:
    """The block ``(heads, r, d)`` if its columns are the residual stream, else None.

    Raises
    ------
    ValueError
        If its parameter is on the stream with another axis than the columns.
    """
    axis = axes.get(id(block.parameter))
    if axis is None:
        return None
    if block.column_axis != axis:
        raise ValueError(
            f"the columns of a block of {block.name!r} are not its residual axis {axis}, so that "
            "the stream cannot be brought into a canonical frame; use residual=False"
        )
    return view(block)
