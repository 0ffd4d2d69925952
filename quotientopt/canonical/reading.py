"""A model's parameters as they lie in it: factor pairs, and what is outside them.

Read in the widest precision, one symmetry at a time: blocks of different layers are separate
tensors, so that products of the parameters' size are formed symmetry by symmetry; what is r×r is
then stacked and decomposed at once.

What a translation moves is read as no part of a pair: of the biases ``b_i ↦ b_i + t`` only the
differences ``b_i − b_0`` are left, and what the values' bias adds to the output is read with the
output's bias (:func:`effective_shift`). Normalised queries and keys are read at one length
(:func:`unit_lengths`). So all that is read is the same in every gauge but for the linear part.

In reading order: the symmetries that are asked for (:func:`symmetries_of`); views of blocks;
factors, pairs and their Gram matrices; translations and lengths; heads of several symmetries
stacked; and the parameters :class:`Outside` the pairs: embeddings, norms, biases of writing layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import Pair, gram, wide
from quotientopt.groups import O, RotaryPhases, StructureGroup
from quotientopt.symmetries import (
    Block,
    HeadSymmetry,
    ResidualStream,
    ScaleSymmetry,
    SymmetryMap,
    symmetries_from,
)

BlockView = Callable[[Block], Tensor]


def symmetries_of(
    model: nn.Module,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
    example_inputs: Any = None,
) -> SymmetryMap:
    """The symmetries given, or found, once it is clear that they are those of the model.

    With example inputs also those that no class tells.

    Raises
    ------
    TypeError
        If the model is no Module.
    ValueError
        If a symmetry acts on a tensor that is no parameter of the model, or on a quantised one.
    """
    if symmetries is None:
        return symmetries_from(model, example_inputs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(symmetries, SymmetryMap):
        symmetries = SymmetryMap(symmetries)
    own = {id(parameter) for parameter in model.parameters()}
    touched = [(name, p) for name in symmetries.names for p in symmetries.parameters_of(name)]
    for name, parameter in touched:
        if id(parameter) not in own:
            raise ValueError(
                f"symmetry {name!r} acts on a tensor that is no parameter of this "
                f"{type(model).__name__}; find the symmetries of this very model"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"symmetry {name!r} acts on a parameter of dtype {parameter.dtype} (quantised); "
                "dequantise it, or leave the symmetry out with symmetries="
            )
    return symmetries


def require_heads(model: nn.Module, symmetries: SymmetryMap) -> SymmetryMap:
    """The symmetries, unless there is none of a head.

    Raises
    ------
    ValueError
        Naming what was not understood, or has no gauge.
    """
    if not symmetries.heads:
        raise _nothing_known(model, symmetries)
    return symmetries


def require_pairs(model: nn.Module, symmetries: SymmetryMap) -> SymmetryMap:
    """The symmetries, unless there is no factor pair: none of a head, none of hidden units.

    Raises
    ------
    ValueError
        As of :func:`require_heads`.
    """
    if not symmetries.pairs:
        raise _nothing_known(model, symmetries)
    return symmetries


def _nothing_known(model: nn.Module, symmetries: SymmetryMap) -> ValueError:
    kind = type(model).__name__
    if symmetries.gauge_free and not symmetries.unrecognized:
        return ValueError(
            f"{kind} has no head symmetry to divide out: the heads of "
            f"{', '.join(symmetries.gauge_free)} hold or read invariants"
        )
    unknown = ", ".join(symmetries.unrecognized) or "nothing that looks like attention"
    return ValueError(
        f"no head symmetry of {kind} is known (not understood: {unknown}); "
        "pass symmetries=find_symmetries(model, batch), which finds them from gradients, or "
        "register an adapter"
    )


def stored(block: Block) -> Tensor:
    """The block as it is, ``(heads, r, n)``, in the widest precision."""
    return wide(block.view())


def rotate_axis(tensor: Tensor, axis: int, rotation: Tensor) -> Tensor:
    """``W Qᵀ`` along one axis of a tensor."""
    return (tensor.movedim(axis, -1) @ rotation.to(tensor).mT).movedim(-1, axis)


def rotated(stream: ResidualStream, rotation: Tensor) -> BlockView:
    """Blocks as they will be once the residual stream has been rotated by ``W ↦ W Qᵀ``.

    Parameters
    ----------
    stream : ResidualStream
    rotation : Tensor
        Q, shape (d, d).
    """
    axes = {id(stream.parameters[name]): axis for name, axis in stream.axes.items()}

    def view(block: Block) -> Tensor:
        axis = axes.get(id(block.parameter))
        if axis is None:
            return stored(block)
        return block.view(rotate_axis(wide(block.parameter.detach()), axis, rotation))

    return view


def factor(blocks: Iterable[Block], view: BlockView = stored) -> Tensor:
    """One factor, its blocks side by side: ``(heads, r, Σ n_i)``."""
    return torch.cat([view(block) for block in blocks], dim=-1)


def moved_first(symmetry: HeadSymmetry) -> Block | None:
    """The bias that a section of the translations makes zero: the first that they move."""
    return None if symmetry.translation is None else symmetry.translation.blocks[0]


def right_blocks(symmetry: HeadSymmetry) -> tuple[Block, ...]:
    """Blocks of the right factor without the bias that a translation makes zero.

    Raises
    ------
    ValueError
        If they have fewer columns than rows, so that they cannot have full row rank.
    """
    first = moved_first(symmetry)
    if first is None:
        return symmetry.right_blocks
    blocks = tuple(block for block in symmetry.right_blocks if block is not first)
    columns = sum(block.size[2] for block in blocks)
    if columns < symmetry.rank:
        raise ValueError(
            f"symmetry {symmetry.name!r}: the right factor has {columns} columns, fewer than its "
            f"{symmetry.rank} rows, without the bias {first.name!r}, which may be translated to "
            "zero; leave the symmetry out with symmetries="
        )
    return blocks


def columns_of(symmetry: HeadSymmetry) -> tuple[int, int]:
    """Numbers of columns (n, m) of the two factors as they are read."""
    return symmetry.columns[0], sum(block.size[2] for block in right_blocks(symmetry))


def untranslated(symmetry: HeadSymmetry, view: BlockView = stored) -> BlockView:
    """Blocks with the first translated bias subtracted from the others that move with it."""
    first = moved_first(symmetry)
    if first is None or symmetry.translation is None or len(symmetry.translation.blocks) == 1:
        return view
    moved = {id(block) for block in symmetry.translation.blocks}
    return lambda block: view(block) - view(first) if id(block) in moved else view(block)


def right_factor(symmetry: HeadSymmetry, view: BlockView = stored) -> Tensor:
    """The right factor as no translation changes it, ``(heads, r, m)``."""
    return factor(right_blocks(symmetry), untranslated(symmetry, view))


def is_compact(group: StructureGroup) -> bool:
    """Whether all elements of the group are orthogonal."""
    return isinstance(group, O | RotaryPhases)


def joint(pair: Pair) -> Tensor:
    """``[A B]``."""
    return torch.cat(pair, dim=-1)


def pair_of(symmetry: HeadSymmetry, view: BlockView = stored) -> Pair:
    """Both factors (A, B), without what a translation moves."""
    return factor(symmetry.left_blocks, view), right_factor(symmetry, view)


def grams_of(symmetry: HeadSymmetry, view: BlockView = Block.view) -> Pair:
    """``A Aᵀ`` and ``B Bᵀ``, each ``(heads, r, r)``: sums over the blocks of :func:`pair_of`."""
    return (
        sum_of_grams(symmetry.left_blocks, view),
        sum_of_grams(right_blocks(symmetry), untranslated(symmetry, view)),
    )


def sum_of_grams(blocks: Iterable[Block], view: BlockView = Block.view) -> Tensor:
    """``Σ F Fᵀ`` over blocks F, ``(heads, r, r)``."""
    return torch.stack([gram(view(block)) for block in blocks]).sum(0)


def translations_to_zero(symmetries: Iterable[HeadSymmetry]) -> dict[str, Tensor]:
    """``−b`` of every bias that may be translated, ``(heads, r)`` by the symmetry's name."""
    return {
        symmetry.name: -stored(first).squeeze(-1)
        for symmetry in symmetries
        if (first := moved_first(symmetry)) is not None
    }


