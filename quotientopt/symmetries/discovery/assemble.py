"""From rows of equal charge to symmetries whose blocks are views of the model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from quotientopt.groups import GL
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.discovery.charges import Part, Rows
from quotientopt.symmetries.discovery.pairs import FoundPair, common_module, silent_bias
from quotientopt.symmetries.discovery.point import Gradients
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry, Translation
from quotientopt.symmetries.registry import qualified

Piece = tuple[Part, Tensor]


def symmetries_of(
    pair: FoundPair,
    name: str,
    parameters: Mapping[str, nn.Parameter],
    gradients: Gradients,
) -> Iterator[HeadSymmetry]:
    """Symmetries with the blocks of a pair: one, or several where heads lie at uneven distances.

    Nothing where the rows of a head do, or where a factor has fewer columns than rows.

    Parameters
    ----------
    pair : FoundPair
    name : str
    parameters : mapping of str to Parameter
        Of the model, by name: where an output bias is looked for.
    gradients : Gradients
    """
    left = [
        (rows.parts[i], index) for i in (0, 1) for rows, index in pair.left if len(rows.parts) > i
    ]
    right = [(part, pair.right[1]) for part in pair.right[0].parts]
    if min(sum(part.rows.shape[-1] for part, _ in side) for side in (left, right)) < pair.rank:
        return
    runs = list(_even_runs([*left, *right]))
    for number, run in enumerate(runs):
        A, B = ([_block(part, index[run]) for part, index in side] for side in (left, right))
        translation = _translation(pair, B, parameters, gradients)
        part_name = qualified(name, str(number)) if len(runs) > 1 else name
        yield HeadSymmetry(A, B, pair.group, part_name, translation=translation)


def scale_of(rows: Rows, index: Tensor, name: str) -> ScaleSymmetry | None:
    """The scales of heads ``(heads, r)`` of one factor; None where the heads lie unevenly."""
    pieces = [(part, index) for part in rows.parts]
    runs = list(_even_runs(pieces))
    if len(runs) != 1:
        return None
    return ScaleSymmetry([_block(part, index) for part, index in pieces], name)


def _even_runs(pieces: Sequence[Piece]) -> Iterator[slice]:
    """Runs of heads at constant distances in every parameter; none if the rows are not."""
    offsets = [part.offsets(index) for part, index in pieces]
    for offset in offsets:
        steps = offset.diff(dim=-1)
        if steps.numel() and not bool(((steps == steps[0, 0]) & (steps > 0)).all()):
            return
    heads = len(offsets[0])
    steps = torch.stack([offset[:, 0].diff() for offset in offsets])
    start = 0
    while start < heads:
        end = start + 1
        while end < heads and bool(
            ((steps[:, end - 1] == steps[:, start]) & (steps[:, start] > 0)).all()
        ):
            end += 1
        yield slice(start, end)
        start = end


def _block(part: Part, index: Tensor) -> Block:
    offset = part.offsets(index)
    heads, rank = offset.shape
    columns = part.rows.shape[-1]
    row = int(offset[0, 1] - offset[0, 0]) if rank > 1 else 1
    head = int(offset[1, 0] - offset[0, 0]) if heads > 1 else rank * row
    axis = part.column_axis
    column = 1 if axis is None else part.parameter.stride(axis)
    return Block(
        part.parameter,
        part.name,
        (heads, rank, columns),
        (head, row, column),
        int(offset[0, 0]),
        tuple(part.parameter.stride()),
    )


def _translation(
    pair: FoundPair,
    right: Sequence[Block],
    parameters: Mapping[str, nn.Parameter],
    gradients: Gradients,
) -> Translation | None:
    """The affine part: a bias of keys without effect, one of values that an output bias takes."""
    rows, index = pair.right
    if len(rows.parts) < 2 or not isinstance(pair.group, GL) or pair.rank == 1:
        return None
    moved = (right[1],)
    if pair.scores:
        return Translation(moved) if silent_bias(rows, index) else None
    slopes = rows.parts[1].gradients(index)[..., 0]
    for name in _output_biases(pair, parameters, gradients):
        through: Tensor | float = 0.0
        size: Tensor | float = 0.0
        # ∂b_V = W_Oᵀ ∂b_O is Noether's identity of the translation.
        gradient = gradients.of[name].whole().flatten(1)
        for left, members in pair.left:
            through = through + torch.einsum("hrd,kd->khr", left.parts[0].rows[members], gradient)
            size = size + torch.linalg.vector_norm(left.parts[0].rows[members], dim=-1)
        bound = size * torch.linalg.vector_norm(gradient, dim=-1).amax()
        precision = max(rows.precision for rows, _ in (*pair.left, pair.right))
        if bool(((slopes - through).abs() <= precision * bound).all()):
            bias = parameters[name]
            sink = Block(bias, name, (1, 1, bias.numel()), (0, 0, 1), 0, tuple(bias.stride()))
            return Translation(moved, sink)
    return None


def _output_biases(
    pair: FoundPair, parameters: Mapping[str, nn.Parameter], gradients: Gradients
) -> list[str]:
    """Vectors that may be the output bias, those beside the output matrix first."""
    output = pair.left[0][0].name
    scope = common_module([output, pair.right[0].name])
    columns = pair.left[0][0].columns
    near = [
        name
        for name, parameter in parameters.items()
        if parameter.ndim == 1
        and parameter.numel() == columns
        and parameter.stride(0) == 1
        and name in gradients.of
        and (not scope or name.startswith(f"{scope}."))
    ]
    module = output.rpartition(".")[0]
    return sorted(near, key=lambda name: name.rpartition(".")[0] != module)
