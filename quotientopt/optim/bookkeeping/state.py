"""The state of QuotientAdam: what is loaded, refused, taken over by stacks, and filed.

Of a framed parameter: ``step``; ``exp_avg`` and ``exp_avg_sq`` in the frame, shape ``(M, heads, r,
n)`` (M > 1 for grouped queries; a matrix without head frame has ``(1, 1, rows, d)``, a stack of
experts ``(1, experts, rows, d)``, one whose heads share a frame ``(M, 1, heads r, n)``);
``head_frame``, ``head_covariance`` of shape ``(heads, r, r)``, or ``(1, heads r, heads r)``;
``residual_frame``, ``residual_covariance`` of shape ``(d, d)``; ``hidden_frame``,
``hidden_covariance`` of shape ``(rows, rows)``, or of k leading directions ``hidden_frame``,
``hidden_image`` of shape ``(rows, k)`` and the moments along them, ``hidden_exp_avg``,
``hidden_exp_avg_sq`` of shape ``(1, 1, k, d)``. Where several blocks share a fused parameter, keys
end in ``.0``, ``.1``, …. A factor of a LoRA pair has ``exp_avg`` and ``exp_avg_sq`` of shape ``(r,
n)``, ``head_frame`` and ``head_covariance`` of shape ``(r, r)`` and ``partner_coordinates``, of the
shape ``(r, m)`` of its partner, which do not change with the gauge either.

What of a state dict can be told without a plan of the parameters is looked at before, in
:mod:`quotientopt.optim.bookkeeping.saved`.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, wide
from quotientopt.optim.bookkeeping.saved import problem_of, refuse_unfit
from quotientopt.optim.bookkeeping.slices import NUMBERED, Slice, Slices
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.frames import transport_
from quotientopt.optim.low_rank.pairs import LowRankPairs
from quotientopt.optim.update import keeps_wide

# Before the suffix of blocks of a fused parameter.
KEYS = (
    "step",
    "exp_avg",
    "exp_avg_sq",
    "exp_avg_sq_rows",
    "exp_avg_sq_columns",
    "master",
    "head_frame",
    "head_covariance",
    "hidden_frame",
    "hidden_covariance",
    "hidden_image",
    "hidden_exp_avg",
    "hidden_exp_avg_sq",
    "residual_frame",
    "residual_covariance",
    "partner_coordinates",
    "coordinates_made",
)

MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN_KEYS = ("step", *MOMENTS)

State = Mapping[Tensor, dict[str, Any]]


def follow_version(group: dict[str, Any]) -> None:
    """Give a param group of version 0.1.0 the options with which its state goes on."""
    if "head_frame" in group and "row_frame" not in group:
        group["row_frame"] = "per_head"
        group["polar"] = "step" if group["polar"] else False
        group["update_scale"], group["embedding_scale"], group["precision"] = 1.0, 1.0, "highest"
        group["embedding_frame"], group["hidden_frame"] = "per_matrix", None
        group["second_moment"] = "full"


def settle(
    state: MutableMapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Any],
    slices: Slices,
    name_of: Callable[[Tensor], str],
) -> None:
    """Check a state that torch has loaded, and undo its cast where float32 is needed.

    Parameters
    ----------
    state, param_groups
        The optimizer's, as torch has loaded them; the state is changed.
    loaded : mapping
        The state dict that was given.
    slices : Slices
        Of all parameters with a state.
    name_of : callable
        Name of a parameter.

    Raises
    ------
    ValueError
        Naming parameter and entry.
    """
    plain = [parameter for own in slices.plain for parameter in own]
    refuse_framed_state(plain, state, name_of)
    refuse_unfit(plain, state, PLAIN_KEYS, name_of, optional=("master",))
    refuse_singular_frames(slices.framed, state)
    wide = {id(slice_.parameter) for slice_ in (*slices.framed, *slices.transported)}
    for group in param_groups:
        wide |= {id(p) for p in group["params"] if keeps_wide(group, p)}
    restore_precision(state, param_groups, loaded, wide)


def restore_precision(
    state: MutableMapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Any],
    wide: Container[int],
) -> None:
    """Undo torch's cast of state to its parameter's dtype where float32 is needed.

    All tensors are copied: torch keeps the given ones, which another optimizer may use on.

    Parameters
    ----------
    state, param_groups
        The optimizer's, as torch has loaded them; the state is changed.
    loaded : mapping
        The state dict that was given.
    wide : container of int
        ``id`` of the parameters whose state is kept in at least float32.
    """
    saved_order = [i for group in loaded["param_groups"] for i in group["params"]]
    parameters = [p for group in param_groups for p in group["params"]]
    for i, parameter in zip(saved_order, parameters, strict=True):
        own = state.get(parameter, {})
        for key, value in own.items():
            if not isinstance(value, Tensor):
                continue
            given = loaded["state"][i][key] if id(parameter) in wide else value
            dtype = compute_dtype(parameter.dtype) if given.dtype != value.dtype else None
            own[key] = given.detach().to(value.device, dtype or given.dtype).clone()


FRAME_KEYS = (
    "head_frame",
    "head_covariance",
    "hidden_frame",
    "hidden_covariance",
    "hidden_image",
    "residual_frame",
    "residual_covariance",
    "partner_coordinates",
)

# Largest deviation from an orthogonal or positive matrix that rounding may have left.
ORTHOGONAL = 1e-2

# Of a framed parameter's state, what may be missing: made anew where it is.
OPTIONAL_KEYS = ("master", "coordinates_made")


def refuse_singular_frames(
    slices: Iterable[Slice], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Refuse saved frames that are none, and covariances that are not positive, by name."""
    for slice_ in slices:
        own = state.get(slice_.parameter, {})
        for key in FRAME_KEYS:
            saved = own.get(key + slice_.suffix)
            problem = None if saved is None else _problem_of_frame(key, saved)
            if problem is not None:
                raise ValueError(
                    f"the saved {key + slice_.suffix!r} of {slice_.name!r} {problem}: the state is "
                    "damaged"
                )


