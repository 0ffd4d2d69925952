"""Blocks: strided views of a model's parameters with the head axis in front; sharded parameters.

A DTensor (``fully_shard``, ``parallelize_module``) has a global shape and strides but only a part
of its values. Where heads lie depends on shapes alone, so that symmetries are found on stand-ins of
the same shapes, and then name the sharded parameters. Whoever needs values asks their owner, see
:mod:`quotientopt.optim.sharded.step`. Wrappers that flatten parameters leave no blocks and are
refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Block:
    """A view ``(heads, r, n)`` of a parameter, on whose rows a structure group acts.

    Nothing is copied: the block remembers size, stride and offset relative to its parameter, so
    that the same view can be taken of the parameter, of its gradient and of anything else laid
    out like it. Under g the block goes to ``g^{-T} block`` (left) or ``g block`` (right).

    Attributes
    ----------
    parameter : Tensor
        The parameter the block is a view of.
    name : str
        The parameter's qualified name in the model; may be empty for hand-made symmetries.
    size, stride : tuple of int
        Shape ``(heads, r, n)`` and strides, in elements.
    offset : int
        Offset of the first element from the parameter's first element.
    layout : tuple of int
        Strides of the parameter when the block was made.
    """

    parameter: Tensor
    name: str
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int
    layout: tuple[int, ...]

    @property
    def _end(self) -> int:
        """Elements of the parameter's memory up to the last one of the block."""
        return self.offset + extent(self.size, self.stride)

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor | None = None, name: str = "") -> Block:
        """Describe ``view``, made from ``parameter`` by view operations alone.

        Parameters
        ----------
        view : Tensor
            Shape ``(heads, r, n)``, or ``(heads, r)`` for a bias, which becomes ``(heads, r, 1)``.
        parameter : Tensor, optional
            The tensor it was made from; found through ``view._base`` when left out.
        name : str
            Qualified name of the parameter.

        Raises
        ------
        ValueError
            If the shape is not that of a block, or ``view`` does not share the memory of
            ``parameter`` (a copy, or a view of ``parameter.data``).
        """
        if parameter is None:
            parameter = view if view._base is None else view._base
            if not parameter.is_leaf:
                raise ValueError(
                    f"block {name or tuple(view.shape)} is not a view of a parameter; build it "
                    "from the parameter itself with view operations (unflatten, select, transpose)"
                )
        if view.ndim == 2:
            view = view.unsqueeze(-1)
        if view.ndim != 3:
            raise ValueError(
                f"block {name!r} needs shape (heads, r, n) or (heads, r), got {tuple(view.shape)}"
            )
        if view.device.type == "meta" or parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on the meta device; load its values before asking for "
                "symmetries"
            )
        if view.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            raise ValueError(
                f"block {name!r} of shape {tuple(view.shape)} is a copy, not a view of its "
                "parameter; use view operations only (unflatten, select, transpose)"
            )
        offset = int(view.storage_offset() - parameter.storage_offset())
        heads, rows, columns = view.shape
        head_stride, row_stride, column_stride = view.stride()
        stride = (head_stride, row_stride, column_stride)
        size = (heads, rows, columns)
        return cls(parameter, name, size, stride, offset, tuple(parameter.stride()))

    def view(self, tensor: Tensor | None = None) -> Tensor:
        """Return this block of ``tensor`` (by default of the parameter, detached).

        Parameters
        ----------
        tensor : Tensor, optional
            Shaped like the parameter. Shares memory with the result if it has the parameter's
            strides; otherwise the block is read from a copy laid out like the parameter.

        Returns
        -------
        Tensor
            Shape ``(heads, r, n)``.

        Raises
        ------
        ValueError
            If the parameter's memory layout has changed since the block was made, or it is smaller.
        """
        if tensor is None and is_sharded(self.parameter):
            refuse_values(self.name)
        if self.parameter.stride() != self.layout:
            raise ValueError(
                f"the memory layout of parameter {self.name!r} has changed from strides "
                f"{self.layout} to {self.parameter.stride()}; find the model's symmetries again"
            )
        if self._end > extent(self.parameter.shape, self.layout):
            raise ValueError(
                f"parameter {self.name!r} has shape {tuple(self.parameter.shape)} now, less than "
                "its symmetry acts on; find the model's symmetries again"
            )
        tensor = self.parameter.detach() if tensor is None else tensor
        if tensor.stride() != self.layout:
            tensor = laid_out_as(self.parameter.shape, self.layout, tensor)
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    @property
    def column_axis(self) -> int | None:
        """Axis of the parameter along which the columns run; None if it is not a whole axis."""
        for axis, (length, stride) in enumerate(
            zip(self.parameter.shape, self.parameter.stride(), strict=True)
        ):
            if (length, stride) == (self.size[2], self.stride[2]):
                return axis
        return None


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


