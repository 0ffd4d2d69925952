"""How far two models are apart, whatever their gauges.

In reading order: :func:`distance`; distances between orbits of pairs, of compact groups, of planes
that share a frequency, of hidden units; the residual stream of both and what lies outside the
pairs; and whether two models can be compared at all (:func:`refuse_different`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quotientopt._linalg import Pair, outside_autocast, wide_dtype
from quotientopt.canonical.elements import (
    compact_factor,
    manifold_of,
    unit_elements,
)
from quotientopt.canonical.reading import (
    BlockView,
    Outside,
    is_compact,
    joint,
    of_unit_length,
    outside_of,
    pair_of,
    rotated,
    stored,
    symmetries_of,
)
from quotientopt.groups import (
    O,
    PlaneCommutant,
    Scale,
    StructureGroup,
)
from quotientopt.manifolds.orbits import squared_distance
from quotientopt.symmetries import HeadSymmetry, ScaleSymmetry, SymmetryMap

OTHER, TOTAL = "other", "total"


@torch.no_grad()
@outside_autocast()
def distance(
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    symmetries: tuple[SymmetryMap, SymmetryMap] | None = None,
    residual: bool = True,
    relative: bool = False,
) -> dict[str, float]:
    """Distance of two models of one architecture, in invariants.

    Head pairs by their invariants, ``‖A₁ᵀB₁ − A₂ᵀB₂‖_F`` under GL(r), the same plane by plane under
    rotary commutants (:meth:`FactorQuotient.distance`), ``min_k ‖k [A₁ B₁] − [A₂ B₂]‖_F`` under
    compact groups; hidden units by :func:`unit_distance`; without an n×m matrix and without
    cancellation; all other parameters by the Frobenius norm of their difference. A bias that may
    be translated does not count, an output bias that takes up that of the values counts as what
    it is in effect, ``β = b_O + Σ_h W_O b_V``, and normalised queries and keys count at one length.
    So two gauges of one model are at distance zero up to rounding.

    Parameters
    ----------
    model_a, model_b : Module
        With parameters of the same names and shapes, and the same symmetries.
    symmetries : pair of SymmetryMap, optional
        Those of both models; found by default.
    residual : bool
        Where both models have O(d) or O(d − 1) on the residual stream, rotate the second one's to
        where its parameters outside the factor pairs are closest to the first one's (Procrustes).
    relative : bool
        Divide every distance by the root mean square of both norms: 0 for equal, √2 for unrelated,
        2 for opposite ones.

    Returns
    -------
    dict of str to float
        Name of a head symmetry or of hidden units to distance, ``"other"`` for all further
        parameters, and ``"total"``, the root of the sum of squares.

    Raises
    ------
    ValueError
        If names, shapes or symmetries differ, or values are not finite; the first is named.

    Notes
    -----
    The rotation does not look at the factor pairs, whose gauges it must not depend on. So the
    result is an upper bound of the distance modulo O(d); for two gauges of one model it is zero if
    the matrices outside the pairs span the residual stream, as embeddings do.
    """
    map_a, map_b = symmetries or (None, None)
    map_a, map_b = symmetries_of(model_a, map_a), symmetries_of(model_b, map_b)
    refuse_different(model_a, model_b, map_a, map_b)
    outside_a, outside_b = outside_of(model_a, map_a), outside_of(model_b, map_b)
    rotation: Tensor | None = None
    view: BlockView = stored
    stream, group = map_b.residual, common_residual_group(map_a, map_b)
    if residual and stream is not None and group is not None:
        overlap = overlap_outside(outside_b, outside_a, stream.dimension)
        _refuse_nonfinite("the parameters on the residual stream", overlap)
        rotation = compact_factor(group, overlap)
        view = rotated(stream, rotation)
    squares: dict[str, tuple[float, float]] = {}
    others = {symmetry.name: symmetry for symmetry in map_b.heads}
    view_a, view = of_unit_length(map_a), of_unit_length(map_b, view)
    for one in map_a.heads:
        x, y = pair_of(one, view_a), pair_of(others[one.name], view)
        y = (y[0].to(x[0].device), y[1].to(x[1].device))
        between = _distance_of(one)
        zero = (torch.zeros_like(x[0]), torch.zeros_like(x[1]))
        norms = between(x, zero).square() + between(y, zero).square()
        apart = between(x, y).square()
        _refuse_nonfinite(f"symmetry {one.name!r}", apart)
        squares[one.name] = apart.sum().item(), norms.sum().item() / 2
    others = {symmetry.name: symmetry for symmetry in map_b.hidden_units}
    for one in map_a.hidden_units:
        squares[one.name] = _unit_squares(one, others[one.name], view_a, view)
    squares[OTHER] = _outside_squares(outside_a, outside_b, rotation)
    squares[TOTAL] = tuple(map(sum, zip(*squares.values(), strict=True)))  # type: ignore[assignment]
    if not relative:
        return {name: math.sqrt(square) for name, (square, _) in squares.items()}
    return {
        name: math.sqrt(square / norm) if norm else 0.0 for name, (square, norm) in squares.items()
    }


def _distance_of(symmetry: HeadSymmetry) -> Callable[[Pair, Pair], Tensor]:
    """The distance between orbits of a symmetry's pairs, one number per head."""
    if is_compact(symmetry.group):
        return functools.partial(compact_distance, symmetry.group)
    if isinstance(symmetry.group, PlaneCommutant):
        return functools.partial(frequency_distance, symmetry.group)
    return manifold_of(symmetry).distance