def effective_shift(symmetry: HeadSymmetry) -> Tensor | None:
    """``Σ_h W_O b_V``, which the values' bias adds to the output, ``(d,)``; None without a sink.

    Together with the output's bias it is invariant: ``β = b_O + Σ_h W_O b_V``.
    """
    if symmetry.translation is None or symmetry.translation.sink is None:
        return None
    bias = stored(symmetry.translation.blocks[0]).squeeze(-1)
    # Blocks of one left factor differ in what reads the values, not in the output they add to.
    shifts = [
        torch.einsum("hrd,hr->d", stored(block), bias.to(block.parameter.device))
        for block in symmetry.left_blocks
    ]
    return torch.stack(shifts).sum(0)


def unit_lengths(scales: Iterable[ScaleSymmetry]) -> dict[str, Tensor]:
    """Factors that give every normalised head rows of unit length on the average.

    Returns
    -------
    dict of str to Tensor
        ``√r / ‖X‖_F``, ``(heads, 1, 1)`` by name; one where X vanishes.
    """
    found = {}
    for scale in scales:
        squares = torch.stack(
            [stored(block).square().sum(dim=(-2, -1), keepdim=True) for block in scale.blocks]
        ).sum(0)
        if not bool(squares.isfinite().all()):
            raise ValueError(f"symmetry {scale.name!r} has non-finite entries")
        length = (squares / scale.rank).sqrt()
        found[scale.name] = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 1)
    return found


