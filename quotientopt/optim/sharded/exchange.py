"""How parts of sharded parameters travel, and what processes ask each other in a step.

Units of one kind travel together, a packed all-to-all per kind and dtype, all of them under way at
once: :class:`Parcels`. A step works on the kinds that have arrived while others are on their way,
and sends the updates of one kind while it computes those of the next: :class:`Departures`.
:class:`ShardedPeers` stands for the other processes in an engine's step. At the end the two ways
of a step: gradients to the owners (:func:`gather`), updates back (:func:`departures`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from quotientopt._linalg import wide_dtype
from quotientopt.optim.engine import Peers
from quotientopt.optim.sharded.ownership import Placed, Region, Unit, dtypes_of, local_part
from quotientopt.optim.update import decay_scale_of
from quotientopt.symmetries.block import empty_like_whole

if TYPE_CHECKING:
    from quotientopt.optim.sharded.step import Sharded


class Parcels:
    """Parts of tensors on their way between processes, one packed all-to-all per dtype.

    The two processes of a parcel add it in the same order among those that they exchange: the
    sender with its values, the receiver with a place to put them.

    Parameters
    ----------
    group : ProcessGroup
    device : torch.device
    dtypes : iterable of dtype
        All that travel, the same on all processes.
    """

    def __init__(self, group: Any, device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
        self.group = group
        self.device = device
        self.size = dist.get_world_size(group)
        self._sent: dict[torch.dtype, list[list[Tensor]]] = {
            dtype: [[] for _ in range(self.size)] for dtype in dtypes
        }
        self._taken: dict[torch.dtype, list[list[tuple[Region, Tensor]]]] = {
            dtype: [[] for _ in range(self.size)] for dtype in self._sent
        }
        self._after: list[Callable[[], object]] = []
        # Of every dtype: the exchange, what it sends, which must live as long, and receives.
        self._under_way: list[tuple[Any, Tensor, Tensor, list[list[tuple[Region, Tensor]]]]] = []

    def send(self, target: int, part: Tensor) -> None:
        """Send a part to a process."""
        self._sent[part.dtype][target].append(part.reshape(-1))

    def take(self, source: int, region: Region, whole: Tensor) -> None:
        """Write what comes from a process to a region of ``whole``."""
        self._taken[whole.dtype][source].append((region, whole))

    def then(self, action: Callable[[], object]) -> None:
        """Do something when all parcels have arrived."""
        self._after.append(action)

    def start(self) -> None:
        """Send, and go on while the parcels are under way."""
        for dtype, by_target in self._sent.items():
            taken = self._taken[dtype]
            counts = [sum(part.numel() for part in parts) for parts in by_target]
            parts = [part for parts in by_target for part in parts]
            empty = torch.empty(0, dtype=dtype, device=self.device)
            sent = torch.cat(parts) if parts else empty
            expected = [sum(region.numel for region, _ in found) for found in taken]
            received = torch.empty(sum(expected), dtype=dtype, device=self.device)
            work = dist.all_to_all_single(
                received, sent, expected, counts, group=self.group, async_op=True
            )
            self._under_way.append((work, sent, received, taken))
        # What is under way lives until it has arrived, and no longer.
        self._sent.clear()
        self._taken.clear()

    def finish(self) -> None:
        """Wait for the parcels, put them in their places, and do what was to be done; once."""
        for work, _, received, taken in self._under_way:
            if work is not None:
                work.wait()
            place = 0
            for found in taken:
                for region, whole in found:
                    part = received[place : place + region.numel]
                    place += region.numel
                    if region.numel:
                        region.put(whole, part)
        self._under_way.clear()
        for action in self._after:
            action()
        self._after.clear()


def written_to(own: Tensor, values: Tensor) -> Callable[[], object]:
    """Write values where they differ: what nobody wrote to keeps its version."""

    def action() -> None:
        if not torch.equal(own.detach(), values):
            own.detach().copy_(values)

    return action


def copied(shard: Tensor, part: Tensor) -> Callable[[], object]:
    """Write new weights to a shard."""
    return lambda: shard.copy_(part)


def decayed_and_added(shard: Tensor, part: Tensor, decay: float | Tensor) -> Callable[[], object]:
    """Add an update to a shard of decayed weights."""
    return lambda: shard.mul_(decay).add_(part)


class Departures:
    """Exchanges that start in one order on all processes, each once what it brings is there.

    Parameters
    ----------
    rounds : sequence of (mapping, callable)
        For each exchange, the slices that are still to be stepped of every parameter that this
        process sends (``id`` to count; below zero where only the end of the step will do), and
        what starts it.
    """

    def __init__(self, rounds: Sequence[tuple[dict[int, int], Callable[[], Parcels]]]) -> None:
        self._waiting = list(rounds)
        self._started: list[Parcels] = []

    def stepped(self, parameters: Iterable[Tensor]) -> None:
        """Take note of slices of these parameters that have their updates, and start what can."""
        for parameter in parameters:
            for left, _ in self._waiting:
                if id(parameter) in left:
                    left[id(parameter)] -= 1
        while self._waiting and all(count == 0 for count in self._waiting[0][0].values()):
            self._started.append(self._waiting.pop(0)[1]())

    def finish(self) -> None:
        """Start the rest and wait for all."""
        self._started += [start() for _, start in self._waiting]
        self._waiting.clear()
        for parcels in self._started:
            parcels.finish()


class ShardedPeers(Peers):
    """The other processes, asked for what concerns all slices of the model.

    Parameters
    ----------
    group : ProcessGroup
    streams : sequence of (int, dtype)
        Width and dtype of computation of every residual stream, the same on all processes.
    device : torch.device
    """

    have_weights = False

    def __init__(
        self, group: Any, streams: Sequence[tuple[int, torch.dtype]], device: torch.device
    ) -> None:
        self.group = group
        self.streams = list(streams)
        self.device = device
        self.of_step: tuple[int, int] | None = None
        self.departures = Departures([])
        self._brings: dict[int, Parcels] = {}

    def expect(self, arrivals: Mapping[int, Parcels]) -> None:
        """Take note of parcels under way, by ``id`` of the parameters that they bring."""
        self._brings = dict(arrivals)

    def arrived(self, parameters: Iterable[Tensor]) -> None:
        """Wait until the gradients of these parameters are there."""
        for parameter in parameters:
            if id(parameter) in self._brings:
                self._brings[id(parameter)].finish()

    def settle(self) -> None:
        """Wait for everything under way."""
        for parcels in self._brings.values():
            parcels.finish()

    def stepped(self, parameters: Iterable[Tensor]) -> None:
        """Send what is complete now that these have their updates."""
        self.departures.stepped(parameters)

    def extent(self, steps: Sequence[int]) -> tuple[int, int] | None:
        """Of all slices, which is known everywhere before the step."""
        return self.of_step

    def wanted(self, streams: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
        """The streams that one of the processes wants."""
        flags = [float((width, dtype, self.device) in streams) for width, dtype in self.streams]
        if not flags:
            return streams
        reduced = torch.tensor(flags, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self.group)
        found = zip(self.streams, reduced.tolist(), strict=True)
        return {(width, dtype, self.device) for (width, dtype), flag in found if flag}

    def pooled(
        self, grams: dict[tuple[Any, ...], Tensor], wanted: set[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], Tensor]:
        """Sums over all processes."""
        total = {}
        for width, dtype in self.streams:
            key = (width, dtype, self.device)
            if key in wanted:
                gram = grams.get(key)
                if gram is None:
                    wide = wide_dtype(self.device)
                    gram = torch.zeros(width, width, dtype=wide, device=self.device)
                total[key] = gram.contiguous()
                dist.all_reduce(total[key], group=self.group)
        return total


def _gradient_of(own: Placed) -> Tensor:
    """This process's part of a gradient; zero where only others have one."""
    gradient = own.parameter.grad
    if gradient is None:
        return torch.zeros_like(own.shard)
    parameter = own.parameter
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        # A norm's gain may come as a sum over the processes that split a sequence.
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_part(gradient).to(parameter.dtype)