@dataclass(frozen=True, eq=False)
class HeadBlocks:
    """The heads of one matrix, or of one part of a fused one.

    Attributes
    ----------
    kind : {"query", "key", "value", "output"}
    block : Block
        A view ``(heads, r, n)`` of the parameter, all heads of this kind; ``block.view(tensor)`` is
        the same view of anything laid out like it, a gradient or a momentum for example.
    symmetry : str
        Name of the symmetry they belong to.
    """

    kind: str
    block: Block
    symmetry: str

    @property
    def parameter(self) -> Tensor:
        """The parameter the heads are views of."""
        return self.block.parameter

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.block.name

    @property
    def view(self) -> Tensor:
        """The heads, ``(heads, r, n)``: rows of r, whichever way the matrix is stored."""
        return self.block.view()


FSDP1 = "torch.distributed.fsdp"
# Marks of flat parameters and of views into them.
_FLAT = ("_fsdp_flattened", "_is_flat_param")
# A partition of DeepSpeed's ZeRO, or a parameter whose values it has taken away.
_DEEPSPEED = "ds_id"


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of the tensors is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def refuse_flattened(model: nn.Module | None, parameters: Iterable[Tensor]) -> None:
    """Refuse models and parameters that a wrapper has flattened: no pair is left in them.

    Raises
    ------
    ValueError
        With the reason, and ``fully_shard`` as the way out.
    """
    scope = sys.modules.get(FSDP1)
    wrapper = getattr(scope, "FullyShardedDataParallel", None)
    wrapped = model is not None and wrapper is not None
    if wrapped and any(isinstance(m, wrapper) for m in model.modules()):  # type: ignore[union-attr, arg-type]
        _refuse("FullyShardedDataParallel (FSDP1)")
    for parameter in parameters:
        if any(getattr(parameter, mark, False) for mark in _FLAT):
            _refuse("FullyShardedDataParallel (FSDP1)")
        if hasattr(parameter, _DEEPSPEED):
            _refuse("DeepSpeed's ZeRO")


def _refuse(wrapper: str) -> None:
    raise ValueError(
        f"{wrapper} flattens parameters and cuts them anywhere, through heads and pairs, so that "
        "no symmetry acts on what is left; shard with FSDP2 (torch.distributed.fsdp.fully_shard), "
        "which keeps every parameter's shape"
    )


def refuse_values(name: str) -> None:
    """Refuse to read or write a sharded parameter's values through a view."""
    raise ValueError(
        f"parameter {name!r} is sharded over processes (a DTensor), and no view of it holds whole "
        "heads; do this before fully_shard, or on an unsharded copy of the model"
    )


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Put plain tensors of the global shapes in place of a model's sharded parameters.

    Parameters of one dimension (gains, biases) carry their values, which every process then has to
    ask for; larger ones have none, and take address space but no memory.

    Yields
    ------
    dict of int to Tensor
        ``id`` of each stand-in to the parameter it stands for.
    """
    found: dict[int, Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if parameter.device.type == "meta":
                raise ValueError(
                    f"parameter {name!r} of a {type(module).__name__} is on the meta device; load "
                    "its values before asking for symmetries"
                )
            if id(parameter) not in made:
                made[id(parameter)] = stand_in = _stand_in(parameter)
                found[id(stand_in)] = parameter
            places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            module._parameters[name] = made[id(parameter)]
        yield found
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.ndim < 2:
        whole = parameter.detach().full_tensor().cpu()  # type: ignore[attr-defined]
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return nn.Parameter(empty_like_whole(parameter), requires_grad=parameter.requires_grad)


def laid_out_as(shape: Sequence[int], stride: Sequence[int], values: Tensor) -> Tensor:
    """A copy of values with these strides: what is written to its blocks is written to it.

    Not by ``empty_like``, which does not keep the strides of a slice of a larger tensor.
    """
    copy = torch.empty_strided(shape, stride, dtype=values.dtype, device=values.device)
    return copy.copy_(values)


def empty_like_whole(parameter: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised plain tensor of a parameter's global shape and strides."""
    shape, stride = tuple(parameter.shape), tuple(parameter.stride())
    return torch.empty_strided(shape, stride, dtype=parameter.dtype, device=device)
