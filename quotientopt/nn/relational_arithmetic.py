"""Precision shared by the relational layers: computed in at least float32, outside autocast."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quotientopt._linalg import compute_dtype

Result = TypeVar("Result")


class Dense(nn.Linear):
    """``x Wᵀ + b`` in the precision of `x`, whatever the dtype in which W and b are stored."""

    def forward(self, input: Tensor) -> Tensor:
        """Map the last axis of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class Standardize(nn.LayerNorm):
    """Layer normalisation of invariant features in the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of `input`."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear maps around a SiLU, which is smooth, as gradients of scores should be."""
    return nn.Sequential(Dense(inputs, hidden), nn.SiLU(), Dense(hidden, outputs))


def raised(tensor: Tensor) -> Tensor:
    """`tensor` in the precision in which it is computed with: float64, or float32."""
    return tensor.to(compute_dtype(tensor.dtype))


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """Switch autocast off: products of Gram matrices lose their symmetry and sign in bfloat16."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield


def chunks(size: int, chunk_size: int) -> list[slice]:
    """Slices of `chunk_size` rows that cover ``range(size)``."""
    check_size("chunk_size", chunk_size)
    return [slice(start, min(start + chunk_size, size)) for start in range(0, size, chunk_size)]


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, whose intermediate results are not kept for the backward pass."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def check_scale(scale: float) -> None:
    """Raise ``ValueError`` unless `scale` is a positive number."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")


def check_size(name: str, value: object, least: int = 1) -> int:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
