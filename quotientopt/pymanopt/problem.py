"""Optimization problems whose cost is a torch function of the point.

In reading order: the :func:`problem`; its derivatives by autograd (:class:`Differentiator`); and
whether a cost is a function on the quotient at all (:func:`require_invariance`).

A cost may read more than the point: a penalty weight, a mask, a minibatch. So nothing of one
evaluation is used in another, even at the same point. The Riemannian Hessian, which needs gradient
and Hessian-vector product, is one evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pymanopt
import torch
from pymanopt.manifolds import Product
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from quotientopt._linalg import check_finite, check_floating, standard_normal
from quotientopt.pymanopt.base import BACKENDS, Arrays, QuotientAdapter, same_values

Cost = Callable[[Sequence[Tensor]], Tensor]
Preconditioner = Callable[[Any, Any], Any]


def problem(
    manifold: Manifold,
    cost: Callable[..., Tensor],
    *,
    preconditioner: Preconditioner | None = None,
    check_invariance: bool = True,
) -> pymanopt.Problem:
    """A pymanopt problem that every solver runs, differentiated by autograd.

    Every evaluation runs the cost anew, so that it may read what changes between them: a penalty
    weight, a mask, a minibatch. The gradient and the Hessian-vector product (double backward) of a
    Riemannian Hessian are one evaluation, on one graph.

    Parameters
    ----------
    manifold : pymanopt manifold
        :class:`FactorManifold`, :class:`GramManifold`, any of pymanopt's own manifolds of real
        NumPy arrays, or a ``Product`` of these.
    cost : callable
        A function of torch tensors that returns a scalar tensor. With one parameter it gets the
        point: ``(A, B)``, or ``X``, or for a product a list of such. With as many parameters as the
        point has arrays it gets each by itself, which is pymanopt's own convention:
        ``cost(A, B)``.
    preconditioner : callable, optional
        ``(point, tangent vector) -> tangent vector``, passed on to pymanopt.
    check_invariance : bool
        Whether to make sure, when the gradient is first asked for, that close to there it has no
        vertical part: that the cost is constant along orbits. Not decided if it is not finite.

    Returns
    -------
    pymanopt.Problem

    Raises
    ------
    TypeError
        If `manifold` is no pymanopt manifold, or `cost` takes another number of arguments or
        returns no tensor.
    ValueError
        If a product mixes backends, `cost` is no scalar or not differentiable, or it changes along
        an orbit.
    """
    if not isinstance(manifold, Manifold):
        raise TypeError(f"manifold must be a pymanopt manifold, got {type(manifold).__name__}")
    factors = manifold.manifolds if isinstance(manifold, Product) else (manifold,)
    arrays, on_tensors = _backend(factors), _on_tensors(manifold, cost)
    differentiator = Differentiator(on_tensors, arrays)
    single = manifold.num_values == 1

    def value(*point: Any) -> float:
        return differentiator.value(point)

    def gradient(*point: Any) -> Any:
        nonlocal check_invariance
        if check_invariance:
            tensors = [arrays.to_torch(array) for array in point]
            require_invariance(factors, on_tensors, tensors)
            check_invariance = False
        partials = differentiator.gradient(point)
        return partials[0] if single else partials

    def hessian(*point_and_vector: Any) -> Any:
        half = len(point_and_vector) // 2
        product = differentiator.hessian(point_and_vector[:half], point_and_vector[half:])
        return product[0] if single else product

    wrap = pymanopt.function.numpy(manifold)  # passes arrays of every kind through
    return _Problem(
        manifold,
        wrap(value),
        differentiator,
        euclidean_gradient=wrap(gradient),
        euclidean_hessian=wrap(hessian),
        preconditioner=preconditioner,
    )


class _Problem(pymanopt.Problem):
    """A problem whose Riemannian Hessian is one evaluation of the cost."""

    def __init__(
        self, manifold: Manifold, cost: Any, differentiator: Differentiator, **options: Any
    ) -> None:
        super().__init__(manifold, cost, **options)
        self._differentiator = differentiator

    @property
    def riemannian_hessian(self) -> Callable[[Any, Any], Any]:
        hessian = super().riemannian_hessian

        def one_evaluation(point: Any, tangent_vector: Any) -> Any:
            with self._differentiator.evaluation():
                return hessian(point, tangent_vector)

        return one_evaluation


def _backend(factors: Sequence[Manifold]) -> Arrays:
    """The arrays that points of a product are made of; pymanopt's own manifolds use NumPy."""
    by_backend = {
        factor.backend if isinstance(factor, QuotientAdapter) else "numpy": str(factor)
        for factor in factors
    }
    if len(by_backend) > 1:
        raise ValueError(
            "a product needs one backend: points are torch tensors on "
            f"'{by_backend['torch']}' and NumPy arrays on '{by_backend['numpy']}'; "
            "use backend='numpy' throughout"
        )
    return BACKENDS[next(iter(by_backend))]