def compact_distance(group: StructureGroup, x: Pair, y: Pair) -> Tensor:
    """``min_k ‖k [A₁ B₁] − [A₂ B₂]‖_F`` over a compact group, per head."""
    X, Y = joint(x), joint(y)
    return torch.linalg.matrix_norm(compact_factor(group, Y @ X.mT) @ X - Y)


def frequency_distance(group: PlaneCommutant, x: Pair, y: Pair) -> Tensor:
    """Distance between the products ``aᴴ b`` of all frequencies and of the passing rows."""
    squared = torch.zeros((), dtype=x[0].dtype, device=x[0].device)
    (a1, p1), (b1, q1), (a2, p2), (b2, q2) = (group.complex_rows(X) for X in (*x, *y))
    for a, b, c, d in zip(a1, b1, a2, b2, strict=True):
        squared = squared + squared_distance((a, b), (c, d)).sum(dim=-1)
    if group.pass_rows:
        squared = squared + squared_distance((p1, q1), (p2, q2))
    return squared.sqrt()


def unit_distance(group: StructureGroup, x: Pair, y: Pair) -> Tensor:
    """Distance of hidden units in invariants, ``(units,)``, from balanced pairs of one row each.

    Under GL(1) ``‖a₁ᵀb₁ − a₂ᵀb₂‖_F``. Positive scales see more than that product, which a ReLU
    unit shares with its negative: there ``[b, |b|] / √2`` is in the place of b.

    Parameters
    ----------
    group : StructureGroup
        GL(1) or Scale(1).
    x, y : pair of Tensor
        Shapes ``(units, 1, n)`` and ``(units, 1, m)``.
    """
    if isinstance(group, Scale):
        (a1, b1), (a2, b2) = (
            (a, torch.cat((b, torch.linalg.vector_norm(b, dim=-1, keepdim=True)), -1) / 2**0.5)
            for a, b in (x, y)
        )
    else:
        (a1, b1), (a2, b2) = x, y
        overlap = (a1 * a2).sum(-1, keepdim=True) + (b1 * b2).sum(-1, keepdim=True)
        sign = torch.where(overlap < 0, -1, 1)
        a2, b2 = sign * a2, sign * b2
    # a₁ᵀb₁ − a₂ᵀb₂ = āᵀ(b₁ − b₂) + (a₁ − a₂)ᵀb̄ with the means: no difference of large numbers.
    a, b, u, v = (a1 + a2) / 2, (b1 + b2) / 2, a1 - a2, b1 - b2
    square = (
        a.square().sum(-1) * v.square().sum(-1)
        + u.square().sum(-1) * b.square().sum(-1)
        + 2 * (a * u).sum(-1) * (b * v).sum(-1)
    )
    return square.clamp_min(0).sqrt().squeeze(-1)


