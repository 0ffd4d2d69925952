"""The framed part of an optimizer step, over all buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype
from quotientopt.optim.adoption import adopt
from quotientopt.optim.bucket import Bucket
from quotientopt.optim.head_frames import FreshDressing, HeadFrames
from quotientopt.optim.leaves import Leaf, Leaves
from quotientopt.optim.residual_frame import SharedResidualFrame, rotate_
from quotientopt.symmetries.map import RESIDUAL

COVARIANCE_BETA = 0.95

State = Mapping[Tensor, dict[str, Any]]
Dressings = Mapping[int, FreshDressing]


class Entry(NamedTuple):
    """One tensor of the state: the leaf it is filed under, its key, and the tensor."""

    leaf: Leaf
    key: str
    tensor: Tensor


class Engine:
    """Buckets of framed leaves and one step of Adam on all of them.

    Parameters
    ----------
    leaves : Leaves
    param_groups : sequence of dict
    state : mapping
        The optimizer's state. What it holds for the leaves is taken over; afterwards its entries
        are views of the buckets' stacked tensors.
    """

    def __init__(
        self, leaves: Leaves, param_groups: Sequence[dict[str, Any]], state: State
    ) -> None:
        self.param_groups = param_groups
        self.heads: list[HeadFrames] = []
        self.shared: dict[tuple[Any, ...], SharedResidualFrame] = {}
        self.buckets: list[Bucket] = []
        frames = self._head_frames(leaves.framed)
        grouped: dict[tuple[Any, ...], list[Leaf]] = defaultdict(list)
        # Left sides first: the leaves of a bucket then lie in the order of their frames.
        for leaf in sorted(leaves.framed, key=lambda leaf: leaf.side):
            heads = frames.get(id(leaf))
            options = param_groups[leaf.group_index]
            key = (
                leaf.group_index,
                id(heads),
                leaf.shape,
                leaf.residual,
                leaf.parameter.dtype,
                leaf.parameter.device,
                len(grouped) if options["foreach"] is False else None,
            )
            grouped[key].append(leaf)
        for members in grouped.values():
            heads = frames.get(id(members[0]))
            bucket = Bucket(
                members,
                heads,
                self._shared_frame(members[0]),
                compute_dtype(members[0].parameter.dtype),
            )
            self.buckets.append(bucket)
        adopt(self, state)
        self._file(state)

    def _head_frames(self, leaves: Sequence[Leaf]) -> dict[int, HeadFrames]:
        grouped: dict[tuple[Any, ...], list[Leaf]] = defaultdict(list)
        for leaf in leaves:
            if leaf.symmetry is not None:
                kind = self.param_groups[leaf.group_index]["head_frame"]
                key = (kind, leaf.symmetry.group, leaf.symmetry.heads)
                grouped[*key, leaf.parameter.dtype, leaf.parameter.device].append(leaf)
        frames: dict[int, HeadFrames] = {}
        for (kind, *_), members in grouped.items():
            parameter = members[0].parameter
            heads = HeadFrames(
                list(dict.fromkeys(leaf.symmetry for leaf in members if leaf.symmetry)),
                kind,
                dtype=compute_dtype(parameter.dtype),
                device=parameter.device,
            )
            self.heads.append(heads)
            frames |= {id(leaf): heads for leaf in members}
        return frames

    def _shared_frame(self, leaf: Leaf) -> SharedResidualFrame | None:
        if not leaf.residual or self.param_groups[leaf.group_index]["residual_frame"] != "shared":
            return None
        dtype, device = compute_dtype(leaf.parameter.dtype), leaf.parameter.device
        key = (leaf.shape[-1], dtype, device)
        if key not in self.shared:
            self.shared[key] = SharedResidualFrame(leaf.shape[-1], dtype, device)
        return self.shared[key]

    def entries(self) -> Iterator[Entry]:
        """Every tensor of the state, under each leaf that needs it."""
        for bucket in self.buckets:
            for i, leaf in enumerate(bucket.leaves):
                for key, stack in bucket.state.items():
                    yield Entry(leaf, key, stack[i])
                if bucket.heads is not None:
                    place = bucket.heads.place(leaf)
                    yield Entry(leaf, "head_frame", bucket.heads.frame[place])
                    yield Entry(leaf, "head_covariance", bucket.heads.covariance[place])
                if bucket.shared is not None:
                    yield Entry(leaf, "residual_frame", bucket.shared.frame)
                    yield Entry(leaf, "residual_covariance", bucket.shared.covariance)

    def _file(self, state: State) -> None:
        """Make the optimizer's state views of the stacked tensors."""
        self._watched = []
        for leaf, key, tensor in self.entries():
            own = state[leaf.parameter]
            own[key + leaf.suffix] = tensor
            if "step" not in own:
                own["step"] = torch.zeros((), dtype=torch.float32)
            if key == "exp_avg":
                self._watched.append((leaf.parameter, key + leaf.suffix, tensor))
        self._steps = {
            leaf.parameter: state[leaf.parameter] for b in self.buckets for leaf in b.leaves
        }

    def holds(self, state: State) -> bool:
        """Whether the optimizer's state is still the one kept here, not replaced or cleared."""
        return all(
            state[parameter].get(key) is tensor if parameter in state else False
            for parameter, key, tensor in self._watched
        )

    def active(self) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the leaves that have a gradient."""
        found = []
        for bucket in self.buckets:
            rows = [i for i, leaf in enumerate(bucket.leaves) if leaf.parameter.grad is not None]
            if rows:
                found.append((bucket, rows))
        return found

    def refresh_due(self, active: Sequence[tuple[Bucket, list[int]]]) -> bool:
        """Whether frames are made afresh in this step: every K steps, or for a new leaf."""
        steps = [bucket.steps[i] for bucket, rows in active for i in rows]
        every = self.param_groups[0]["refresh_every"]
        return min(steps) == 0 or (max(steps) + 1) % every == 0

    def fresh_dressings(self) -> Dressings:
        """Dressing fields of all heads, by ``id`` of their frames; changes nothing."""
        return {id(heads): heads.dressing() for heads in self.heads}

    def dressed_gradients(
        self,
        active: Sequence[tuple[Bucket, list[int]]],
        dressings: Dressings | None,
    ) -> list[Tensor]:
        """Dressed gradients u∂ (maximized groups negated), one stack per active bucket."""
        dressed = []
        for bucket, rows in active:
            part = self._part(bucket, rows)
            gradients = part.gradients()
            if self.param_groups[bucket.group_index]["maximize"]:
                gradients.neg_()
            if bucket.heads is not None:
                heads = bucket.heads
                field = heads.frame if dressings is None else dressings[id(heads)].field
                gradients = part.of_heads(field) @ gradients
            dressed.append(gradients)
        return dressed

    def step(
        self,
        active: Sequence[tuple[Bucket, list[int]]],
        dressed: Sequence[Tensor],
        dressings: Dressings | None,
    ) -> None:
        """Update covariances, frames when ``dressings`` are given, moments and parameters."""
        changes: dict[int, Tensor] = {}
        if dressings is not None:
            for heads in self.heads:
                changes[id(heads)] = heads.begin_refresh(dressings[id(heads)].field)
        self._accumulate(active, dressed)
        if dressings is not None:
            dressed = self._refresh(active, dressed, dressings, changes)
        for (bucket, rows), gradients in zip(active, dressed, strict=True):
            part = self._part(bucket, rows)
            part.update_(gradients, self.param_groups[bucket.group_index])
            if part is not bucket:
                bucket.absorb(part, rows)
        counted = {bucket.leaves[i].parameter: None for bucket, rows in active for i in rows}
        torch._foreach_add_([self._steps[parameter]["step"] for parameter in counted], 1)

    def _part(self, bucket: Bucket, rows: list[int]) -> Bucket:
        return bucket if len(rows) == len(bucket.leaves) else bucket.subset(rows)

    def _accumulate(
        self, active: Sequence[tuple[Bucket, list[int]]], dressed: Sequence[Tensor]
    ) -> None:
        samples: dict[int, list[Tensor]] = defaultdict(list)
        places: dict[int, list[int]] = defaultdict(list)
        for (bucket, rows), gradients in zip(active, dressed, strict=True):
            part = self._part(bucket, rows)
            if bucket.heads is not None and bucket.heads.kind != "svd":
                samples[id(bucket.heads)].append(part.head_covariance(gradients))
                places[id(bucket.heads)] += part.places
            part.accumulate_residual(gradients, COVARIANCE_BETA)
            if part is not bucket:
                bucket.absorb(part, rows)
        for heads in self.heads:
            if id(heads) in samples:
                heads.accumulate(torch.cat(samples[id(heads)]), places[id(heads)], COVARIANCE_BETA)
        for shared in self.shared.values():
            shared.accumulate(COVARIANCE_BETA)

    def _refresh(
        self,
        active: Sequence[tuple[Bucket, list[int]]],
        dressed: Sequence[Tensor],
        dressings: Dressings,
        changes: dict[int, Tensor],
    ) -> list[Tensor]:
        """Turn to eigenframes, move the moments, and return gradients in the new frames."""
        turns = {}
        for heads in self.heads:
            turn = heads.end_refresh(dressings[id(heads)])
            turns[id(heads)] = turn
            changes[id(heads)] = turn @ changes[id(heads)]
        for shared in self.shared.values():
            own = [bucket for bucket in self.buckets if bucket.shared is shared]
            grams = [
                bucket.dressed_weights_gram(self._contragredient(bucket, dressings)).sum(0)
                for bucket in own
            ]
            shared.refresh(torch.stack(grams).sum(0))
        for bucket in self.buckets:
            change = None if bucket.heads is None else changes[id(bucket.heads)]
            bucket.refresh(change, self._contragredient(bucket, dressings))
        turned = []
        for (bucket, rows), gradients in zip(active, dressed, strict=True):
            if bucket.heads is not None:
                part = self._part(bucket, rows)
                gradients = part.of_heads(turns[id(bucket.heads)]) @ gradients
            turned.append(gradients)
        return turned

    @staticmethod
    def _contragredient(bucket: Bucket, dressings: Dressings) -> Tensor | None:
        return None if bucket.heads is None else dressings[id(bucket.heads)].contragredient

    def move_(self, element: Mapping[str, Tensor]) -> None:
        """Move the state along with parameters on which ``element`` acts.

        Dressed quantities stay; head frames go to ``u g^{-1}`` (left) and ``u gᵀ`` (right),
        residual frames to ``O Q`` and their covariances to ``O R Oᵀ``.
        """
        for heads in self.heads:
            heads.move_(element)
        rotation = element.get(RESIDUAL)
        if rotation is not None:
            for bucket in self.buckets:
                if bucket.shared is None and bucket.residual:
                    state = bucket.state
                    rotate_(state["residual_frame"], state["residual_covariance"], rotation)
            for shared in self.shared.values():
                rotate_(shared.frame, shared.covariance, rotation)
