"""Frames for the hidden axes of MLPs, as symmetries that the model does not have."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import O
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap, find_symmetries


def with_hidden_blocks(model: Any, rows: int) -> SymmetryMap:
    """The model's symmetries, and blocks of hidden rows of every MLP as heads under O(rows).

    The activation leaves only permutations of the hidden rows, so these are frames for Adam and
    nothing else: rotations of a block change what the model computes.

    Parameters
    ----------
    model : Module
        A reference model, whose MLPs have ``up``, perhaps ``gate``, and ``down``.
    rows : int
        Of a block; divides the hidden width.

    Raises
    ------
    ValueError
        If it does not.
    """
    found = find_symmetries(model)
    hidden = []
    for index, layer in enumerate(model.blocks):
        prefix = f"blocks.{index}.mlp"
        readers = [name for name in ("gate", "up") if hasattr(layer.mlp, name)]
        width = layer.mlp.down.weight.size(1)
        if width % rows:
            raise ValueError(f"{prefix} has {width} hidden rows, no multiple of {rows}")
        left = []
        for name in readers:
            weight = getattr(layer.mlp, name).weight
            view = weight.detach().unflatten(0, (-1, rows))
            left.append(Block.of(view, weight, f"{prefix}.{name}.weight"))
        weight = layer.mlp.down.weight
        view = weight.detach().unflatten(1, (-1, rows)).permute(1, 2, 0)
        right = Block.of(view, weight, f"{prefix}.down.weight")
        hidden.append(HeadSymmetry(left, [right], O(rows), f"{prefix}.hidden"))
    return SymmetryMap(
        [*found.heads, *hidden],
        found.residual,
        residual_reason=found.residual_reason,
        unrecognized=found.unrecognized,
    )
