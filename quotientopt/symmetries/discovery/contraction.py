"""Which axes of its parameters a forward sums over, seen from the operations it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Axis(NamedTuple):
    """One axis of a tensor in memory, and the axes of the parameter that run along it."""

    stride: int
    size: int
    labels: frozenset[int]


class _Origin(NamedTuple):
    """Memory that holds a parameter, or a copy of one."""

    name: str
    axes: tuple[_Axis, ...]


class ContractionTrace(TorchDispatchMode):
    """Records, while a forward runs within it, which axes of the parameters are summed over.

    Whether a matrix is stored as (out, in) or (in, out), used through ``nn.Linear``, a product or
    an ``einsum``, or cut into parts first: below autograd all of it is matrix products of views,
    and the strides of a view tell which axes of the parameter its axes are.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        The tensors that the forward will use, by name.

    Attributes
    ----------
    contracted : dict of str to set of int
        Parameter name to the axes that are summed over in some product; an embedding's rows count
        as summed over (with one-hot vectors). Missing for parameters that no product has used.
    looked_up : dict of str to set of int
        Parameter name to the axes along which entries were picked, as an embedding's rows are.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.contracted: dict[str, set[int]] = {}
        self.looked_up: dict[str, set[int]] = {}
        self._origins: dict[int, _Origin] = {}
        # Copies stay alive, or their memory would be handed to another tensor.
        self._copies: list[Tensor] = []
        for name, parameter in parameters.items():
            strides = zip(parameter.stride(), parameter.shape, strict=True)
            axes = tuple(
                _Axis(stride, size, frozenset({axis}))
                for axis, (stride, size) in enumerate(strides)
            )
            self._origins[parameter.untyped_storage().data_ptr()] = _Origin(name, axes)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._origins.clear()
        self._copies.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        operands = [value for value in args if isinstance(value, Tensor)]
        if operation in _PRODUCTS:
            for position, axis in _PRODUCTS[operation]:
                if position < len(args) and isinstance(args[position], Tensor):
                    self._record(args[position], axis, self.contracted)
        elif operation == "embedding":
            self._record(operands[0], 0, self.contracted)
            self._record(operands[0], 0, self.looked_up)
        elif isinstance(result, Tensor):
            self._follow(operands, result)
        return result

    def _record(self, tensor: Tensor, axis: int, where: dict[str, set[int]]) -> None:
        found = self._labels(tensor)
        if found is not None:
            name, labels = found
            where.setdefault(name, set()).update(labels[axis])

    def _follow(self, operands: Iterable[Tensor], result: Tensor) -> None:
        """A copy of a view, or a function of it entry by entry, has its axes."""
        if result.untyped_storage().data_ptr() in self._origins:
            return
        for operand in operands:
            found = self._labels(operand) if operand.shape == result.shape else None
            if found is not None and operand.ndim > 1:
                strides = zip(result.stride(), result.shape, found[1], strict=True)
                origin = _Origin(found[0], tuple(_Axis(*axis) for axis in strides))
                self._origins[result.untyped_storage().data_ptr()] = origin
                self._copies.append(result)
                return

    def _labels(self, tensor: Tensor) -> tuple[str, list[frozenset[int]]] | None:
        """The parameter a tensor is a view of, and its axes along every axis of the tensor."""
        origin = self._origins.get(tensor.untyped_storage().data_ptr())
        if origin is None or tensor.ndim == 0:
            return None
        labels = []
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
            along: frozenset[int] = frozenset()
            if stride > 0 and size > 1:
                for axis in origin.axes:
                    merged = stride <= axis.stride < stride * size
                    within = axis.stride <= stride < axis.stride * axis.size
                    if axis.size > 1 and (merged or within):
                        along |= axis.labels
            labels.append(along)
        return origin.name, labels


# Operation to the positions of its factors and the axis of each that is summed over.
_PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "addmm": ((1, -1), (2, -2)),
    "baddbmm": ((1, -1), (2, -2)),
    "mv": ((0, -1), (1, -1)),
    "dot": ((0, -1), (1, -1)),
    "linear": ((0, -1), (1, -1)),
    "convolution": ((1, 1),),
    "_grouped_mm": ((0, -1), (1, -2)),
}
