"""What a check looks at: the manifold, its point and randomness, and derivatives by autograd.

In reading order: the :class:`Subject` of a check; partial derivatives of a torch function; and
manifolds of other packages under the names that the checks use (:func:`as_view`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import standard_normal
from quotientopt.checks.points import (
    Point,
    assemble,
    leaves,
    multiply,
    number,
    precision,
    random_like,
    with_gradients,
)

Cost = Callable[[Point], Any]


class Subject:
    """What a check looks at.

    Attributes
    ----------
    manifold : object
        Under our names.
    x : point
        The one given, or a random one.
    generator : torch.Generator
        The one given, or one seeded with 0, so that a check repeats itself.
    eps : float
        Precision of the point's dtype.
    tolerance : float
        Of exact identities: the one given, or ``eps^{2/3}``, 4e-11 in float64 and 2e-5 in float32.
    """

    def __init__(
        self,
        manifold: Any,
        x: Point | None,
        *,
        tolerance: float | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.manifold = as_view(manifold)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.x = self._sample("random_point", dtype=dtype) if x is None else x
        self.eps = precision(self.x)
        self.tolerance = self.eps ** (2 / 3) if tolerance is None else tolerance

    def has(self, *names: str) -> bool:
        """Whether the manifold has all these methods."""
        return all(callable(getattr(self.manifold, name, None)) for name in names)

    def method(self, *names: str) -> Callable[..., Any]:
        """The first of these methods that the manifold has.

        Raises
        ------
        TypeError
            If it has none.
        """
        for name in names:
            if self.has(name):
                return getattr(self.manifold, name)
        wanted = " or ".join(names)
        raise TypeError(f"this check needs {wanted} of the manifold, which {self.manifold!r} lacks")

    def random_tangent(self, x: Point | None = None) -> Point:
        """A random tangent vector at `x`, by default at the point of the check."""
        return self._sample("random_tangent", self.x if x is None else x)

    def random_vector(self) -> Point:
        """A random vector of the surrounding space."""
        return random_like(self.x, self.generator)

    def random_element(self, cond: float = 10.0) -> Any:
        """A random element of the manifold's group, one per batch item.

        Raises
        ------
        TypeError
            If the manifold has no group.
        """
        options = {"cond": cond, "generator": self.generator, **self._placement()}
        if self.has("random_element"):
            return self.manifold.random_element(**options)
        if not hasattr(self.manifold, "group"):
            raise TypeError(f"{self.manifold!r} has no group: pass the group element and act=")
        return self.manifold.group.random(self.manifold.batch_shape, **options)

    def random_vertical_vector(self) -> Point:
        """A random vector tangent to the orbit, or None where there are no orbits."""
        manifold = self.manifold
        known = hasattr(manifold, "group") or hasattr(manifold, "manifolds")
        if not (self.has("vertical_vector") and known):
            return None
        return manifold.vertical_vector(self.x, self._random_algebra_element(manifold))

    def _random_algebra_element(self, manifold: Any) -> Any:
        """Of the group of a manifold, or of those of a product's factors."""
        if hasattr(manifold, "manifolds"):
            factors = manifold.manifolds
            if isinstance(factors, Mapping):
                return {name: self._random_algebra_element(M) for name, M in factors.items()}
            return type(factors)(self._random_algebra_element(M) for M in factors)
        group = manifold.group
        shape = (*manifold.batch_shape, group.r, group.r)
        matrix = standard_normal(shape, generator=self.generator).to(**self._placement())
        return group.algebra_projection(matrix)

    def exponential(self, u: Point) -> Callable[[Point, Point], Point] | None:
        """``manifold.exp``, or None where there is none or it refuses the metric."""
        if not self.has("exp"):
            return None
        try:
            self.manifold.exp(self.x, multiply(0.0, u))
        except (NotImplementedError, ValueError):
            return None
        return self.manifold.exp

    def inner(self, u: Point, v: Point, x: Point | None = None) -> float:
        """``⟨u, v⟩``, summed over the batch."""
        return number(self.method("inner")(self.x if x is None else x, u, v))

    def norm(self, u: Point, x: Point | None = None) -> float:
        """``√⟨u, u⟩``, over the whole batch."""
        return math.sqrt(max(self.inner(u, u, x), 0.0))

    def random_cost(self) -> Cost:
        """A smooth function of the canonical projection, of generic first and second derivative."""
        projection = self.method("canonical_projection")
        invariants = leaves(projection(self.x))
        scales = [invariant.square().mean().sqrt() for invariant in invariants]
        targets = [random_like(invariant, self.generator) for invariant in invariants]

        def cost(y: Point) -> Tensor:
            relative = [
                invariant / scale - target
                for invariant, scale, target in zip(
                    leaves(projection(y)), scales, targets, strict=True
                )
            ]
            return torch.stack([(r.square() / 2 + r.sin()).sum() for r in relative]).sum()

        return cost

    def random_linear_cost(self) -> Cost:
        """A random linear function of the canonical projection."""
        projection = self.method("canonical_projection")
        weights = [random_like(part, self.generator) for part in leaves(projection(self.x))]

        def cost(y: Point) -> Tensor:
            parts = zip(weights, leaves(projection(y)), strict=True)
            return torch.stack([(weight * part).sum() for weight, part in parts]).sum()

        return cost

    def gradient_of(self, cost: Cost) -> Callable[[Point], Point]:
        """The Riemannian gradient of a torch function, by autograd and ``manifold.gradient``."""
        convert = self.method("gradient")
        return lambda x: convert(x, euclidean_gradient(cost, x))

    def hessian_of(self, cost: Cost) -> Callable[[Point, Point], Point]:
        """The Riemannian Hessian, by autograd twice and ``manifold.hessian``."""
        convert = self.method("hessian")

        def hessian(x: Point, u: Point) -> Point:
            return convert(x, euclidean_gradient(cost, x), euclidean_hessian(cost, x, u), u)

        return hessian

    def _sample(self, name: str, *arguments: Any, **keywords: Any) -> Point:
        """Call a random method with those keywords that it knows."""
        method = self.method(name)
        known = inspect.signature(method).parameters
        keywords["generator"] = self.generator
        return method(*arguments, **{key: keywords[key] for key in keywords if key in known})

    def _placement(self) -> dict[str, Any]:
        """dtype and device of group elements for this point."""
        device = getattr(leaves(self.x)[0], "device", "cpu")
        return {"dtype": torch.float64 if self.eps < 1e-10 else torch.float32, "device": device}


