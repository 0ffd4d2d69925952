"""Factor pairs as they lie in a model: read in the widest precision, one symmetry at a time.

Blocks of different layers are separate tensors, so that products of the parameters' size are formed
symmetry by symmetry; what is r×r is then stacked and decomposed at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from quotientopt._linalg import Pair, gram, wide
from quotientopt.canonical.compact import is_compact
from quotientopt.symmetries import Block, HeadSymmetry, ResidualStream, SymmetryMap, find_symmetries

BlockView = Callable[[Block], Tensor]


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


def pair_of(symmetry: HeadSymmetry, view: BlockView = stored) -> Pair:
    """Both factors (A, B)."""
    return factor(symmetry.left_blocks, view), factor(symmetry.right_blocks, view)


def grams_of(symmetry: HeadSymmetry) -> Pair:
    """``A Aᵀ`` and ``B Bᵀ``, each ``(heads, r, r)``: sums over the blocks."""
    left, right = (
        torch.stack([gram(block.view()) for block in blocks]).sum(0)
        for blocks in (symmetry.left_blocks, symmetry.right_blocks)
    )
    return left, right


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


def symmetries_of(
    model: nn.Module, symmetries: SymmetryMap | Sequence[HeadSymmetry] | None
) -> SymmetryMap:
    """The symmetries given, or found, once it is clear that they are those of the model.

    Raises
    ------
    TypeError
        If the model is no Module.
    ValueError
        If a symmetry acts on a tensor that is no parameter of the model, or on a quantised one.
    """
    if symmetries is None:
        return find_symmetries(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(symmetries, SymmetryMap):
        symmetries = SymmetryMap(symmetries)
    own = {id(parameter) for parameter in model.parameters()}
    touched = [(s.name, block.parameter) for s in symmetries.heads for block in s.blocks]
    if symmetries.residual is not None:
        touched += [("residual", p) for p in symmetries.residual.parameters.values()]
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
        if symmetries.gauge_free and not symmetries.unrecognized:
            raise ValueError(
                f"{type(model).__name__} has no head symmetry to divide out: the heads of "
                f"{', '.join(symmetries.gauge_free)} hold or read invariants"
            )
        unknown = ", ".join(symmetries.unrecognized) or "nothing that looks like attention"
        raise ValueError(
            f"no head symmetry of {type(model).__name__} is known (not understood: {unknown}); "
            "register an adapter, or pass symmetries="
        )
    return symmetries
