"""The two kinds of arrays a point can be made of: NumPy arrays, or torch tensors on any device."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quotientopt._linalg import wide_dtype

Dtype = torch.dtype | np.dtype | type | str | None


class Arrays(Protocol):
    """How arrays of one kind become torch tensors and back, without copying their memory."""

    name: str

    def to_torch(self, array: Any) -> Tensor:
        """A new tensor on the memory of `array`, outside of any autograd graph."""

    def from_torch(self, tensor: Tensor) -> Any:
        """An array of this kind on the memory of `tensor`."""


class NumpyArrays:
    """NumPy arrays, in main memory."""

    name = "numpy"

    def to_torch(self, array: Any) -> Tensor:
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"a manifold with backend='numpy' needs numpy.ndarray, got {type(array).__name__}"
                + ("; use backend='torch'" if isinstance(array, Tensor) else "")
            )
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # torch has no read-only tensors and no negative strides
        return torch.from_numpy(array)

    def from_torch(self, tensor: Tensor) -> Any:
        return tensor.detach().numpy()


class TorchArrays:
    """torch tensors, on any device."""

    name = "torch"

    def to_torch(self, array: Any) -> Tensor:
        if not isinstance(array, Tensor):
            raise TypeError(
                f"a manifold with backend='torch' needs torch.Tensor, got {type(array).__name__}"
                + ("; use backend='numpy'" if isinstance(array, np.ndarray) else "")
            )
        return array.detach()

    def from_torch(self, tensor: Tensor) -> Any:
        return tensor.detach()


BACKENDS: dict[str, Arrays] = {arrays.name: arrays for arrays in (NumpyArrays(), TorchArrays())}


def choose_backend(backend: str) -> Arrays:
    """The backend of that name; ``ValueError`` if there is none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend]


def choose_device(backend: str, device: torch.device | str | None) -> torch.device:
    """The device of new points: torch's default, or with NumPy the CPU, unless asked for another.

    Raises
    ------
    ValueError
        If there is no such device here, or `backend` cannot use it.
    """
    try:
        if device is None:
            return torch.device("cpu") if backend == "numpy" else torch.get_default_device()
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available: {reason}") from None
    if backend == "numpy" and chosen.type != "cpu":
        raise ValueError(
            f"backend='numpy' keeps points in main memory; use backend='torch' for device {device}"
        )
    return chosen


def choose_dtype(backend: str, dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of new points as torch names it; without a wish the widest one of the device.

    Raises
    ------
    TypeError
        If it is no real floating-point dtype that torch, and NumPy with that backend, know.
    """
    if dtype is None:
        return wide_dtype(device)
    if not isinstance(dtype, torch.dtype):
        try:
            dtype = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
        except TypeError:
            raise TypeError(f"dtype {dtype!r} is none that torch knows") from None
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating-point, got {dtype}")
    if backend == "numpy":
        try:
            torch.empty(0, dtype=dtype).numpy()
        except TypeError:
            raise TypeError(f"NumPy has no {dtype}: use backend='torch'") from None
    return dtype


def same_values(new: Tensor, old: Tensor) -> bool:
    """Whether two tensors are equal in dtype, device, shape and all values."""
    return new.dtype == old.dtype and new.device == old.device and torch.equal(new, old)
