"""Taking over saved state: after loading, and when parameters are frozen, thawed or added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quotientopt.optim.leaves import Leaf

if TYPE_CHECKING:
    from quotientopt.optim.bucket import Bucket
    from quotientopt.optim.engine import Engine

FRAME_KEYS = (
    "head_frame",
    "head_covariance",
    "residual_frame",
    "residual_covariance",
    "partner_coordinates",
)


def adopt(engine: Engine, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Fill a new engine with the state of its leaves.

    Leaves of one side share a frame. One that was frozen for a while remembers an older frame
    than its siblings; the frame of the leaf with the most steps is taken, and the moments of the
    others are carried over to it.

    Raises
    ------
    ValueError
        If a saved tensor has another shape: the state is not that of QuotientAdam with the same
        options on the same model. The engine is of no use then.
    """
    entries = list(engine.entries())
    of_pairs = [entry for pairs in engine.pairs for entry in pairs.entries()]
    for leaf, key, tensor in [*entries, *of_pairs]:
        own = state.get(leaf.parameter, {})
        saved = own.get(key + leaf.suffix)
        shape = None if saved is None else torch.as_tensor(saved).shape
        lost = saved is None and key in FRAME_KEYS and "exp_avg" + leaf.suffix in own
        if lost or shape not in (None, tensor.shape):
            found = "is missing" if shape is None else f"has shape {tuple(shape)}"
            raise ValueError(
                f"the saved {key + leaf.suffix!r} of {leaf.name!r} {found}, "
                f"expected {tuple(tensor.shape)}: it is not the state of a QuotientAdam with these "
                "options on this model"
            )
    filed = {(id(leaf), key) for leaf, key, _ in [*entries, *of_pairs]}
    for leaf in {id(leaf): leaf for leaf, _, _ in [*entries, *of_pairs]}.values():
        own = state.get(leaf.parameter, {})
        for key in FRAME_KEYS:
            if key + leaf.suffix in own and (id(leaf), key) not in filed:
                raise ValueError(
                    f"the state of {leaf.name!r} has a {key!r}, which these options leave out; "
                    "make a new optimizer to change frames"
                )
    # Ascending in steps: of those that share a frame, the leaf with the most steps writes last.
    for leaf, key, tensor in sorted(entries, key=lambda entry: steps_of(entry.leaf, state)):
        saved = state.get(leaf.parameter, {}).get(key + leaf.suffix)
        if saved is not None and (key not in FRAME_KEYS or bool(saved.any())):
            tensor.copy_(saved)
    for leaf, key, tensor in of_pairs:
        if key in state.get(leaf.parameter, {}):
            tensor.copy_(torch.as_tensor(state[leaf.parameter][key]))
    for pairs in engine.pairs:
        pairs.adopted()
    for bucket in engine.buckets:
        bucket.steps = [steps_of(leaf, state) for leaf in bucket.leaves]
        if bucket.device_steps is not None:
            bucket.device_steps.copy_(torch.tensor(bucket.steps))
        if bucket.residual and bucket.shared is None:
            bucket.oriented = [bool(frame.any()) for frame in bucket.state["residual_frame"]]
        if bucket.shared is not None:
            bucket.shared.oriented = bool(bucket.shared.frame.any())
        for i, leaf in enumerate(bucket.leaves):
            _carry_moments(bucket, i, state.get(leaf.parameter, {}))


def refuse_framed_state(
    parameters: Iterable[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    name_of: Callable[[Tensor], str],
) -> None:
    """Refuse to go on in plain coordinates with moments that are written in a frame.

    Raises
    ------
    ValueError
        If the state of a parameter without a leaf has a frame; names both.
    """
    for parameter in parameters:
        for key in state.get(parameter, {}):
            if key.partition(".")[0] in FRAME_KEYS:
                raise ValueError(
                    f"the state of {name_of(parameter)!r} has a {key!r}, which these options leave "
                    "out; make a new optimizer to change frames"
                )


def steps_of(leaf: Leaf, state: Mapping[Tensor, dict[str, Any]]) -> int:
    """Updates that a leaf's parameter has seen."""
    return int(state.get(leaf.parameter, {}).get("step", 0))


def _carry_moments(bucket: Bucket, row: int, own: Mapping[str, Any]) -> None:
    """Move one leaf's moments from the frames saved with them to those of the bucket."""
    suffix = bucket.leaves[row].suffix
    part = bucket.subset([row])
    left = right = None
    if bucket.heads is not None:
        frame = part.of_heads(bucket.heads.frame).squeeze(1)
        saved = own.get("head_frame" + suffix)
        if saved is not None and bool(saved.any()) and not torch.equal(saved.to(frame), frame[0]):
            left = torch.linalg.solve(saved.to(frame)[None], frame, left=False)
    frames = part.residual_frames()
    if frames is not None:
        saved = own.get("residual_frame" + suffix)
        if saved is not None and bool(saved.any()) and not torch.equal(saved.to(frames), frames[0]):
            right = saved.to(frames).mT[None] @ frames
    if left is not None or right is not None:
        part.transport_(left, right)
        bucket.absorb(part, [row])
