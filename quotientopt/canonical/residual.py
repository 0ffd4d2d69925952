"""Rotations of the residual stream: the canonical one, and the one nearest to another model.

All matrices on the stream, written with their residual axis last and stacked, are one point X of
the Gram quotient, on which Q acts by ``X ↦ X Qᵀ``. The stack is never formed: sums over its
matrices are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quotientopt._linalg import first_largest, row_signs, wide_dtype
from quotientopt.canonical.compact import moving_block
from quotientopt.canonical.elements import balanced_elements
from quotientopt.canonical.outside import Outside, outside_of, residual_axes
from quotientopt.canonical.reading import BlockView, of_unit_length, right_blocks, stored
from quotientopt.groups import O
from quotientopt.sections.convention import clusters, pivoted_rotation, smallest_gap
from quotientopt.symmetries import Block, ResidualStream, SymmetryMap
from quotientopt.symmetries.fold import folding_obstacle


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


@torch.no_grad()
def canonical_rotation(model: nn.Module, symmetries: SymmetryMap) -> tuple[Tensor, Tensor]:
    """The rotation into the principal axes of the residual stream.

    Q = Vᵀ with the eigenvectors V of ``XᵀX = Σ WᵀW``, factor pairs in their balanced section, which
    makes the sum independent of their gauge. Axes come in decreasing order of eigenvalues; signs
    and equal eigenvalues are fixed as in :mod:`quotientopt.canonical.convention`, by the columns of
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


def overlap_outside(
    moving: Mapping[str, Outside], fixed: Mapping[str, Outside], dimension: int
) -> Tensor:
    """``Σ W_fixedᵀ W_moving`` over the matrices on the residual stream, shape (d, d).

    The element Q of the stream's group closest to it brings all ``W_moving Qᵀ`` closest to
    ``W_fixed``.
    """
    parts = {name: part for name, part in moving.items() if part.axis is not None}
    device = next(iter(moving.values())).parameter.device
    total = torch.zeros(dimension, dimension, dtype=wide_dtype(device), device=device)
    for name, part in parts.items():
        total += (fixed[name].rows().to(part.parameter.device).mT @ part.rows()).to(total)
    return total
