"""From pairs of rows to what is claimed of a model, before it is proved.

Symmetries whose blocks are views of the parameters, and their scales, under names that say where
they are; then the residual stream that they read and write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quotientopt.groups import GL, O, StabilizerOfOnes
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.discovery.charges import Part, Rows
from quotientopt.symmetries.discovery.gradients import blocks
from quotientopt.symmetries.discovery.pairs import FoundPair, common_module, silent_bias
from quotientopt.symmetries.discovery.point import GenericPoint, Gradients
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry, Translation
from quotientopt.symmetries.registry import inside, qualified
from quotientopt.symmetries.verification import largest_deviation

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


def scales_of(pairs: Sequence[FoundPair], names: Names) -> Iterator[ScaleSymmetry]:
    """Candidates for scales: queries and keys whose own charges have no trace, head by head."""
    for pair in pairs:
        if not pair.scores or isinstance(pair.group, GL):
            continue
        for kind, sides in (("query", pair.left), ("key", (pair.right,))):
            for number, (rows, index) in enumerate(sides):
                trace = rows.charge[:, index].sum(-1).abs()
                if bool((trace <= rows.precision * rows.scale[index].sum(-1)).all()):
                    suffix = f"{kind}.{number}" if len(sides) > 1 else kind
                    scale = scale_of(rows, index, names.unique(scope_of(pair), f"{suffix}_scale"))
                    if scale is not None:
                        yield scale


class Names:
    """Names of symmetries: the module around their parameters, and what they are there."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._given: set[str] = set()

    def of(self, pair: FoundPair, pairs: Sequence[FoundPair]) -> str:
        scope = scope_of(pair)
        if pair.scores:
            kind = "qk"
            # Called after the attention, also where queries and keys are one matrix inside it.
            around = [scope_of(p) for p in pairs if not p.scores and p.rank > 1]
            scope = max((s for s in around if inside(scope, s)), key=len, default=scope)
        elif pair.rank == 1 and pair.heads > 1:
            kind = "units"
        elif _in_heads(pair) or any(
            other.scores and other.heads == 1 and inside(scope_of(other), scope) for other in pairs
        ):
            kind = "vo"
        else:
            kind = "chain"
        return self.unique(scope, kind)

    def unique(self, scope: str, kind: str) -> str:
        name, number = qualified(self._prefix, scope, kind), 1
        while name in self._given:
            number += 1
            name = qualified(self._prefix, scope, f"{kind}_{number}")
        self._given.add(name)
        return name


def _in_heads(pair: FoundPair) -> bool:
    """Whether one matrix reads several heads: a value-output pair, not a chain of linear maps."""
    return pair.heads * len(pair.left) > 1 and len({rows.key for rows, _ in pair.left}) == 1


def scope_of(pair: FoundPair) -> str:
    return common_module([*(rows.name for rows, _ in pair.left), pair.right[0].name])


NOT_ANALYSED = "what the model computes in its basis (found by its width; gains, norms or biases)"
CENTRING = "the centring of its norms (found by rotating it)"


@dataclass(frozen=True)
class FoundStream:
    """The stream as far as it is known without a class.

    Attributes
    ----------
    width : int
    axes : dict of str to int
        Parameter name to the axis of that width that reads or writes the stream.
    broken_by : tuple of str
        Empty if all of O(d) was proved, one entry if only the rotations that fix the ones were.
    """

    width: int
    axes: dict[str, int]
    broken_by: tuple[str, ...]

    @property
    def centred(self) -> bool:
        """Whether the stabiliser of the ones was proved, and no more."""
        return self.broken_by == (CENTRING,)


def find_stream(
    heads: Sequence[HeadSymmetry],
    units: Sequence[HeadSymmetry],
    parameters: Mapping[str, nn.Parameter],
    contracted: Mapping[str, set[int]],
    looked_up: Mapping[str, set[int]],
) -> FoundStream | None:
    """The stream that the heads read and write, and every matrix with an axis of its width.

    Parameters
    ----------
    heads, units : sequence of HeadSymmetry
        Found pairs; the stream runs along the columns of their matrices.
    parameters : mapping of str to Parameter
    contracted, looked_up : mapping of str to set of int
        Of :class:`ContractionTrace`.

    Returns
    -------
    FoundStream, optional
        None without heads of an attention. Nothing is claimed of it yet.
    """
    columns = {
        block.name: block.column_axis
        for symmetry in (*heads, *units)
        for block in symmetry.blocks
        if block.size[2] > 1
    }
    # What a linear chain reads may be anything: the inner width of a state-space layer, say.
    of_attention = [symmetry for symmetry in heads if "chain" not in symmetry.name]
    widths = Counter(
        block.size[2] for symmetry in of_attention for block in symmetry.blocks if block.size[2] > 1
    )
    if not widths:
        return None
    width = widths.most_common(1)[0][0]
    axes: dict[str, int] = {}
    for name, parameter in parameters.items():
        sides = [axis for axis, size in enumerate(parameter.shape) if size == width]
        if parameter.ndim < 2 or not sides or not parameter.is_floating_point():
            continue
        if name in columns:
            axis = columns[name]
            if axis is not None and parameter.shape[axis] == width:
                axes[name] = axis
        elif len(sides) == 1:
            axes[name] = sides[0]
        elif parameter.ndim == 2:
            # A square matrix outside the pairs: where it reads, but for a table of vectors.
            reads = contracted.get(name, {1}) - looked_up.get(name, set())
            axes[name] = min(reads, default=1)
    axes |= _biases_of_writers(axes, width, parameters, contracted)
    return FoundStream(width, axes, (NOT_ANALYSED,))


def _biases_of_writers(
    axes: Mapping[str, int],
    width: int,
    parameters: Mapping[str, nn.Parameter],
    contracted: Mapping[str, set[int]],
) -> dict[str, int]:
    """Vectors beside the matrices that write to the stream."""
    writing = {
        name.rpartition(".")[0]
        for name, axis in axes.items()
        if axis not in contracted.get(name, {axis})
    }
    return {
        name: 0
        for name, parameter in parameters.items()
        if parameter.ndim == 1 and parameter.numel() == width and name.rpartition(".")[0] in writing
    }


def analysed(
    stream: FoundStream,
    point: GenericPoint,
    reference: Mapping[str, Tensor],
    proved: float,
    generator: torch.Generator,
) -> FoundStream:
    """The stream with what a random rotation of it shows: O(d), the stabiliser, or neither."""
    groups: list[tuple[O, tuple[str, ...]]] = [
        (O(stream.width), ()),
        (StabilizerOfOnes(stream.width), (CENTRING,)),
    ]
    for group, broken in groups:
        if isinstance(group, StabilizerOfOnes) and stream.width < 3:
            continue
        element = group.random(generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                for name, axis in stream.axes.items():
                    rows = point.parameters[name].movedim(axis, -1)
                    for _, block in blocks(rows) if rows.ndim > 1 else [(0, rows)]:
                        block.copy_(block @ element.to(rows).mT)
                outputs = point.outputs()
        finally:
            point.restore(stream.axes)
        if largest_deviation(outputs, reference) <= proved:
            return FoundStream(stream.width, stream.axes, broken)
    return stream
