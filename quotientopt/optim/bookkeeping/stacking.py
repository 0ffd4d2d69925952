"""What is alike is stacked: frames of heads of one kind, slices of one shape, low-rank pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from quotientopt._linalg import compute_dtype
from quotientopt.optim.bookkeeping.checks import takes_part
from quotientopt.optim.bookkeeping.slices import Slice, frame_kind, stream_of
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.frames import HeadFrames, SharedResidualFrame
from quotientopt.optim.low_rank.pairs import LowRankPairs


def planned_groups(
    param_groups: Sequence[Mapping[str, Any]], also: Container[Tensor] = ()
) -> list[dict[str, Any]]:
    """The param groups with the parameters that are trained, and those in ``also``."""
    return [
        {**group, "params": [p for p in group["params"] if takes_part(p) or p in also]}
        for group in param_groups
    ]


def stack_heads(
    slices: Sequence[Slice], param_groups: Sequence[Mapping[str, Any]]
) -> tuple[list[HeadFrames], dict[int, HeadFrames]]:
    """Frames of all heads of one kind, group, shape, dtype and device together.

    Returns
    -------
    list of HeadFrames
    dict of int to HeadFrames
        The same by ``id`` of their slices.
    """
    grouped: dict[tuple[Any, ...], list[Slice]] = defaultdict(list)
    for slice_ in slices:
        if slice_.symmetry is not None:
            options = param_groups[slice_.group_index]
            kind, joint = frame_kind(options, slice_.symmetry), options["row_frame"] == "per_matrix"
            key = (kind or "", joint, slice_.symmetry.group, slice_.symmetry.heads)
            grouped[*key, slice_.parameter.dtype, slice_.parameter.device].append(slice_)
    stacks: list[HeadFrames] = []
    frames: dict[int, HeadFrames] = {}
    for (kind, joint, *_), members in grouped.items():
        parameter = members[0].parameter
        heads = HeadFrames(
            list(dict.fromkeys(slice_.symmetry for slice_ in members if slice_.symmetry)),
            kind,
            joint=joint,
            dtype=compute_dtype(parameter.dtype),
            device=parameter.device,
        )
        stacks.append(heads)
        frames |= {id(slice_): heads for slice_ in members}
    return stacks, frames


def stack_slices(
    slices: Sequence[Slice],
    frames: Mapping[int, HeadFrames],
    param_groups: Sequence[Mapping[str, Any]],
) -> tuple[list[Bucket], dict[tuple[Any, ...], SharedResidualFrame]]:
    """Slices that are alike together, each by itself where ``foreach`` is False.

    Parameters
    ----------
    slices : sequence of Slice
    frames : mapping
        Head frames by ``id`` of their slices.
    param_groups : sequence of mapping

    Returns
    -------
    list of Bucket
    dict of tuple to SharedResidualFrame
        By their stream.
    """
    shared: dict[tuple[Any, ...], SharedResidualFrame] = {}
    grouped: dict[tuple[Any, ...], list[Slice]] = defaultdict(list)
    # Left sides first: the slices of a bucket then lie in the order of their frames.
    for slice_ in sorted(slices, key=lambda slice_: slice_.side):
        key = (
            slice_.group_index,
            id(frames.get(id(slice_))),
            slice_.shape,
            (slice_.residual, slice_.stacked),
            (slice_.takes_scale, slice_.embedding, slice_.output, slice_.rest_of is None),
            slice_.hidden_directions(param_groups[slice_.group_index]),
            slice_.parameter.dtype,
            slice_.parameter.device,
            len(grouped) if param_groups[slice_.group_index]["foreach"] is False else None,
        )
        grouped[key].append(slice_)
    buckets = []
    for members in grouped.values():
        first, options = members[0], param_groups[members[0].group_index]
        own = None
        if first.residual and not first.embedding and options["residual_frame"] == "shared":
            stream = stream_of(first)
            own = shared.setdefault(stream, SharedResidualFrame(*stream))
        dtype = compute_dtype(first.parameter.dtype)
        buckets.append(Bucket(members, frames.get(id(first)), own, dtype, options))
    return buckets, shared


def stack_pairs(
    slices: Sequence[Slice], param_groups: Sequence[Mapping[str, Any]]
) -> list[LowRankPairs]:
    """Pairs of equal rank, param group, dtype and device together; each by itself on request."""
    grouped: dict[tuple[Any, ...], list[Slice]] = defaultdict(list)
    for slice_ in slices:
        parameter, options = slice_.parameter, param_groups[slice_.group_index]
        symmetry = slice_.symmetry
        key = (
            slice_.group_index,
            slice_.shape[2],
            parameter.dtype,
            parameter.device,
            id(symmetry) if options["foreach"] is False else None,
        )
        grouped[key].append(slice_)
    return [
        LowRankPairs(members, param_groups[members[0].group_index]) for members in grouped.values()
    ]
