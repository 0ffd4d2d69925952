"""Checks of shapes and dtypes common to the manifolds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import check_finite, check_floating, wide
from quotientopt.groups import StructureGroup


def check_size(name: str, size: int) -> int:
    """Return `size` if it is a positive integer, raise ``ValueError`` otherwise."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")
    return size


def check_batch_shape(batch_shape: Sequence[int]) -> tuple[int, ...]:
    """Return `batch_shape` as a tuple; ``TypeError`` or ``ValueError`` if it holds no sizes."""
    if not isinstance(batch_shape, Sequence):
        raise TypeError(f"batch_shape must be a tuple of integers, got {batch_shape!r}")
    return tuple(check_size("every entry of batch_shape", size) for size in batch_shape)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, check: bool) -> None:
    """Check the dtype, the shape and (optionally) the values of a tensor.

    Raises
    ------
    TypeError
        If it is no real floating-point tensor.
    ValueError
        If it has another shape than `shape`, or, with `check`, non-finite entries.
    """
    check_floating(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if check:
        check_finite(name, tensor)


def wide_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, check: bool) -> Tensor:
    """`tensor` in the widest precision, after :func:`check_tensor`."""
    check_tensor(name, tensor, shape, check=check)
    return wide(tensor)


def check_group_element(group: StructureGroup, g: Tensor) -> None:
    """Raise ``ValueError`` unless `g` lies in the group, in single precision at most.

    Elements that were computed in a lower precision than they are stored in are accepted.
    """
    group.check_element(g.to(torch.float32) if g.dtype == torch.float64 else g)


def random_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or torch's default; ``TypeError`` unless it is real floating-point."""
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating-point, got {dtype}")
    return dtype