def multipliers(symmetries: SymmetryMap) -> dict[int, Tensor]:
    """:func:`unit_lengths` entry by entry: ``id`` of a parameter to a tensor laid out like it."""
    found: dict[int, Tensor] = {}
    lengths = unit_lengths(symmetries.scales)
    for scale in symmetries.scales:
        for block in scale.blocks:
            parameter, factors = block.parameter, lengths[scale.name]
            if id(parameter) not in found:
                found[id(parameter)] = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=factors.dtype, device=factors.device
                ).fill_(1)
            block.view(found[id(parameter)]).mul_(factors)
    return found


def of_unit_length(symmetries: SymmetryMap, view: BlockView = stored) -> BlockView:
    """Blocks as they are once normalised queries and keys have been brought to one length."""
    factors = multipliers(symmetries)
    if not factors:
        return view

    def scaled(block: Block) -> Tensor:
        factor = factors.get(id(block.parameter))
        rows = view(block)
        return rows if factor is None else rows * block.view(factor)

    return scaled


def of_one_group(symmetries: Iterable[HeadSymmetry]) -> list[list[HeadSymmetry]]:
    """Symmetries whose r×r matrices can be stacked: of one structure group on one device."""
    members: dict[object, list[HeadSymmetry]] = defaultdict(list)
    for symmetry in symmetries:
        members[symmetry.group, symmetry.blocks[0].parameter.device].append(symmetry)
    return list(members.values())


def split_heads(symmetries: Sequence[HeadSymmetry], stacked: Tensor) -> dict[str, Tensor]:
    """Undo the stacking of the heads of several symmetries along the first axis."""
    parts = stacked.split([symmetry.heads for symmetry in symmetries])
    return {symmetry.name: part for symmetry, part in zip(symmetries, parts, strict=True)}