def gather(sharded: Sharded, active: set[int], due: bool) -> None:
    """Bring gradients, and weights where they are needed, to the owners.

    Parameters
    ----------
    sharded : Sharded
    active : set of int
        ``id`` of what has a gradient.
    due : bool
        Whether frames are made in this step, from weights.
    """
    # On all processes, in one order: sums over processes are reduced here.
    gradients = {id(own): _gradient_of(own) for own in sharded.placed if id(own) in active}
    for own in sharded.placed:
        if own.unit is None and own.local is not None:
            own.local.data = own.shard
            own.local.grad = gradients.get(id(own))
    arrivals: dict[int, Parcels] = {}
    for kind in sharded.kinds:
        parcels = Parcels(sharded.group, sharded.device, dtypes_of(kind))
        for unit in kind:
            for own in unit.members:
                _bring(sharded, own, unit, gradients.get(id(own)), due, parcels)
                arrivals[id(own.parameter if own.local is None else own.local)] = parcels
        parcels.start()
    sharded.peers.expect(arrivals)


def _bring(
    sharded: Sharded,
    own: Placed,
    unit: Unit,
    gradient: Tensor | None,
    due: bool,
    parcels: Parcels,
) -> None:
    """Bring a gradient, and weights where they are needed, to the owner."""
    if own.sends(sharded.rank, unit.owner):
        if unit.whole or due:
            parcels.send(unit.owner, own.shard)
        if gradient is not None:
            parcels.send(unit.owner, gradient)
    if own.local is None:
        return
    whole, places = own.local, list[Tensor]()
    if unit.whole:
        # What was not written to keeps its version, by which pairs know it.
        weights = torch.empty_like(whole)
        places.append(weights)
        parcels.then(written_to(whole, weights))
    elif due:
        places.append(whole.detach())
    if gradient is not None:
        whole.grad = empty_like_whole(own.parameter, sharded.device)
        places.append(whole.grad)
    for source in (rank for rank in range(sharded.size) if own.sends(rank, unit.owner)):
        for place in places:
            parcels.take(source, own.regions[source], place)


