"""Blocks: strided views of a model's parameters with the head axis in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quotientopt.symmetries.sharded import is_sharded, refuse_values


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
        return self.offset + _extent(self.size, self.stride)

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
        if self._end > _extent(self.parameter.shape, self.layout):
            raise ValueError(
                f"parameter {self.name!r} has shape {tuple(self.parameter.shape)} now, less than "
                "its symmetry acts on; find the model's symmetries again"
            )
        tensor = self.parameter.detach() if tensor is None else tensor
        if tensor.stride() != self.layout:
            # Not empty_like, which does not keep the strides of a slice of a larger tensor.
            copy = torch.empty_strided(
                self.parameter.shape, self.layout, dtype=tensor.dtype, device=tensor.device
            )
            tensor = copy.copy_(tensor)
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


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a strided tensor, both included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