def _problem_of_frame(key: str, saved: Tensor) -> str | None:
    matrix = torch.as_tensor(saved).detach()
    if not matrix.numel() or matrix.ndim < 2 or matrix.size(-1) > matrix.size(-2):
        return None  # refused by its shape
    if key != "hidden_frame" and matrix.size(-1) != matrix.size(-2):
        return None
    matrix = wide(matrix)
    if key in ("residual_frame", "hidden_frame"):
        # Zero before there is one, else orthogonal; of leading directions some may be missing.
        there = (matrix != 0).any(-2)
        if matrix.size(-1) == matrix.size(-2):
            there = there.any(-1, keepdim=True).expand_as(there)
        identity = there.to(matrix.dtype).diag_embed()
        sound = (matrix.mT @ matrix - identity).abs().amax((-2, -1)) < ORTHOGONAL
        return None if bool(sound.all()) else "is not orthogonal"
    if key == "head_frame":
        pivots = torch.linalg.lu_factor_ex(matrix).LU.diagonal(dim1=-2, dim2=-1).abs()
        least = matrix.size(-1) * torch.finfo(matrix.dtype).eps * pivots.amax(-1)
        sound = (pivots.amin(-1) > least) | (matrix == 0).flatten(-2).all(-1)
        return None if bool(sound.all()) else "is singular"
    if key.endswith("covariance"):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        # Rounding of a congruence leaves a little below zero.
        sound = diagonal.amin(-1) >= -ORTHOGONAL * diagonal.abs().amax(-1)
        return None if bool(sound.all()) else "is not positive"
    return None


class StateEntry(NamedTuple):
    """One tensor of the state: the slice it is filed under, its key, and the tensor."""

    slice_: Slice
    key: str
    tensor: Tensor