def departures(sharded: Sharded, active: Sequence[Placed], due: bool) -> Departures:
    """What brings updates, or new weights, back to the shards."""
    slices = Counter(id(slice_.parameter) for slice_ in sharded.inner._slices.framed)
    rounds = []
    for kind, units in zip(sharded.kinds, map(set, sharded.kinds), strict=True):
        stepped = [own for own in active if own.unit in units]
        # What has no slice is stepped after those that have, whole units are moved at the end.
        waiting = {
            id(own.local): -1 if kind[0].whole else slices.get(id(own.local), -1)
            for own in stepped
            if own.local is not None
        }
        rounds.append((waiting, partial(send_back, sharded, kind, stepped, due)))
    return Departures(rounds)


def send_back(
    sharded: Sharded, kind: Sequence[Unit], stepped: Sequence[Placed], due: bool
) -> Parcels:
    """Bring what was stepped back to the shards."""
    parcels = Parcels(sharded.group, sharded.device, dtypes_of(kind))
    groups = {id(p): group for group in sharded.optimizer.param_groups for p in group["params"]}
    for own in stepped:
        unit = own.unit
        assert unit is not None
        if own.local is not None:
            for rank, region in enumerate(own.regions):
                parcels.send(rank, region.take(own.local.detach()))
        shard = own.shard
        part = torch.empty_like(shard)
        parcels.take(unit.owner, own.regions[sharded.rank].alone, part)
        if unit.whole or due:
            parcels.then(copied(shard, part))
        else:
            group = groups[id(own.parameter)]
            scale = 1.0 if own.framed is None else decay_scale_of(own.framed, group)
            kept = 1 - group["lr"] * scale * group["weight_decay"]
            parcels.then(decayed_and_added(shard, part, kept))
    parcels.start()
    return parcels
