"""Which process steps which parameters of a sharded model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from quotientopt._linalg import compute_dtype
from quotientopt.optim.parcels import Region, local_part
from quotientopt.optim.slices import Slice, find_slices, planned_groups
from quotientopt.optim.translations import absorbed_biases
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.block import empty_like_whole

if TYPE_CHECKING:
    from quotientopt.optim.quotient_adam import QuotientAdam


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
    framed : bool
        Whether frames are made for it every ``refresh_every`` steps.
    local : Parameter, optional
        What this process steps: the whole tensor of an owned unit, the shard without a unit.
    steps : int
        Updates so far.
    """

    parameter: Tensor
    regions: list[Region]
    unit: Unit | None = None
    framed: bool = False
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
        original[id(slice_.parameter)].framed = True
    units: dict[int, Unit] = defaultdict(Unit)
    for key, own in original.items():
        if key in in_units:
            own.unit = unit = units[find(key)]
            unit.members.append(own)
            dtype = own.parameter.dtype
            unit.whole |= key in whole or compute_dtype(dtype) != dtype
    costs: dict[int, int] = defaultdict(int)
    for slice_ in own_slices:
        joint = optimizer.param_groups[slice_.group_index]["row_frame"] == "per_matrix"
        costs[find(id(slice_.parameter))] += _state_size(slice_, joint)
    members = sorted(units, key=lambda key: -costs[key])
    for key, owner in zip(members, dealt([costs[key] for key in members], size), strict=True):
        units[key].owner = owner
    streams = {(s.shape[-1], compute_dtype(s.parameter.dtype)) for s in slices.framed if s.residual}
    ordered = sorted(streams, key=lambda stream: (stream[0], str(stream[1])))
    kept = {symmetry.name for symmetry in used.values()}
    heads = [s for s in optimizer.symmetries.heads if s.name in kept]
    return Dealt(list(units.values()), ordered, SymmetryMap(heads, optimizer.symmetries.residual))


def dealt(sizes: Sequence[int], processes: int) -> list[int]:
    """The owner of each of some units of descending size: whoever has least so far.

    Those of equal size go round, so that each process has about as many, in one stack.
    """
    loads, owners = [0] * processes, []
    for size in sizes:
        owners.append(loads.index(min(loads)))
        loads[owners[-1]] += size
    return owners


def _state_size(slice_: Slice, joint: bool) -> int:
    """Elements of the state of a slice, its head frame over all heads at once or for each."""
    blocks, heads, rank, columns = slice_.shape
    count = 2 * blocks * heads * rank * columns
    if slice_.residual:
        count += 2 * columns**2
    if slice_.symmetry is not None:
        count += 2 * (heads * rank) ** 2 if joint else 2 * heads * rank**2
    return count
