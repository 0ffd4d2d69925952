"""Parts of sharded tensors, where they lie, and how they travel between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class Region(NamedTuple):
    """The part of a tensor that one process holds: along every axis, runs (start, length)."""

    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Region:
        """The part that this process holds of a parameter; all of a plain one."""
        indices = [torch.arange(size) for size in parameter.shape]
        if isinstance(parameter, DTensor):
            mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
            assert coordinate is not None
            for axis, placement in enumerate(parameter.placements):
                if placement.is_replicate():
                    continue
                if placement.is_partial():
                    raise ValueError(f"a parameter is a sum over processes ({placement})")
                dim = placement.dim  # type: ignore[attr-defined]
                # Also _StridedShard, of parameters that are split twice along one axis.
                along: Any = Shard(0)
                if not isinstance(placement, Shard):
                    kind: Any = type(placement)
                    along = kind(0, split_factor=placement.split_factor)  # type: ignore[attr-defined]
                shards, _ = along._split_tensor(
                    indices[dim], mesh.size(axis), with_padding=False, contiguous=False
                )
                indices[dim] = shards[coordinate[axis]]
            held = tuple(parameter.to_local().shape)
            if held != tuple(map(len, indices)):
                raise ValueError(f"a shard has shape {held}, expected {tuple(map(len, indices))}")
        return cls(tuple(tuple(_runs(index.tolist())) for index in indices))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return torch.Size(self.shape).numel()

    @property
    def alone(self) -> Region:
        """All of a tensor of the part's shape."""
        return Region(tuple(((0, size),) for size in self.shape))

    def _index(self, device: torch.device) -> tuple[Any, ...]:
        if all(len(runs) <= 1 for runs in self.runs):
            ends = (runs[0] if runs else (0, 0) for runs in self.runs)
            return tuple(slice(start, start + length) for start, length in ends)
        axes = [
            torch.cat([torch.arange(start, start + length) for start, length in runs])
            for runs in self.runs
        ]
        return tuple(
            axis.to(device).view(*(-1 if i == j else 1 for j in range(len(axes))))
            for i, axis in enumerate(axes)
        )

    def take(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor."""
        return whole[self._index(whole.device)]

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write this part of a whole tensor."""
        whole[self._index(whole.device)] = part.view(self.shape)


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield indices[start], end - start
            start = end


def local_part(tensor: Tensor) -> Tensor:
    """The values that this process holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local.detach()


class Parcels:
    """Parts of tensors on their way between processes, one packed all-to-all per dtype.

    The two processes of a parcel add it in the same order among those that they exchange: the
    sender with its values, the receiver with a place to put them.

    Parameters
    ----------
    group : ProcessGroup
    device : torch.device
    dtypes : sequence of dtype
        All that travel, the same on all processes.
    """

    def __init__(self, group: Any, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        self.group = group
        self.device = device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._sent: dict[torch.dtype, list[list[Tensor]]] = {
            dtype: [[] for _ in range(self.size)] for dtype in dtypes
        }
        self._taken: dict[torch.dtype, list[list[tuple[Region, Tensor]]]] = {
            dtype: [[] for _ in range(self.size)] for dtype in dtypes
        }
        self._after: list[Callable[[], object]] = []

    def send(self, target: int, part: Tensor) -> None:
        """Send a part to a process."""
        self._sent[part.dtype][target].append(part.reshape(-1))

    def take(self, source: int, region: Region, whole: Tensor) -> None:
        """Write what comes from a process to a region of ``whole``."""
        self._taken[whole.dtype][source].append((region, whole))

    def then(self, action: Callable[[], object]) -> None:
        """Do something when all parcels have arrived."""
        self._after.append(action)

    def exchange(self) -> None:
        """Send and receive, then do what was to be done."""
        for dtype, by_target in self._sent.items():
            taken = self._taken[dtype]
            counts = [sum(part.numel() for part in parts) for parts in by_target]
            parts = [part for parts in by_target for part in parts]
            empty = torch.empty(0, dtype=dtype, device=self.device)
            sent = torch.cat(parts) if parts else empty
            expected = [sum(region.numel for region, _ in found) for found in taken]
            received = torch.empty(sum(expected), dtype=dtype, device=self.device)
            dist.all_to_all_single(received, sent, expected, counts, group=self.group)
            place = 0
            for found in taken:
                for region, whole in found:
                    part = received[place : place + region.numel]
                    place += region.numel
                    if region.numel:
                        region.put(whole, part)
        for action in self._after:
            action()