def query_groups(symmetry: HeadSymmetry) -> list[tuple[Block, ...]]:
    """Left blocks by query head of a key-value head: weight and bias of each together.

    With grouped queries the left factor holds the blocks of k query heads side by side. Where the
    blocks do not divide evenly, and under compact groups, whose invariants mix all columns, there
    is one.
    """
    by_width: dict[int, list[Block]] = defaultdict(list)
    for block in symmetry.left_blocks:
        by_width[block.size[2]].append(block)
    counts = {len(blocks) for blocks in by_width.values()}
    if len(counts) != 1 or is_compact(symmetry.group):
        return [symmetry.left_blocks]
    return list(zip(*by_width.values(), strict=True))


@dataclass(frozen=True, eq=False)
class Outside:
    """A parameter, or what the factor pairs leave of it.

    Attributes
    ----------
    parameter : Tensor
    covered : Tensor, optional
        Mask of the entries that belong to factor pairs; None if there are none.
    axis : int, optional
        Which axis is the residual stream; None if none is.
    shift : Tensor, optional
        What the biases of values add to an output bias: it is read as ``β = b_O + Σ_h W_O b_V``.
    multiplier : Tensor, optional
        What brings normalised queries and keys to one length.
    """

    parameter: Tensor
    covered: Tensor | None
    axis: int | None
    shift: Tensor | None = None
    multiplier: Tensor | None = None

    def values(self, rotation: Tensor | None = None) -> Tensor:
        """The values in the widest precision, zero where covered, as no translation changes them.

        Parameters
        ----------
        rotation : Tensor, optional
            Q: as they are after ``W ↦ W Qᵀ``.
        """
        values = wide(self.parameter.detach())
        if self.shift is not None:
            values = values + self.shift.to(values)
        if self.multiplier is not None:
            values = values * self.multiplier
        if self.covered is not None:
            values = values.masked_fill(self.covered, 0)
        if rotation is not None and self.axis is not None:
            values = rotate_axis(values, self.axis, rotation)
        return values

    def rows(self) -> Tensor:
        """The values as ``(rows, d)``, the residual stream last."""
        assert self.axis is not None
        return self.values().movedim(self.axis, -1).reshape(-1, self.parameter.shape[self.axis])


def outside_of(model: nn.Module, symmetries: SymmetryMap) -> dict[str, Outside]:
    """Parameters that factor pairs do not cover, or not wholly, by name."""
    covered: dict[int, Tensor] = {}
    for symmetry in symmetries.pairs:
        for block in symmetry.blocks:
            parameter = block.parameter
            if id(parameter) not in covered:
                covered[id(parameter)] = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=torch.bool, device=parameter.device
                ).fill_(False)
            block.view(covered[id(parameter)]).fill_(True)
    axes = residual_axes(symmetries.residual)
    shifts, factors = effective_shifts(symmetries), multipliers(symmetries)
    found = {}
    for name, parameter in model.named_parameters():
        mask, key = covered.get(id(parameter)), id(parameter)
        if mask is None or not bool(mask.all()):
            found[name] = Outside(parameter, mask, axes.get(key), shifts.get(key), factors.get(key))
    return found


def effective_shifts(symmetries: SymmetryMap) -> dict[int, Tensor]:
    """What biases of values add to output biases: ``id`` of these to tensors shaped like them."""
    found: dict[int, Tensor] = {}
    for symmetry in symmetries.heads:
        shift = effective_shift(symmetry)
        if shift is None or symmetry.translation is None or symmetry.translation.sink is None:
            continue
        sink = symmetry.translation.sink
        parameter = sink.parameter
        if id(parameter) not in found:
            found[id(parameter)] = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=shift.dtype, device=parameter.device
            ).zero_()
        sink.view(found[id(parameter)]).add_(shift.to(parameter.device))
    return found


def residual_axes(stream: ResidualStream | None) -> dict[int, int]:
    """``id`` of every parameter on the residual stream to its axis."""
    if stream is None:
        return {}
    return {id(stream.parameters[name]): axis for name, axis in stream.axes.items()}