def entries_of(buckets: Sequence[Bucket]) -> Iterator[StateEntry]:
    """Every tensor of the state of buckets, under each slice that needs it."""
    for bucket in buckets:
        for i, slice_ in enumerate(bucket.slices):
            for key, stack in bucket.state.items():
                yield StateEntry(slice_, key, stack[i])
            if bucket.heads is not None:
                place = bucket.heads.place(slice_)
                yield StateEntry(slice_, "head_frame", bucket.heads.frame[place])
                if bucket.heads.turns:
                    yield StateEntry(slice_, "head_covariance", bucket.heads.covariance[place])
            if bucket.shared is not None:
                yield StateEntry(slice_, "residual_frame", bucket.shared.frame)
                yield StateEntry(slice_, "residual_covariance", bucket.shared.covariance)


def filed(
    buckets: Sequence[Bucket], pairs: Sequence[LowRankPairs], state: State
) -> tuple[list[StateEntry], dict[Tensor, Tensor]]:
    """Make an optimizer's state views of the stacked tensors.

    Returns
    -------
    list of StateEntry
        The moments, whose keys have their suffix: by them a state is known that others replaced.
    dict of Tensor to Tensor
        Parameter to its count of updates, of those that are kept on the host.
    """
    moments = []
    steps_on_host: dict[Tensor, Tensor] = {}
    for slice_, key, tensor in entries_of(buckets):
        state[slice_.parameter][key + slice_.suffix] = tensor
        if key in MOMENTS:
            moments.append(StateEntry(slice_, key + slice_.suffix, tensor))
    for bucket in buckets:
        for i, slice_ in enumerate(bucket.slices):
            own = state[slice_.parameter]
            if bucket.device_steps is not None:
                own["step"] = bucket.device_steps[i]
            else:
                own["step"] = torch.as_tensor(own.get("step", 0.0), dtype=torch.float32)
                steps_on_host[slice_.parameter] = own["step"]
    for slice_, key, tensor in (entry for own in pairs for entry in own.entries()):
        state[slice_.parameter][key] = tensor
        if key in MOMENTS:
            moments.append(StateEntry(slice_, key, tensor))
    return moments, steps_on_host


