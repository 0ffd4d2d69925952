"""Shared parameters: which claimed symmetries stay exact when values are used more than once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from quotientopt.symmetries.block import Block, extent
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.registry import plain, qualified

Owner = tuple[int, str]


class Ownership:
    """Which modules own which parameters; a tied parameter has several owners.

    A module that appears twice in a model is one owner, whatever its names.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._owner: dict[str, Owner] = {}
        self._owners: dict[int, set[Owner]] = defaultdict(set)
        self._first_name: dict[int, str] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    name = qualified(prefix, attribute)
                    for alias in {name, plain(name)}:
                        self._parameters[alias] = parameter
                        self._owner[alias] = (id(module), attribute)
                    self._owners[id(parameter)].add(self._owner[name])
                    self._first_name.setdefault(id(parameter), name)
        # A wrapper around the whole model may leave its own part of the names out.
        for name, parameter in model.named_parameters():
            self._parameters[name] = parameter
            self._owner[name] = self._owner[plain(name)]
            self._first_name[id(parameter)] = name
        for parameter in _sharing_memory(list(model.parameters())):
            # An owner that no adapter can declare: acting on one would change the other.
            self._owners[id(parameter)].add((0, "another parameter"))

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name."""
        if name not in self._parameters:
            raise ValueError(f"an adapter named {name!r}, which is no parameter of the model")
        return self._parameters[name]

    def first_name(self, parameter: str | Tensor) -> str:
        """The first name of a parameter, given as any of its names or as a tensor."""
        if isinstance(parameter, str):
            parameter = self.parameter(parameter)
        if id(parameter) not in self._first_name:
            raise ValueError(
                f"a symmetry acts on a tensor of shape {tuple(parameter.shape)}, which is no "
                "parameter of the model"
            )
        return self._first_name[id(parameter)]

    def used_elsewhere(self, parameters: Iterable[Tensor], declared: Iterable[str]) -> list[str]:
        """First names of the parameters that have an owner not among the declared names."""
        known = {self._owner[name] for name in declared}
        return [
            self.first_name(parameter)
            for parameter in parameters
            if not self._owners[id(parameter)] <= known
        ]


def _sharing_memory(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters whose range of memory overlaps that of another Parameter object."""
    ranges: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for parameter in parameters:
        if parameter.numel():
            start = parameter.data_ptr()
            length = extent(parameter.shape, parameter.stride())
            end = start + length * parameter.element_size()
            address = parameter.untyped_storage().data_ptr()
            ranges[address].append((start, end, parameter))
    sharing: list[Tensor] = []
    for found in ranges.values():
        found.sort(key=lambda item: item[:2])
        for (_, end, first), (start, _, second) in pairwise(found):
            if start < end:
                sharing += [first, second]
    return sharing


def without_conflicts(
    symmetries: Sequence[HeadSymmetry], ownership: Ownership
) -> tuple[list[HeadSymmetry], list[str]]:
    """Separate the symmetries that stay exact from those that parameter sharing breaks.

    Symmetries with the same blocks (two attentions sharing both matrices of a pair) are one, kept
    under its first name. Where the same elements are used in two different ways, acting for one
    use changes the other, and neither is a symmetry.

    Returns
    -------
    kept : list of HeadSymmetry
    dropped : list of str
        Names of the others.
    """
    classes: dict[object, list[HeadSymmetry]] = defaultdict(list)
    for symmetry in symmetries:
        classes[_signature(symmetry)].append(symmetry)
    representatives = [members[0] for members in classes.values()]
    broken = _overlapping(representatives)
    for members in classes.values():
        blocks = [block for symmetry in members for block in symmetry.blocks]
        declared = [block.name or ownership.first_name(block.parameter) for block in blocks]
        if ownership.used_elsewhere([block.parameter for block in blocks], declared):
            broken.add(id(members[0]))
    kept = [symmetry for symmetry in representatives if id(symmetry) not in broken]
    names = {symmetry.name for symmetry in kept}
    return kept, [symmetry.name for symmetry in symmetries if symmetry.name not in names]


