"""Parts of sharded parameters: where they lie and who steps what.

:class:`Region` is the part of a tensor that a process holds, :class:`Placed` a parameter with the
regions of all processes, :class:`Unit` what one process steps; :func:`deal` finds the units and
deals them, :func:`kinds_of` tells which travel together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from quotientopt._linalg import compute_dtype
from quotientopt.optim.bookkeeping.slices import Slice, find_slices, runs
from quotientopt.optim.bookkeeping.stacking import planned_groups
from quotientopt.optim.gauge import absorbed_biases
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.block import empty_like_whole

if TYPE_CHECKING:
    from quotientopt.optim.quotient_adam import QuotientAdam


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
        return cls(tuple(tuple(runs(index.tolist())) for index in indices))

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


def local_part(tensor: Tensor) -> Tensor:
    """The values that this process holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local.detach()


def common_group(parameters: Sequence[Tensor]) -> tuple[Any, DeviceMesh]:
    """The process group of the largest mesh of some parameters, and that mesh.

    Raises
    ------
    ValueError
        If the mesh of another parameter has processes outside it.
    """
    meshes: list[DeviceMesh] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.device_mesh not in meshes:
            meshes.append(parameter.device_mesh)
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = sorted(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= set(ranks):
            raise ValueError(
                f"parameters are on meshes of the processes {ranks} and "
                f"{sorted(mesh.mesh.flatten().tolist())}, of which neither holds the other; make "
                "one optimizer for each"
            )
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD, largest
    if largest.ndim == 1:
        return largest.get_group(), largest
    return dist.new_group(ranks, use_local_synchronization=True), largest


@dataclass(eq=False)
class Placed:
    """A parameter, where its parts lie, and how it is stepped.

    Attributes
    ----------
    parameter : Tensor
    regions : list of Region
        The part that each process of the group holds.
    unit : Unit, optional
        What it is stepped with; None for a parameter without frames, stepped shard by shard.
    framed : Slice, optional
        One of its slices with frames, which are made every ``refresh_every`` steps.
    local : Parameter, optional
        What this process steps: the whole tensor of an owned unit, the shard without a unit.
    steps : int
        Updates so far.
    """

    parameter: Tensor
    regions: list[Region]
    unit: Unit | None = None
    framed: Slice | None = None
    local: nn.Parameter | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        holders: dict[Region, list[int]] = defaultdict(list)
        for rank, region in enumerate(self.regions):
            holders[region].append(rank)
        self.holders = holders
        if sum(region.numel for region in holders) != self.parameter.numel():
            raise ValueError("the shards of a parameter overlap, or do not cover it")

    def sends(self, source: int, owner: int) -> bool:
        """Whether a process sends its part to the owner, and none of the others that hold it."""
        ranks = self.holders[self.regions[source]]
        return source == (owner if owner in ranks else ranks[0])

    @property
    def shard(self) -> Tensor:
        """The values that this process holds."""
        return local_part(self.parameter)


@dataclass(eq=False)
class Unit:
    """Parameters that frames tie together, and the process that steps them.

    Attributes
    ----------
    members : list of Placed
    owner : int
        Rank in the group.
    whole : bool
        Whether the weights go to the owner in every step: where an update reads them (coordinates
        of LoRA pairs, value biases that the output bias takes) and where new values are rounded to
        a narrower dtype. The owner then keeps the tensors, and new weights come back.
    """

    members: list[Placed] = field(default_factory=list)
    owner: int = 0
    whole: bool = False


class Dealt(NamedTuple):
    """Units with their owners, the residual streams of the model (width and dtype of computation),
    and the symmetries that tie units together.
    """

    units: list[Unit]
    streams: list[tuple[int, torch.dtype]]
    symmetries: SymmetryMap


def deal(optimizer: QuotientAdam, placed: Mapping[int, Placed], size: int) -> Dealt:
    """Find what frames tie together and deal it to the processes.

    Where frames are depends on shapes alone, so that all processes find the same.

    Parameters
    ----------
    optimizer : QuotientAdam
    placed : mapping
        ``id`` of a parameter to its place; its ``unit`` and ``framed`` are set.
    size : int
        Number of processes.
    """
    twins = {key: empty_like_whole(own.parameter) for key, own in placed.items()}
    original = {id(twin): placed[key] for key, twin in twins.items()}
    for key, twin in twins.items():
        twin.requires_grad_(placed[key].parameter.requires_grad)
    groups = [
        {**group, "params": [twins[id(p)] for p in group["params"]]}
        for group in planned_groups(optimizer.param_groups)
    ]
    names = {id(twins[key]): name for key, name in optimizer._names.items() if key in twins}
    symmetries = optimizer.symmetries.on(twins)
    slices = find_slices(groups, symmetries, names)
    absorbed = [symmetry for symmetry, _ in absorbed_biases(symmetries.heads, groups)]
    root = {id(twin): id(twin) for twin in twins.values()}

    def find(key: int) -> int:
        while root[key] != key:
            key = root[key]
        return key

    def tie(keys: Sequence[int]) -> None:
        for key in keys[1:]:
            root[find(key)] = find(keys[0])

    own_slices = [*slices.framed, *slices.transported]
    used = {id(s.symmetry): s.symmetry for s in own_slices if s.symmetry is not None}
    used |= {id(symmetry): symmetry for symmetry in absorbed}
    whole = {id(slice_.parameter) for slice_ in slices.transported}
    in_units = {id(slice_.parameter) for slice_ in own_slices}
    for symmetry in used.values():
        keys = [id(block.parameter) for block in symmetry.blocks]
        if symmetry in absorbed:
            keys += [id(sink.parameter) for sink in symmetry._sinks()]
            whole |= set(keys)
        in_units |= set(keys)
        tie(keys)
    for slice_ in slices.framed:
        original[id(slice_.parameter)].framed = slice_
    units: dict[int, Unit] = defaultdict(Unit)
    for key, own in original.items():
        if key in in_units:
            own.unit = unit = units[find(key)]
            unit.members.append(own)
            dtype = own.parameter.dtype
            unit.whole |= key in whole or compute_dtype(dtype) != dtype
    costs: dict[int, int] = defaultdict(int)
    for slice_ in own_slices:
        options = optimizer.param_groups[slice_.group_index]
        costs[find(id(slice_.parameter))] += _state_size(slice_, options)
    members = sorted(units, key=lambda key: -costs[key])
    for key, owner in zip(members, dealt([costs[key] for key in members], size), strict=True):
        units[key].owner = owner
    streams = {(s.shape[-1], compute_dtype(s.parameter.dtype)) for s in slices.framed if s.residual}
    ordered = sorted(streams, key=lambda stream: (stream[0], str(stream[1])))
    kept = {symmetry.name for symmetry in used.values()}
    heads = [s for s in optimizer.symmetries.heads if s.name in kept]
    return Dealt(list(units.values()), ordered, SymmetryMap(heads, optimizer.symmetries.residual))


def kinds_of(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units of one kind together, in the order in which a step has done with them.

    A step goes through matrices without heads first, then left and right sides of pairs; what has
    no slice with frames, and units whose weights travel, are complete at its end. Within that the
    largest come first.
    """
    kinds: dict[tuple[Any, ...], list[Unit]] = defaultdict(list)
    for unit in units:
        headed = any(own.framed is not None and own.framed.symmetry for own in unit.members)
        shapes = [(tuple(own.parameter.shape), str(own.parameter.dtype)) for own in unit.members]
        size = sum(own.parameter.numel() for own in unit.members)
        late = any(own.framed is None for own in unit.members)
        kinds[unit.whole, late, headed, -size, tuple(sorted(shapes))].append(unit)
    return [kinds[kind] for kind in sorted(kinds)]


def dtypes_of(units: Sequence[Unit]) -> list[torch.dtype]:
    """Of the parameters of some units, in one order on all processes."""
    return list(dict.fromkeys(own.parameter.dtype for unit in units for own in unit.members))


def dealt(sizes: Sequence[int], processes: int) -> list[int]:
    """The owner of each of some units of descending size: whoever has least so far.

    Those of equal size go round, so that each process has about as many, in one stack.
    """
    loads, owners = [0] * processes, []
    for size in sizes:
        owners.append(loads.index(min(loads)))
        loads[owners[-1]] += size
    return owners


def _state_size(slice_: Slice, options: Mapping[str, Any]) -> int:
    """Elements of the state of a slice under the options of its param group."""
    blocks, heads, rank, columns = slice_.shape
    count = 2 * blocks * heads * rank * columns
    if slice_.residual:
        count += 2 * columns**2
    if slice_.symmetry is not None:
        joint = options["row_frame"] == "per_matrix"
        count += 2 * (heads * rank) ** 2 if joint else 2 * heads * rank**2
    elif directions := slice_.hidden_directions(options):
        count += 2 * heads * rank * directions
        count += 2 * directions * columns if directions < heads * rank else 0
    return count
