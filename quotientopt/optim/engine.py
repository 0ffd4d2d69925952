"""A step of QuotientAdam over all framed parameters: buckets, their frames, low-rank pairs.

:class:`PreparedStep` is what :meth:`QuotientAdam.step` makes first, without changing anything;
:class:`Engine` has the stacks and says when frames are made; :class:`Peers` stands for the other
processes of a sharded model, of which an ordinary one has none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import wide_dtype
from quotientopt.optim.bookkeeping.checks import WatchedFactors, is_recorded
from quotientopt.optim.bookkeeping.slices import Slices
from quotientopt.optim.bookkeeping.stacking import stack_heads, stack_pairs, stack_slices
from quotientopt.optim.bookkeeping.state import State, adopt, filed
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.dressing import FreshDressing
from quotientopt.optim.frames import HeadFrames
from quotientopt.optim.low_rank.pairs import LowRankPairs
from quotientopt.optim.low_rank.stack import Prepared
from quotientopt.optim.update import Sampling, ema_at_, gate_on, interval_of, sampling

Dressings = Mapping[int, FreshDressing]


def frames_are_due(extent: tuple[int, int], group: Mapping[str, Any]) -> bool:
    """Whether a step makes frames: every K(t) steps, or for a slice that has none.

    Steps that are to be alike (``capturable``): every ``refresh_every`` steps at any age.
    ``extent``: fewest and most updates, so far, of the slices that have a gradient.
    """
    (fewest, most), longest = extent, group["refresh_every"]
    interval = longest if group["capturable"] else interval_of(most + 1, longest)
    return fewest == 0 or (most + 1) % interval == 0


class Peers:
    """What a step has to know of slices that other processes step: here there are none.

    :class:`quotientopt.optim.sharded.exchange.ShardedPeers` asks them.

    Attributes
    ----------
    have_weights : bool
        Whether the weights are there in every step, to see if others wrote to them.
    outside : dict of int to bool, optional
        ``id`` of this process's matrices outside the layers, and whether they lie behind them, for
        it may lack those layers.
    """

    have_weights = True
    outside: dict[int, bool] | None = None

    def extent(self, steps: Sequence[int]) -> tuple[int, int] | None:
        """Fewest and most updates among the slices that have a gradient; None if there is none."""
        return (min(steps), max(steps)) if steps else None

    def arrived(self, parameters: Iterable[Tensor]) -> None:
        """Wait until the gradients of these parameters are there."""

    def stepped(self, parameters: Iterable[Tensor]) -> None:
        """Take note that a slice of each of these parameters has its update."""

    def wanted(self, streams: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
        """The streams with a slice that has no frame yet."""
        return streams

    def pooled(
        self, grams: dict[tuple[Any, ...], Tensor], wanted: set[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], Tensor]:
        """Grams of the weights summed over all slices of each wanted stream."""
        return grams


class PreparedStep(NamedTuple):
    """A step that is ready to be taken.

    ``sample`` tells what covariances take, None where no slice has a gradient, ``look`` whether the
    host need not wait; ``norms`` are those of what was ``measured``, dressed and plain gradients.
    """

    engine: Engine
    sample: Sampling | None
    look: bool
    active: list[tuple[Bucket, list[int]]]
    dressings: Dressings | None
    pairs: list[tuple[LowRankPairs, Prepared]]
    dressed: list[Tensor]
    norms: Sequence[Tensor] = ()
    measured: Sequence[Tensor] = ()

    @property
    def dressed_stacks(self) -> list[Tensor]:
        """All dressed gradients, in stacks."""
        return [*self.dressed, *(stack for _, own in self.pairs for stack in own.dressed)]


class Engine:
    """Buckets of framed slices and one step of Adam on all of them.

    Parameters
    ----------
    slices : Slices
    param_groups : sequence of dict
    state : mapping
        The optimizer's state. What it holds for the slices is taken over; afterwards its entries
        are views of the buckets' stacked tensors.
    peers : Peers, optional
        Other processes that step slices of the same model.
    """

    def __init__(
        self,
        slices: Slices,
        param_groups: Sequence[dict[str, Any]],
        state: State,
        peers: Peers | None = None,
    ) -> None:
        self.peers = Peers() if peers is None else peers
        self.param_groups = param_groups
        self.pairs = stack_pairs(slices.transported, param_groups)
        self.heads, frames = stack_heads(slices.framed, param_groups)
        self.buckets, self.shared = stack_slices(slices.framed, frames, param_groups)
        blocks = (b for h in self.heads for s in h.symmetries for b in s.blocks)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._factors = WatchedFactors(blocks)
        adopt(self.buckets, self.pairs, state)
        self._moments, self._steps_on_host = filed(self.buckets, self.pairs, state)

    def holds(self, state: State) -> bool:
        """Whether the optimizer's state is still the one kept here, not replaced or cleared."""
        return all(
            state[slice_.parameter].get(key) is tensor if slice_.parameter in state else False
            for slice_, key, tensor in self._moments
        )

    def active(self) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the slices that have a gradient."""
        found = []
        for bucket in self.buckets:
            rows = [
                i for i, slice_ in enumerate(bucket.slices) if slice_.parameter.grad is not None
            ]
            if rows:
                found.append((bucket, rows))
        return found

    def prepare(self, before: Callable[[], None], *, look: bool) -> PreparedStep:
        """Frames that are due and dressed gradients; changes nothing.

        Parameters
        ----------
        before : callable
            Called before the host waits for the device.
        look : bool
            Whether to compare a sample of the factors, which must be on the host for that.
        """
        active = self.active()
        extent = self.extent(active)
        group = self.param_groups[0]
        capturing = is_recorded(group["capturable"], lambda: self.is_new(active))
        sample = None if extent is None else sampling(extent[1], group)
        dressings = None
        if extent is not None and not capturing:
            dressings = self.due_dressings(extent, before, look=look)
        prepared = [(pairs, pairs.prepare(capturing, look=look)) for pairs in self.pairs]
        own_pairs = [(pairs, own) for pairs, own in prepared if own is not None]
        if dressings is None and any(own.turns for _, own in own_pairs):
            before()
        dressed = self.dressed_gradients(active, dressings)
        return PreparedStep(self, sample, look, active, dressings, own_pairs, dressed)

    def take(self, prepared: PreparedStep, scale: Tensor | None, gate: Tensor | None) -> None:
        """Take a prepared step, its gradients times ``scale``."""
        if scale is not None:
            for stack in prepared.dressed_stacks:
                stack.mul_(scale.to(stack.device))
        if prepared.sample is not None:
            sample = prepared.sample
            self.step(prepared.active, prepared.dressed, prepared.dressings, sample, gate)
        for pairs, own in prepared.pairs:
            pairs.step(own, self.param_groups[pairs.group_index], gate_on(pairs.device, gate))

    def extent(self, active: Sequence[tuple[Bucket, list[int]]]) -> tuple[int, int] | None:
        """Fewest and most updates of the slices that have a gradient; None if there is none."""
        return self.peers.extent([bucket.steps[i] for bucket, rows in active for i in rows])

    def due_dressings(
        self, extent: tuple[int, int], before: Callable[[], None], *, look: bool
    ) -> Dressings | None:
        """Dressing fields where frames are made in this step: by schedule, or if they do not fit.

        Others may have written to factors since the last step. As far as torch tells, a sample of
        the values differs, or :meth:`ask` was called, the host looks whether the frames still fit;
        values that came back leave the path as it is. ``before``, ``look``: see :meth:`prepare`.
        """
        due = frames_are_due(extent, self.param_groups[0])
        if not due and not (self.peers.have_weights and self._factors.were_written(look)):
            return None
        before()
        dressings = self.fresh_dressings()
        if due or any(bool(h.strays(dressings[id(h)].field)) for h in self.heads):
            return dressings
        return None

    def were_written(self) -> bool:
        """Whether others wrote to factors since the last step, as far as can be told here."""
        of_pairs = (own for pairs in self.pairs for own in pairs.schedule.written())
        return self._factors.were_written(True) or any(of_pairs)

    def ask(self) -> None:
        """Look in the next step whether frames and coordinates still fit."""
        self._factors.ask()
        for pairs in self.pairs:
            pairs.schedule.ask()

    def mark(self, look: bool) -> None:
        """Note that the factors are now as the optimizer knows them."""
        self._factors.mark(look and self.peers.have_weights)

    def is_new(self, active: Sequence[tuple[Bucket, list[int]]]) -> bool:
        """Whether a slice has no frame yet."""
        framed = (bucket.steps[i] for bucket, rows in active for i in rows)
        of_pairs = (max(pairs.steps) for pairs in self.pairs)
        return any(steps == 0 for steps in (*framed, *of_pairs))

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
            self.peers.arrived(slice_.parameter for slice_ in part.slices)
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
        sample: Sampling,
        gate: Tensor | None = None,
    ) -> None:
        """Update covariances, frames when ``dressings`` are given, moments and parameters.

        With a ``gate`` of zero, and dressed gradients of zero, no average and no parameter changes.
        """
        changes = {} if dressings is None else self._begin_refresh(dressings)
        self._accumulate(active, dressed, sample, gate)
        if dressings is not None:
            dressed = self._refresh(active, dressed, dressings, changes)
        for (bucket, rows), gradients in zip(active, dressed, strict=True):
            part = self._part(bucket, rows)
            group = self.param_groups[bucket.group_index]
            part.update_(gradients, group, gate_on(part.device, gate))
            if part is not bucket:
                bucket.absorb(part, rows)
            self.peers.stepped(slice_.parameter for slice_ in part.slices)
        counted = {bucket.slices[i].parameter: None for bucket, rows in active for i in rows}
        if self._steps_on_host:
            torch._foreach_add_([self._steps_on_host[parameter] for parameter in counted], 1)

    def refresh(self, dressings: Dressings) -> None:
        """Make frames afresh from the covariances and the parameters as they are now."""
        for pairs in self.pairs:
            pairs.refresh()
        self._refresh([], [], dressings, self._begin_refresh(dressings))

    def _begin_refresh(self, dressings: Dressings) -> dict[int, Tensor]:
        return {id(h): h.begin_refresh(dressings[id(h)].field) for h in self.heads}

    def _part(self, bucket: Bucket, rows: list[int]) -> Bucket:
        return bucket if len(rows) == len(bucket.slices) else bucket.subset(rows)

    def _accumulate(
        self,
        active: Sequence[tuple[Bucket, list[int]]],
        dressed: Sequence[Tensor],
        sample: Sampling,
        gate: Tensor | None,
    ) -> None:
        samples: dict[int, list[Tensor]] = defaultdict(list)
        places: dict[int, list[int]] = defaultdict(list)
        beta = sample.beta
        pooled: set[int] = set()
        for (bucket, active_rows), gradients in zip(active, dressed, strict=True):
            taken = [sample.takes(bucket.steps[i]) for i in active_rows]
            rows = [i for i, own in zip(active_rows, taken, strict=True) if own]
            if not rows:
                continue
            if len(rows) < len(active_rows):
                gradients = gradients[[place for place, own in enumerate(taken) if own]]
            part = self._part(bucket, rows)
            if bucket.heads is not None and bucket.heads.turns:
                samples[id(bucket.heads)].append(part.head_covariance(gradients))
                places[id(bucket.heads)] += part.places
            part.accumulate(gradients, beta, gate_on(part.device, gate))
            pooled.add(id(bucket.shared))
            if part is not bucket:
                bucket.absorb(part, rows)
        for heads in self.heads:
            if id(heads) in samples:
                own = places[id(heads)]
                touched = sorted(set(own))
                some = len(touched) < len(heads.covariance)
                ema_at_(
                    heads.covariance,
                    torch.cat(samples[id(heads)]),
                    self._index(own, heads),
                    self._index(touched, heads) if some else None,
                    beta,
                    gate,
                )
        for shared in self.shared.values():
            if id(shared) in pooled:
                shared.accumulate(beta, gate)

    def _index(self, places: Sequence[int], heads: HeadFrames) -> Tensor:
        """Places on the device, copied there once: a recorded step may copy nothing."""
        key = (id(heads), *places)
        if key not in self._indices:
            self._indices[key] = torch.tensor(places, device=heads.frame.device)
        return self._indices[key]

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
            turn = heads.end_refresh(dressings[id(heads)], changes[id(heads)])
            turns[id(heads)] = turn
            changes[id(heads)] = turn @ changes[id(heads)]
        for bucket, rows in active:
            for i in rows:
                bucket.oriented[i] &= bucket.steps[i] > 0
        grams, pooled = self._weights_grams(dressings)
        for key, shared in self.shared.items():
            shared.refresh(pooled.get(key))
        for bucket in self.buckets:
            change = None if bucket.heads is None else changes[id(bucket.heads)]
            bucket.refresh(change, grams.get(id(bucket)), pooled.get(bucket.stream))
        turned = []
        for (bucket, rows), gradients in zip(active, dressed, strict=True):
            if bucket.heads is not None:
                part = self._part(bucket, rows)
                gradients = part.of_heads(turns[id(bucket.heads)]) @ gradients
            turned.append(gradients)
        return turned

    def _weights_grams(
        self, dressings: Dressings
    ) -> tuple[dict[int, Tensor], dict[tuple[Any, ...], Tensor]]:
        """WᵀW of the dressed weights: per slice, by ``id`` of the bucket, and per stream.

        Only of streams with a slice that has no frame yet.
        """
        grams: dict[int, Tensor] = {}
        pooled: dict[tuple[Any, ...], Tensor] = {}
        missing = {b.stream for b in self.buckets if b.residual and not b.has_frames}
        wanted = self.peers.wanted(missing)
        for bucket in self.buckets:
            if bucket.residual and bucket.stream in wanted:
                heads = bucket.heads
                field = None if heads is None else dressings[id(heads)].contragredient
                grams[id(bucket)] = gram = bucket.dressed_weights_gram(field)
                # Summed in the widest precision, so that the order does not matter.
                total = gram.to(wide_dtype(gram.device)).sum(0)
                pooled[bucket.stream] = pooled.get(bucket.stream, torch.zeros_like(total)) + total
        pooled = self.peers.pooled(pooled, wanted)
        return grams, {stream: gram.to(stream[1]) for stream, gram in pooled.items()}
