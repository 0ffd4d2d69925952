"""Optimization problems whose cost is a torch function of the point."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pymanopt
from pymanopt.manifolds import Product
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from quotientopt.pymanopt import invariance
from quotientopt.pymanopt.arrays import BACKENDS, Arrays
from quotientopt.pymanopt.autodiff import Differentiator
from quotientopt.pymanopt.base import QuotientAdapter

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
            invariance.check_invariance(factors, on_tensors, tensors)
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