def _unit_squares(
    one: HeadSymmetry, other: HeadSymmetry, view_one: BlockView, view_other: BlockView
) -> tuple[float, float]:
    """Sum of squared distances of hidden units, and mean of the squared norms."""
    pairs = []
    for symmetry, view in ((one, view_one), (other, view_other)):
        g, contragredient, _ = unit_elements(symmetry, view)
        A, B = pair_of(symmetry, view)
        device = one.blocks[0].parameter.device
        pairs.append(((contragredient * A).to(device), (g * B).to(device)))
    apart = unit_distance(one.group, *pairs)
    _refuse_nonfinite(f"symmetry {one.name!r}", apart)
    norms = sum((a.square().sum(-1) * b.square().sum(-1)).sum().item() for a, b in pairs)
    return apart.square().sum().item(), norms / 2


def common_residual_group(first: SymmetryMap, second: SymmetryMap) -> O | None:
    """The group of the residual stream, if both models have the same one on the same axes."""
    one, two = first.residual, second.residual
    if one is None or two is None or one.group != two.group or dict(one.axes) != dict(two.axes):
        return None
    return one.group


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


def _outside_squares(
    first: Mapping[str, Outside], second: Mapping[str, Outside], rotation: Tensor | None
) -> tuple[float, float]:
    """Sum of squared differences, and mean of the squared norms."""
    apart = norms = 0.0
    for name, one in first.items():
        x = one.values()
        y = second[name].values(rotation).to(x.device)
        # Norms need no further copies of what may be a large embedding.
        square = torch.linalg.vector_norm(x - y).square()
        _refuse_nonfinite(f"parameter {name!r}", square)
        apart += square.item()
        norms += sum(torch.linalg.vector_norm(z).square().item() for z in (x, y)) / 2
    return apart, norms


def _refuse_nonfinite(what: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{what} of one of the models has non-finite entries")


def refuse_different(
    first: nn.Module, second: nn.Module, symmetries: SymmetryMap, others: SymmetryMap
) -> None:
    """Refuse models whose parameters or head symmetries differ in name or shape.

    Raises
    ------
    ValueError
        Naming the first difference.
    """
    one, two = (dict(model.named_parameters()) for model in (first, second))
    for name in sorted(one.keys() ^ two.keys()):
        raise ValueError(
            f"the models have different parameters: {name!r} is in the "
            f"{'first' if name in one else 'second'} only"
        )
    for name, parameter in one.items():
        if parameter.shape != two[name].shape:
            raise ValueError(
                f"the models differ in {name!r}: {tuple(parameter.shape)} and "
                f"{tuple(two[name].shape)}"
            )
    left, right = (_symmetries(found) for found in (symmetries, others))
    for name in sorted(left.keys() ^ right.keys()):
        raise ValueError(
            f"the models have different symmetries: {name!r} is in the "
            f"{'first' if name in left else 'second'} only"
        )
    for name, symmetry in left.items():
        if _form(symmetry) != _form(right[name]):
            raise ValueError(f"the models differ in symmetry {name!r}: {symmetry}, {right[name]}")


def _symmetries(found: SymmetryMap) -> dict[str, HeadSymmetry | ScaleSymmetry]:
    return {symmetry.name: symmetry for symmetry in found.linear}


def _form(symmetry: HeadSymmetry | ScaleSymmetry) -> tuple[object, ...]:
    if isinstance(symmetry, ScaleSymmetry):
        return symmetry.group, [block.size for block in symmetry.blocks]
    left, right, moved = symmetry.left_blocks, symmetry.right_blocks, symmetry.translation
    affine = None
    if moved is not None:
        places = [block is one for one in moved.blocks for block in right]
        affine = (places, moved.sink is not None)
    return symmetry.group, [b.size for b in left], [b.size for b in right], affine