def with_own_sinks(symmetries: Sequence[HeadSymmetry], ownership: Ownership) -> list[HeadSymmetry]:
    """The symmetries, without translations whose output bias is also used elsewhere.

    An output bias of another dtype, or one that two attentions share, cannot take what a bias of
    the values adds in one of them.
    """
    sinks = [s.translation.sink for s in symmetries if s.translation and s.translation.sink]
    takers = Counter(id(sink.parameter) for sink in {id(sink): sink for sink in sinks}.values())
    kept = []
    for symmetry in symmetries:
        sink = symmetry.translation.sink if symmetry.translation is not None else None
        if sink is not None:
            shared = ownership.used_elsewhere([sink.parameter], [sink.name])
            values = symmetry.right_blocks[0].parameter
            if shared or takers[id(sink.parameter)] > 1 or sink.parameter.dtype != values.dtype:
                symmetry = symmetry.without_translation()
        kept.append(symmetry)
    return kept


def with_one_dtype(
    symmetries: Sequence[HeadSymmetry],
) -> tuple[list[HeadSymmetry], list[str]]:
    """Separate the symmetries whose blocks share one dtype; returns them and the others' names."""
    dtypes = {s.name: {block.parameter.dtype for block in s.blocks} for s in symmetries}
    kept = [symmetry for symmetry in symmetries if len(dtypes[symmetry.name]) == 1]
    return kept, [name for name, found in dtypes.items() if len(found) > 1]


def half_trainable(symmetries: Iterable[HeadSymmetry]) -> list[str]:
    """Names of the symmetries of which one factor is frozen and the other is not."""
    return [
        symmetry.name
        for symmetry in symmetries
        if any(block.parameter.requires_grad for block in symmetry.left_blocks)
        != any(block.parameter.requires_grad for block in symmetry.right_blocks)
    ]


class Elements:
    """Elements of parameters that symmetries act on already."""

    def __init__(self) -> None:
        self._taken: dict[int, Tensor] = {}

    def add(self, blocks: Sequence[Block]) -> bool:
        """Take the elements of blocks, unless one of them is taken or belongs to two blocks."""
        views = [self._view(block) for block in blocks]
        if any(bool(view.any()) for view in views):
            return False
        for i, view in enumerate(views):
            if bool(view.any()):
                for earlier in views[: i + 1]:
                    earlier.fill_(False)
                return False
            view.fill_(True)
        return True

    def _view(self, block: Block) -> Tensor:
        storage = block.parameter.untyped_storage()
        address = storage.data_ptr()
        if address not in self._taken:
            length = storage.nbytes() // block.parameter.element_size()
            self._taken[address] = torch.zeros(length, dtype=torch.bool)
        offset = block.parameter.storage_offset() + block.offset
        return self._taken[address].as_strided(block.size, block.stride, offset)


def _signature(symmetry: HeadSymmetry) -> object:
    left, right = (
        tuple((id(block.parameter), block.size, block.stride, block.offset) for block in side)
        for side in (symmetry.left_blocks, symmetry.right_blocks)
    )
    return symmetry.group, left, right


def _overlapping(symmetries: Sequence[HeadSymmetry]) -> set[int]:
    """Ids of the symmetries that touch an element twice, or one that another touches too."""
    by_storage: dict[int, list[tuple[int, Block]]] = defaultdict(list)
    for index, symmetry in enumerate(symmetries, start=1):
        for block in symmetry.blocks:
            address = block.parameter.untyped_storage().data_ptr()
            by_storage[address].append((index, block))
    broken: set[int] = set()
    for uses in by_storage.values():
        if len(uses) == 1:
            continue
        parameter = uses[0][1].parameter
        length = parameter.untyped_storage().nbytes() // parameter.element_size()
        user = torch.zeros(length, dtype=torch.int32)
        for index, block in uses:
            offset = block.parameter.storage_offset() + block.offset
            elements = user.as_strided(block.size, block.stride, offset)
            if bool(elements.any()):
                earlier = set(elements.unique().tolist()) - {0}
                broken |= {id(symmetries[i - 1]) for i in earlier | {index}}
            elements.fill_(index)
    return broken
