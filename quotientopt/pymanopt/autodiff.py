"""Cost, gradient and Hessian-vector products of a torch function, by autograd.

A cost may read more than the point: a penalty weight, a mask, a minibatch. So nothing of one
evaluation is used in another, even at the same point. The Riemannian Hessian, which needs gradient
and Hessian-vector product, is one evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import check_finite, check_floating
from quotientopt.pymanopt.arrays import Arrays, same_values

Cost = Callable[[Sequence[Tensor]], Tensor]


class Differentiator:
    """Derivatives of `cost`, a function of the tensors of a point, at points made of `arrays`."""

    def __init__(self, cost: Cost, arrays: Arrays) -> None:
        self._cost = cost
        self._arrays = arrays
        self._shared: list[_Evaluation] | None = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it, calls at one point share the cost's forward pass and its graph."""
        before, self._shared = self._shared, []
        try:
            yield
        finally:
            self._shared = before

    def value(self, point: Sequence[Any]) -> float:
        """The cost as a Python float."""
        return self._at(point).value()

    def gradient(self, point: Sequence[Any]) -> list[Any]:
        """Partial derivatives, arrays that are the caller's to keep."""
        partials = self._at(point).gradient()
        return [self._arrays.from_torch(partial.clone()) for partial in partials]

    def hessian(self, point: Sequence[Any], vector: Sequence[Any]) -> list[Any]:
        """Derivative of the partial derivatives along `vector`."""
        directions = [self._arrays.to_torch(array) for array in vector]
        return [self._arrays.from_torch(part) for part in self._at(point).hessian(directions)]

    def _at(self, point: Sequence[Any]) -> "_Evaluation":
        tensors = [self._arrays.to_torch(array) for array in point]
        if self._shared is None:
            return _Evaluation(self._cost, tensors)
        if not self._shared or not self._shared[0].is_at(tensors):
            self._shared[:] = [_Evaluation(self._cost, tensors)]
        return self._shared[0]


class _Evaluation:
    """The cost at one point with its graph, and on demand the gradient with its graph."""

    def __init__(self, cost: Cost, point: Sequence[Tensor]) -> None:
        for tensor in point:
            check_floating("point", tensor)
        self._values = [tensor.clone() for tensor in point]
        self._leaves = [tensor.requires_grad_() for tensor in point]
        with torch.enable_grad():
            self._loss = cost(self._leaves)
        check_loss(self._loss)
        self._gradient: tuple[Tensor, ...] | None = None
        self._differentiable_gradient: tuple[Tensor, ...] | None = None

    def is_at(self, point: Sequence[Tensor]) -> bool:
        return all(same_values(new, old) for new, old in zip(point, self._values, strict=True))

    def value(self) -> float:
        return self._loss.item()

    def gradient(self) -> tuple[Tensor, ...]:
        if self._gradient is None:
            self._gradient = torch.autograd.grad(
                self._loss, self._leaves, retain_graph=True, materialize_grads=True
            )
            for partial in self._gradient:
                check_finite("the gradient of cost", partial)
        return self._gradient

    def hessian(self, vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self._differentiable_gradient is None:
            self._differentiable_gradient = torch.autograd.grad(
                self._loss, self._leaves, create_graph=True, materialize_grads=True
            )
        # A partial derivative that does not depend on the point has no graph, and no second ones.
        terms = [
            (partial, direction.to(partial.dtype))
            for partial, direction in zip(self._differentiable_gradient, vector, strict=True)
            if partial.requires_grad
        ]
        if not terms:
            return tuple(torch.zeros_like(leaf) for leaf in self._leaves)
        partials, directions = zip(*terms, strict=True)
        second = torch.autograd.grad(
            partials, self._leaves, directions, retain_graph=True, materialize_grads=True
        )
        for part in second:
            check_finite("the Hessian of cost", part)
        return second


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is a scalar tensor with a graph that leads to the point."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"cost must return a scalar torch.Tensor, got {type(loss).__name__}")
    if loss.ndim or not loss.is_floating_point():
        raise ValueError(
            f"cost must return a real scalar tensor, got {loss.dtype} of shape {tuple(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "cost must be made of differentiable torch operations on the point; what it returned "
            "has no graph (detached, converted to NumPy, or under no_grad)"
        )
