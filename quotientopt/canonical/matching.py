"""Whether two models can be compared: the same parameters, the same symmetries."""

from __future__ import annotations

from torch import nn

from quotientopt.symmetries import HeadSymmetry, ScaleSymmetry, SymmetryMap


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