def adopt(buckets: Sequence[Bucket], pairs: Sequence[LowRankPairs], state: State) -> None:
    """Fill new buckets and pairs with the state of their slices.

    Slices of one side share a frame. One that was frozen for a while remembers an older frame
    than its siblings; the frame of the slice with the most steps is taken, and the moments of the
    others are carried over to it.

    Raises
    ------
    ValueError
        If a saved tensor has another shape: the state is not that of QuotientAdam with the same
        options on the same model. Buckets and pairs are of no use then.
    """
    several = [
        slice_ for bucket in buckets for slice_ in bucket.slices if slice_.parameter.ndim > 2
    ]
    state = {**state, **{s.parameter: _in_frames(s, state.get(s.parameter, {})) for s in several}}
    entries = list(entries_of(buckets))
    of_pairs = [entry for own in pairs for entry in own.entries()]
    for slice_, key, tensor in [*entries, *of_pairs]:
        own = state.get(slice_.parameter, {})
        saved = own.get(key + slice_.suffix)
        lost = saved is None and bool(own) and key not in OPTIONAL_KEYS
        if key == "residual_covariance" and "residual_frame" in own:
            # Version 0.2.0 kept none of linear layers in front of the numbered ones.
            lost &= slice_.symmetry is not None or NUMBERED.match(slice_.name) is not None
        problem = None if saved is None else problem_of(key, saved)
        if problem is not None:
            raise ValueError(
                f"the saved {key + slice_.suffix!r} of {slice_.name!r} {problem}: the state is "
                "damaged"
            )
        shape = None if saved is None else torch.as_tensor(saved).shape
        if lost or shape not in (None, tensor.shape):
            found = "is missing" if shape is None else f"has shape {tuple(shape)}"
            raise ValueError(
                f"the saved {key + slice_.suffix!r} of {slice_.name!r} {found}, "
                f"expected {tuple(tensor.shape)}: it is not the state of a QuotientAdam with these "
                "options on this model"
            )
    filed = {(id(slice_), key) for slice_, key, _ in [*entries, *of_pairs]}
    for slice_ in {id(slice_): slice_ for slice_, _, _ in [*entries, *of_pairs]}.values():
        own = state.get(slice_.parameter, {})
        for key in FRAME_KEYS:
            if key + slice_.suffix in own and (id(slice_), key) not in filed:
                if key == "head_covariance" and (id(slice_), "head_frame") in filed:
                    del own[key + slice_.suffix]  # kept by earlier versions in vain
                    continue
                raise ValueError(
                    f"the state of {slice_.name!r} has a {key!r}, which these options leave out; "
                    "make a new optimizer to change frames"
                )
    # Ascending in steps: of those that share a frame, the slice with the most steps writes last.
    for slice_, key, tensor in sorted(entries, key=lambda entry: steps_of(entry.slice_, state)):
        saved = state.get(slice_.parameter, {}).get(key + slice_.suffix)
        if saved is not None and (key not in FRAME_KEYS or bool(saved.any())):
            tensor.copy_(saved)
    for slice_, key, tensor in of_pairs:
        if key in state.get(slice_.parameter, {}):
            tensor.copy_(torch.as_tensor(state[slice_.parameter][key]))
    for own_pairs in pairs:
        own_pairs.adopted()
    for bucket in buckets:
        bucket.steps = [steps_of(slice_, state) for slice_ in bucket.slices]
        if bucket.device_steps is not None:
            bucket.device_steps.copy_(torch.tensor(bucket.steps))
        if bucket.residual and bucket.shared is None:
            bucket.oriented = [bool(frame.any()) for frame in bucket.state["residual_frame"]]
        if bucket.shared is not None:
            bucket.shared.oriented = bool(bucket.shared.frame.any())
        for i, slice_ in enumerate(bucket.slices):
            _carry_moments(bucket, i, state.get(slice_.parameter, {}))


def _in_frames(slice_: Slice, own: dict[str, Any]) -> dict[str, Any]:
    """State of matrices in more than two axes; AdamW's, as version 0.2.0 had it, in the frame 1."""
    block, average = slice_.blocks[0], own.get("exp_avg")
    framed = "residual_frame" in own or not slice_.residual or slice_.symmetry is not None
    if framed or average is None or average.shape != slice_.parameter.shape:
        return own
    frame = torch.eye(slice_.shape[-1], device=average.device)
    end = slice_.shape[:2] if slice_.stacked else (1, 1)
    kept = [key for key in (*MOMENTS, "master") if key in own]
    moments = {key: block.view(own[key]).reshape(*end, -1, len(frame)) for key in kept}
    covariance = {} if slice_.embedding else {"residual_covariance": torch.zeros_like(frame)}
    return own | moments | {"residual_frame": frame} | covariance


def refuse_framed_state(
    parameters: Iterable[Tensor],
    state: State,
    name_of: Callable[[Tensor], str],
) -> None:
    """Refuse to go on in plain coordinates with moments that are written in a frame.

    Raises
    ------
    ValueError
        If the state of a parameter without a slice has a frame; names both.
    """
    for parameter in parameters:
        for key in state.get(parameter, {}):
            if key.partition(".")[0] in FRAME_KEYS:
                raise ValueError(
                    f"the state of {name_of(parameter)!r} has a {key!r}, which these options leave "
                    "out; make a new optimizer to change frames"
                )


def steps_of(slice_: Slice, state: State) -> int:
    """Updates that a slice's parameter has seen."""
    return int(state.get(slice_.parameter, {}).get("step", 0))


def _carry_moments(bucket: Bucket, row: int, own: Mapping[str, Any]) -> None:
    """Move one slice's moments from the frames saved with them to those of the bucket."""
    suffix = bucket.slices[row].suffix
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
        transport_(part.state, left, right)
        bucket.absorb(part, [row])