def euclidean_gradient(cost: Cost, x: Point) -> Point:
    """Partial derivatives of a torch function (of the sum over the batch)."""
    partials, _ = _partials(cost, x, create_graph=False)
    return assemble(x, partials)


def euclidean_hessian(cost: Cost, x: Point, u: Point) -> Point:
    """Derivative of the partial derivatives along `u`."""
    partials, tensors = _partials(cost, x, create_graph=True)
    along = torch.stack(
        [(p * d.detach()).sum() for p, d in zip(partials, leaves(u), strict=True)]
    ).sum()
    if not along.requires_grad:  # a linear function
        return assemble(x, [torch.zeros_like(tensor) for tensor in tensors])
    second = torch.autograd.grad(along, tensors, allow_unused=True, materialize_grads=True)
    return assemble(x, list(second))


def _partials(cost: Cost, x: Point, *, create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Partial derivatives and the tensors they belong to; zero where the cost ignores one."""
    point, tensors = with_gradients(x)
    value = cost(point)
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise TypeError(
            "derivatives by autograd need a cost that is a torch function of the point, "
            f"got {type(value).__name__} without a gradient; pass gradient= and hessian="
        )
    partials = torch.autograd.grad(
        value.sum(), tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return list(partials), tensors


class View:
    """Another package's manifold under our names; what it does not define the view lacks too.

    Parameters
    ----------
    manifold : object
    names : dict of str to str
        Our name of a method to the other package's.
    base : str
        Module of the other package's abstract manifold, whose methods only raise.
    """

    def __init__(self, manifold: Any, names: dict[str, str], base: str) -> None:
        self.manifold = manifold
        for ours, theirs in names.items():
            if _is_defined(manifold, theirs, base):
                setattr(self, ours, getattr(manifold, theirs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.manifold).__name__})"


class GeooptView(View):
    """A geoopt manifold, for the functions of :mod:`quotientopt.checks`.

    Parameters
    ----------
    manifold : geoopt.Manifold
    *shape : int
        Shape of the random points drawn where a check is given none.
    dim : int, optional
        Dimension of the manifold, of one batch item; geoopt's own manifolds do not know theirs.
    """

    def __init__(self, manifold: Any, *shape: int, dim: int | None = None) -> None:
        names = {
            "retract": "retr",
            "exp": "expmap",
            "transport": "transp",
            "gradient": "egrad2rgrad",
            "horizontal_component": "proju",
        }
        super().__init__(manifold, names, base="geoopt.manifolds.base")
        self.shape = shape
        self.batch_shape = shape[: max(len(shape) - manifold.ndim, 0)]
        self.dim = getattr(manifold, "dim", None) if dim is None else dim

    def random_point(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A point from torch's global generator, in the manifold's own dtype where it has one."""
        own = getattr(self.manifold, "dtype", None)
        return self.manifold.random(*self.shape, dtype=own or dtype).detach()

    def random_tangent(self, x: torch.Tensor) -> torch.Tensor:
        """A random tangent vector of unit norm."""
        u = self.manifold.proju(x, torch.randn_like(x))
        return multiply(1 / number(self.inner(x, u, u)) ** 0.5, u)

    def inner(self, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> float:
        """The metric, summed over the batch."""
        return number(self.manifold.inner(x, u, v))


class PymanoptView(View):
    """A pymanopt manifold, for the functions of :mod:`quotientopt.checks`.

    Points of NumPy arrays have no autograd: pass ``gradient=problem.riemannian_gradient`` and
    ``hessian=problem.riemannian_hessian``.

    Parameters
    ----------
    manifold : pymanopt.manifolds.manifold.Manifold
    """

    def __init__(self, manifold: Any) -> None:
        names = {
            "inner": "inner_product",
            "random_point": "random_point",
            "random_tangent": "random_tangent_vector",
            "retract": "retraction",
            "exp": "exp",
            "transport": "transport",
            "gradient": "euclidean_to_riemannian_gradient",
            "hessian": "euclidean_to_riemannian_hessian",
            "horizontal_component": "projection",
        }
        super().__init__(manifold, names, base="pymanopt.manifolds.manifold")
        self.dim = manifold.dim


def as_view(manifold: Any) -> Any:
    """The manifold under our names: itself, or a view of a geoopt or a pymanopt manifold."""
    if isinstance(manifold, View):
        return manifold
    if hasattr(manifold, "egrad2rgrad"):
        return GeooptView(manifold)
    if hasattr(manifold, "euclidean_to_riemannian_gradient"):
        return PymanoptView(manifold)
    return manifold


def _is_defined(manifold: Any, name: str, base: str) -> bool:
    """Whether a class other than the abstract base, ``base.Manifold``, defines the method."""
    for cls in type(manifold).__mro__:
        if name in vars(cls):
            return (cls.__module__, cls.__name__) != (base, "Manifold")
    return False
