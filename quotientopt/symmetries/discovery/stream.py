"""The residual stream of a model whose pairs are known: by its width, and by what rotations do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quotientopt.groups import O, StabilizerOfOnes
from quotientopt.symmetries.discovery.gradients import blocks
from quotientopt.symmetries.discovery.point import GenericPoint
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.verification import largest_deviation

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
        None without heads. Nothing is claimed of it yet.
    """
    columns = {
        block.name: block.column_axis
        for symmetry in (*heads, *units)
        for block in symmetry.blocks
        if block.size[2] > 1
    }
    widths = Counter(
        block.size[2] for symmetry in heads for block in symmetry.blocks if block.size[2] > 1
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
