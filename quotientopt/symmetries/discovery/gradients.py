"""What a run forwards and backwards tells of the parameters, as far as it is kept.

Forwards, which of their axes are summed over (:class:`ContractionTrace`). Backwards, gradients:
their charges row by row, and thin factors where they have few of them. The gradient of a matrix in
a linear map is ``Σ_t δ_t a_tᵀ`` over the tokens t of a batch. Of a few tokens it has a far lower
rank than the matrix, and its rows are those of ``L R`` with L of few columns. Gradients are taken
as they come out of the backward pass, parameter by parameter, so that one of them is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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


# Entries of a parameter that are worked on at once, of parameters that are kept as they are, and of
# a buffer: more than what a C library takes from memory that it does not give back (32 MB).
BLOCK, SMALL, BUFFER = 2**18, 2**16, 5 * 2**20
# Columns that are tried for thin factors, and how far off a row may be: of its own length, and of
# the mean length of the rows that are not zero.
COLUMNS, OFF, FAR_OFF = (32, 128, 512), 1e-12, 1e-14


class Store:
    """Memory of its own for what is kept, between gradients that come and go.

    Small pieces among them would keep the system from getting the memory back.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.float64)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy in a large buffer; the tensor itself where it is large or on another device."""
        if tensor.device.type != "cpu" or tensor.numel() > BUFFER // 4:
            return tensor
        if tensor.numel() > self._buffer.numel():
            self._buffer = torch.empty(BUFFER, dtype=torch.float64)
        own, self._buffer = self._buffer.split(
            [tensor.numel(), self._buffer.numel() - tensor.numel()]
        )
        return own.view(tensor.shape).copy_(tensor)


class Gradient:
    """Gradients of some functions by one parameter, whole or as a product of thin factors.

    Parameters
    ----------
    functions : int
    store : Store
    """

    def __init__(self, functions: int, store: Store) -> None:
        self._store = store
        self._parts: list[Tensor | tuple[Tensor, Tensor] | None] = [None] * functions

    @property
    def complete(self) -> bool:
        """Whether all functions depend on the parameter."""
        return all(part is not None for part in self._parts)

    def put(self, index: int, gradient: Tensor, generator: torch.Generator) -> None:
        """Take the gradient of one function; it is not kept if thin factors do."""
        thin = _thin(gradient, generator)
        keep = self._store.keep
        self._parts[index] = keep(gradient) if thin is None else (keep(thin[0]), keep(thin[1]))

    def whole(self) -> Tensor:
        """``(functions, *shape)``."""
        return torch.stack(
            [
                part if isinstance(part, Tensor) else part[0] @ part[1]
                for part in self._parts
                if part is not None
            ]
        )

    def rows(self, column_axis: int | None, index: Tensor) -> Tensor:
        """Rows of all functions, ``(functions, *index.shape, columns)``."""
        found = []
        for part in self._parts:
            assert part is not None
            if isinstance(part, Tensor):
                found.append(in_rows(part, column_axis)[index])
            elif column_axis in (1, -1):
                found.append(part[0][index] @ part[1])
            else:
                found.append(part[1].mT[index] @ part[0].mT)
        return torch.stack(found)


def in_rows(tensor: Tensor, column_axis: int | None) -> Tensor:
    """``(rows, columns)``: all axes but one flattened; one column for None."""
    if column_axis is None:
        return tensor.reshape(-1, 1)
    return tensor.movedim(column_axis, -1).flatten(0, -2)


def _thin(gradient: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Factors ``(rows, k)`` and ``(k, columns)``; None if k would have to be large."""
    if gradient.ndim != 2 or gradient.numel() <= SMALL:
        return None
    rows, columns = gradient.shape
    for k in COLUMNS:
        if 4 * k > min(rows, columns):
            return None
        sample = torch.randn(columns, k, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(gradient @ sample.to(gradient.device)).Q
        U, values, Vh = torch.linalg.svd(basis.mT @ gradient, full_matrices=False)
        kept = int((values > torch.finfo(values.dtype).eps * values[0]).sum())
        left, right = basis @ U[:, :kept], values[:kept, None] * Vh[:kept]
        if _close(gradient, left, right):
            return left, right
    return None


def _close(gradient: Tensor, basis: Tensor, other: Tensor) -> bool:
    """Whether every row and every column of ``basis @ other`` is that of the gradient."""
    squares = [torch.zeros(n, dtype=torch.float64, device=gradient.device) for n in gradient.shape]
    errors = [torch.zeros_like(square) for square in squares]
    for start, block in blocks(gradient):
        own = slice(start, start + len(block))
        error = (basis[own] @ other).sub_(block).square_()
        errors[0][own] = error.sum(1)
        errors[1] += error.sum(0)
        square = torch.square(block, out=error)
        squares[0][own] = square.sum(1)
        squares[1] += square.sum(0)
    for error, square in zip(errors, squares, strict=True):
        mean = square.sum() / (square > 0).sum().clamp_min(1)
        bound = OFF * square.sqrt() + FAR_OFF * mean.sqrt()
        if not bool((error.sqrt() <= bound).all()):
            return False
    return True


def blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Views of consecutive parts of the first axis, with where they start."""
    if tensor.ndim == 0:
        yield 0, tensor.unsqueeze(0)
        return
    size = max(1, BLOCK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), size):
        yield start, tensor[start : start + size]


class Sums(NamedTuple):
    """Sums over the columns of a parameter's rows.

    Attributes
    ----------
    charge : Tensor
        ``W_i · ∂W_i``, ``(functions, rows)``.
    size : Tensor
        Sums of the absolute values of their terms, the larger of the functions', ``(rows,)``.
    slope : Tensor
        ``|∂W_i|``, the larger of the functions', ``(rows,)``.
    noise : Tensor
        What rounding leaves undecided of the charges, ``(rows,)``.
    """

    charge: Tensor
    size: Tensor
    slope: Tensor
    noise: Tensor

    def narrow(self, chosen: slice) -> Sums:
        """Of some of the rows."""
        return Sums(*(part[..., chosen] for part in self))


@dataclass(eq=False)
class Charges:
    """Sums of one parameter by every axis that its columns may run along.

    A parameter of few entries is kept entry by entry, and cut later; None as an axis is that. Of
    others the noise of a row is that of its charge times the root of the number of columns, which
    is what the noises of the single terms add up to.

    Parameters
    ----------
    functions : int
    like : Tensor
        The parameter.
    store : Store
    """

    functions: int
    like: Tensor
    store: Store

    def __post_init__(self) -> None:
        self.small = self.like.ndim < 2 or self.like.numel() <= SMALL
        wide = [axis for axis, size in enumerate(self.like.shape) if size > 1]
        axes = wide if len(wide) > 1 else [self.like.ndim - 1, 0]
        # Of small parameters the terms, of others the sums by axis; of every function.
        self._terms: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}
        self._sums: dict[int, dict[int, _AxisSums]] = {} if self.small else {a: {} for a in axes}
        self._second: dict[int | None, Tensor] = {}

    def put(self, index: int, values: Tensor, gradient: Tensor) -> None:
        """Take the gradient of one function at the point."""
        if self.small:
            keep = self.store.keep
            self._terms[index], self._slopes[index] = keep(values * gradient), keep(gradient)
            if index == 0:
                self._second[None] = keep(self._terms[index])
            return
        for axis, sums in _axis_sums(values, gradient, self._sums).items():
            self._sums[axis][index] = _AxisSums(*map(self.store.keep, sums))
            if index == 0:
                self._second[axis] = self.store.keep(sums.charge)

    def put_moved(self, factor: float, values: Tensor, gradient: Tensor) -> None:
        """Take the gradient of the first function at a moved point into a second difference."""
        if self.small:
            self._second[None].add_(values * gradient, alpha=factor)
            return
        for axis, sums in _axis_sums(values, gradient, self._sums).items():
            self._second[axis].add_(sums.charge, alpha=factor)

    @property
    def any(self) -> bool:
        """Whether some gradient is not zero."""
        slopes = [s.any() for s in self._slopes.values()]
        slopes += [own.square.any() for of in self._sums.values() for own in of.values()]
        return any(bool(found) for found in slopes)

    def sums(self, axis: int | None) -> Sums:
        """Those of the rows whose columns run along an axis."""
        if self.small:
            order = range(self.functions)
            terms = [in_rows(self._terms[index], axis) for index in order]
            slopes = [in_rows(self._slopes[index], axis) for index in order]
            return Sums(
                torch.stack([term.sum(-1) for term in terms]),
                torch.stack([term.abs().sum(-1) for term in terms]).amax(0),
                torch.stack([torch.linalg.vector_norm(s, dim=-1) for s in slopes]).amax(0),
                in_rows(self._second[None].abs(), axis).sum(-1),
            )
        assert axis is not None
        found = [self._sums[axis][index] for index in range(self.functions)]
        charge, size, square = (torch.stack(part) for part in zip(*found, strict=True))
        noise = self._second[axis].abs() * self.like.shape[axis] ** 0.5
        return Sums(charge, size.amax(0), square.amax(0).sqrt(), noise)


class _AxisSums(NamedTuple):
    """Of one function: charges, sums of their absolute terms, squared lengths of the gradient."""

    charge: Tensor
    size: Tensor
    square: Tensor


def _axis_sums(values: Tensor, gradient: Tensor, axes: Iterable[int]) -> dict[int, _AxisSums]:
    """Sums over each of some axes, block by block of the first one."""
    found: dict[int, list[tuple[Tensor, ...]]] = {axis: [] for axis in axes}
    for (_, block), (_, slope) in zip(blocks(values), blocks(gradient), strict=True):
        terms = block * slope
        charges = {axis: terms.sum(axis) for axis in found}
        terms.abs_()
        sizes = {axis: terms.sum(axis) for axis in found}
        torch.square(slope, out=terms)
        for axis, own in found.items():
            sums = (charges[axis], sizes[axis], terms.sum(axis))
            own.append(tuple(part.flatten() for part in sums))
    return {
        axis: _AxisSums(
            *(torch.stack(p).sum(0) if axis == 0 else torch.cat(p) for p in zip(*own, strict=True))
        )
        for axis, own in found.items()
    }
