"""Arithmetic on the points and tangent vectors of any manifold.

A point is an array (a torch tensor or a NumPy array), a tuple, list or dict of points, or an object
with vector arithmetic of its own that yields its arrays when iterated over.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import standard_normal

Point = Any


def leaves(point: Point) -> list[Any]:
    """The arrays of a point, in order.

    Raises
    ------
    TypeError
        If it is neither an array nor made of arrays.
    """
    if hasattr(point, "dtype") and hasattr(point, "shape"):
        return [point]
    if not isinstance(point, Iterable) or isinstance(point, (str, bytes)):
        raise TypeError(
            f"a point must be an array or made of arrays, got {type(point).__name__}; "
            "wrap the manifold in a view whose points are tensors"
        )
    parts = point.values() if isinstance(point, Mapping) else point
    return [leaf for part in parts for leaf in leaves(part)]


def add(u: Point, v: Point, scale: float = 1.0) -> Point:
    """``u + scale · v``."""
    if _is_plain_collection(u):
        return _combine(lambda a, b: add(a, b, scale), u, v)
    return u + v * scale


def multiply(scale: float, u: Point) -> Point:
    """``scale · u``."""
    if _is_plain_collection(u):
        return _combine(lambda part: multiply(scale, part), u)
    return u * scale


def flatten(point: Point) -> Tensor:
    """All entries of a point as one float64 vector on the CPU."""
    # A copy of arrays that are not tensors: torch knows no negative strides.
    tensors = [
        leaf.detach() if isinstance(leaf, Tensor) else torch.as_tensor(leaf.copy())
        for leaf in leaves(point)
    ]
    return torch.cat([tensor.reshape(-1).cpu().double() for tensor in tensors])


def deviation(a: Point, b: Point) -> float:
    """Largest difference of two points, each array relative to its own size in `b`.

    Array by array, because a group element may stretch one and shrink another.
    """
    worst = 0.0
    for part, reference in zip(leaves(a), leaves(b), strict=True):
        size = torch.linalg.vector_norm(flatten(reference)).item()
        error = torch.linalg.vector_norm(flatten(part) - flatten(reference)).item()
        relative = error / size if size > 0 else error
        # NaN compares false with everything and must not get lost.
        worst = worst if relative <= worst else relative
    return worst


def random_like(point: Point, generator: torch.Generator) -> Point:
    """A vector of the surrounding space with independent standard normal entries.

    Raises
    ------
    TypeError
        If the point is made of anything but torch tensors and NumPy arrays.
    """
    if isinstance(point, Tensor):
        sample = standard_normal(point.shape, generator=generator, device=point.device)
        return sample.to(point.dtype)
    if hasattr(point, "dtype") and hasattr(point, "__array__"):
        sample = standard_normal(point.shape, generator=generator, device="cpu")
        return sample.numpy().astype(point.dtype)
    if isinstance(point, (tuple, list, Mapping)):
        return _combine(lambda part: random_like(part, generator), point)
    raise TypeError(f"no random vectors for points of type {type(point).__name__}")


def precision(point: Point) -> float:
    """Distance from 1 to the next number in the coarsest dtype of the point."""
    names = (str(leaf.dtype).removeprefix("torch.") for leaf in leaves(point))
    return max(torch.finfo(getattr(torch, name)).eps for name in names)


def number(value: Any) -> float:
    """A scalar, or the sum of an array of scalars (one per batch item), as a Python float."""
    if isinstance(value, Tensor):
        return value.detach().double().sum().item()
    return float(value.sum()) if hasattr(value, "sum") else float(value)


def with_gradients(point: Point) -> tuple[Point, list[Tensor]]:
    """A copy of a point that records gradients, and its leaves.

    Raises
    ------
    TypeError
        If it is not made of tensors.
    """
    tensors: list[Tensor] = []

    def record(part: Point) -> Point:
        if isinstance(part, Tensor):
            tensors.append(part.detach().clone().requires_grad_())
            return tensors[-1]
        if isinstance(part, (tuple, list, Mapping)):
            return _combine(record, part)
        raise TypeError(
            f"derivatives by autograd need points of tensors, got {type(part).__name__}; "
            "pass gradient= and hessian="
        )

    return record(point), tensors


def assemble(point: Point, tensors: list[Tensor]) -> Point:
    """A point of the same structure from its leaves; what :func:`leaves` takes apart."""
    remaining = iter(tensors)

    def build(part: Point) -> Point:
        return next(remaining) if isinstance(part, Tensor) else _combine(build, part)

    return build(point)


def _is_plain_collection(point: Point) -> bool:
    """Whether ``+`` on it would join collections, or fail, instead of adding vectors."""
    plain_sequence = getattr(type(point), "__add__", None) in (tuple.__add__, list.__add__)
    return plain_sequence or isinstance(point, Mapping)


def _combine(function: Callable[..., Point], *points: Point) -> Point:
    """A collection of the first one's kind from a function of matching parts."""
    first = points[0]
    if isinstance(first, Mapping):
        return type(first)((key, function(*(p[key] for p in points))) for key in first)  # type: ignore[call-arg]
    parts = [function(*group) for group in zip(*points, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