def _on_tensors(
    manifold: Manifold, cost: Callable[..., Tensor]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """`cost` as a function of the sequence of all tensors of a point."""
    if not callable(cost):
        raise TypeError(f"cost must be a function of the point, got {type(cost).__name__}")
    count = manifold.num_values
    if _required_parameters(cost, count) == count:
        return lambda tensors: cost(*tensors)
    layout = manifold.point_layout
    if isinstance(layout, int):
        return lambda tensors: cost(tuple(tensors))
    ends = np.cumsum(layout)

    def of_product(tensors: Sequence[Tensor]) -> Tensor:
        parts = [tuple(tensors[end - size : end]) for size, end in zip(layout, ends, strict=True)]
        return cost([part[0] if len(part) == 1 else part for part in parts])

    return of_product


def _required_parameters(cost: Callable[..., Tensor], count: int) -> int:
    """1 or `count`, whichever number of arguments `cost` must be called with."""
    kinds = inspect.Parameter
    try:
        signature = inspect.signature(cost)
    except ValueError:
        raise TypeError(
            f"cost {cost!r} has no signature: wrap it in a function of the point"
        ) from None
    parameters = signature.parameters.values()
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        return count
    required = [p for p in parameters if p.default is kinds.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) not in (1, count) or any(p.kind is kinds.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"cost must take the point as one argument or its {count} arrays, "
            f"but it takes {signature}"
        )
    return len(required)


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

    def _at(self, point: Sequence[Any]) -> _Evaluation:
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


def require_invariance(factors: Sequence[Manifold], cost: Cost, tensors: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` if the gradient of `cost` has a vertical part near a point.

    A function is constant along (connected) orbits if and only if its gradient is horizontal. The
    test is made where every coordinate is moved at random by about a tenth of its size: at the
    point itself the gradient may vanish, and then rounding alone would decide.

    Parameters
    ----------
    factors : sequence of pymanopt manifolds
        The factors of the product, in order.
    cost : callable
        Function of the sequence of all tensors of a point.
    tensors : sequence of Tensor
        A point of the product, flattened.
    """
    generator = torch.Generator().manual_seed(0)
    nearby = [_moved(tensor, generator).requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        loss = cost(nearby)
    check_loss(loss)
    partials = torch.autograd.grad(loss, nearby, materialize_grads=True)
    if not all(bool(torch.isfinite(partial).all()) for partial in partials):
        return
    start = 0
    for factor in factors:
        part = slice(start, start + factor.num_values)
        if isinstance(factor, QuotientAdapter):
            _check_factor(factor, nearby[part], partials[part])
        start += factor.num_values


def _check_factor(
    factor: QuotientAdapter[Any], point: Sequence[Tensor], partials: Sequence[Tensor]
) -> None:
    quotient = factor.quotient
    x: Any = tuple(tensor.detach() for tensor in point)
    partial: Any = tuple(partials)
    if len(x) == 1:
        x, partial = x[0], partial[0]
    gradient = quotient.gradient(x, partial)
    whole = quotient.norm(x, gradient)
    vertical = quotient.norm(x, quotient.vertical_component(x, gradient))
    tolerance = torch.finfo(whole.dtype).eps ** 0.4
    if bool((vertical > tolerance * whole).any()):
        ratio = (vertical / whole).nan_to_num(0).max().item()
        raise ValueError(
            f"cost is not invariant under {quotient.group!r}: the vertical part of its gradient is "
            f"{ratio:.0e} of the whole; use a smaller group, an invariant cost, or "
            "check_invariance=False"
        )


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = standard_normal(tensor.shape, generator=generator, device=tensor.device)
    size = tensor.square().mean().sqrt()
    return tensor + (0.1 * size * noise).to(tensor.dtype)
