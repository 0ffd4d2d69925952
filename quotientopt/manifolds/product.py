"""Products of quotient manifolds: all symmetries of a model together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype
from quotientopt.manifolds.base import QuotientManifold

Collection = dict[str, Any] | tuple[Any, ...]
"""One entry for each factor: a dict with their names, or a tuple in their order."""


class ProductManifold(QuotientManifold[Collection]):
    """The product of quotient manifolds, for example of all attention circuits of a model.

    Points, tangent vectors, group elements, invariants and whatever else belongs to a point of a
    factor are collected in dicts with the names of the factors, or in tuples, as the factors were
    given. Each factor counts with all its batch items: inner products are summed over them, so
    ``inner``, ``norm`` and ``distance`` are single numbers, and ``dim`` is the dimension of all
    batch items of all factors. In place of ``group`` there is :attr:`groups`.

    Parameters
    ----------
    manifolds : mapping of str to QuotientManifold, or sequence of QuotientManifold
        The factors; at least one.

    Raises
    ------
    TypeError
        If a factor is no quotient manifold. By every method: if what is given for a point is no
        collection of the same kind.
    ValueError
        If there is no factor. By every method: if names are missing or superfluous, and for the
        reasons of the factors, with their names in front.
    """

    batch_shape = ()

    def __init__(
        self, manifolds: Mapping[str, QuotientManifold[Any]] | Sequence[QuotientManifold[Any]]
    ) -> None:
        named = isinstance(manifolds, Mapping)
        items = manifolds.items() if isinstance(manifolds, Mapping) else enumerate(manifolds)
        self._factors: dict[Any, QuotientManifold[Any]] = dict(items)
        self._named = named
        if not self._factors:
            raise ValueError("a product needs at least one manifold")
        for name, manifold in self._factors.items():
            if not isinstance(manifold, QuotientManifold):
                raise TypeError(f"factor {name!r} is no quotient manifold: {manifold!r}")

    @property
    def manifolds(self) -> Collection:
        """The factors."""
        return self._collect(self._factors)

    @property
    def groups(self) -> Collection:
        """The structure groups of the factors."""
        return self._collect(
            {
                name: M.groups if isinstance(M, ProductManifold) else M.group
                for name, M in self._factors.items()
            }
        )

    @property
    def dim(self) -> int:
        """Sum of the dimensions of all batch items of all factors."""
        return sum(M.dim * torch.Size(M.batch_shape).numel() for M in self._factors.values())

    def check_point(self, x: Collection) -> None:
        self._each("check_point", x)

    def check_tangent(
        self, x: Collection, u: Collection, *, tolerance: float | None = None
    ) -> None:
        self._each("check_tangent", x, u, tolerance=tolerance)

    def random_point(
        self,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Collection:
        return self._each("random_point", generator=generator, dtype=dtype, device=device)

    def random_element(
        self,
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Collection:
        """Random elements of the groups of all factors."""
        options: dict[str, Any] = {
            "cond": cond,
            "generator": generator,
            "dtype": dtype,
            "device": device,
        }
        return self._collect(
            {
                name: M.random_element(**options)
                if isinstance(M, ProductManifold)
                else M.group.random(M.batch_shape, **options)
                for name, M in self._factors.items()
            }
        )

    def random_tangent(
        self, x: Collection, *, generator: torch.Generator | None = None
    ) -> Collection:
        """A random horizontal vector of unit norm, every batch item with the same share."""
        u = self._each("random_tangent", x, generator=generator)
        count = sum(torch.Size(M.batch_shape).numel() for M in self._factors.values())
        return self._map(lambda tensor: tensor / count**0.5, u)

    def inner(self, x: Collection, u: Collection, v: Collection) -> Tensor:
        """Sum of the inner products of all batch items of all factors: one number."""
        return self._sum(self._each("inner", x, u, v))

    def canonical_projection(self, x: Collection) -> Any:
        """The invariants of the factors. Dense."""
        return self._each("canonical_projection", x)

    def differential(self, x: Collection, u: Collection) -> Any:
        """Derivatives of the invariants of the factors. Dense."""
        return self._each("differential", x, u)

    def vertical_vector(self, x: Collection, algebra_element: Any) -> Collection:
        return self._each("vertical_vector", x, algebra_element)

    def vertical_component(self, x: Collection, u: Collection) -> Collection:
        return self._each("vertical_component", x, u)

    def horizontal_component(self, x: Collection, u: Collection) -> Collection:
        return self._each("horizontal_component", x, u)

    def horizontal_lift(self, x: Collection, base_tangent: Any) -> Collection:
        return self._each("horizontal_lift", x, base_tangent)

    def gradient(self, x: Collection, euclidean_gradient: Collection) -> Collection:
        return self._each("gradient", x, euclidean_gradient)

    def hessian(
        self,
        x: Collection,
        euclidean_gradient: Collection,
        euclidean_hessian: Collection,
        u: Collection,
    ) -> Collection:
        """Hessian of a function on the product: `euclidean_hessian` couples the factors."""
        return self._each("hessian", x, euclidean_gradient, euclidean_hessian, u)

    def retract(self, x: Collection, u: Collection) -> Collection:
        return self._each("retract", x, u)

    def retract_second_order(self, x: Collection, u: Collection) -> Collection:
        return self._each("retract_second_order", x, u)

    def transport(self, x: Collection, y: Collection, u: Collection) -> Collection:
        return self._each("transport", x, y, u)

    def exp(self, x: Collection, u: Collection) -> Collection:
        """Exponential maps of the factors, where all have one in closed form."""
        return self._each("exp", x, u)

    def log(self, x: Collection, y: Collection) -> Collection:
        """Logarithms of the factors, where all have one in closed form."""
        return self._each("log", x, y)

    def geodesic(self, x: Collection, u: Collection, t: float) -> Collection:
        """Geodesics of the factors, where all have one in closed form, at the time t."""
        pairs = self._arguments("x", x), self._arguments("u", u)
        return self._call("geodesic", {name: tuple(p[name] for p in pairs) for name in pairs[0]}, t)

    def act(self, g: Any, x: Collection) -> Collection:
        """Move each factor's point by its own group element."""
        return self._each("act", g, x)

    def align(self, x: Collection, y: Collection) -> tuple[Collection, Any]:
        return self._unzip(self._each("align", x, y))

    def distance(self, x: Collection, y: Collection) -> Tensor:
        """Root of the sum of squared distances of all batch items of all factors: one number."""
        return torch.linalg.vector_norm(self._flat(self._each("distance", x, y)))

    def section(
        self,
        x: Collection,
        kind: str = "svd",
        *,
        return_gap: bool = False,
        warn_below: float | None = None,
    ) -> Any:
        """The section `kind` of every factor; for different kinds call the factors."""
        arguments = {name: (part,) for name, part in self._arguments("x", x).items()}
        options = {"return_gap": return_gap, "warn_below": warn_below}
        found = self._call("section", arguments, kind, **options)
        return self._unzip(found, 3 if return_gap else 2)

    def _each(self, method: str, *collections: Any, **options: Any) -> Any:
        """Call a method of every factor on its parts of the collections."""
        parts = [self._arguments(f"argument {i}", c) for i, c in enumerate(collections, 1)]
        arguments = {name: tuple(part[name] for part in parts) for name in self._factors}
        return self._call(method, arguments, **options)

    def _call(
        self, method: str, arguments: dict[Any, tuple[Any, ...]], *shared: Any, **options: Any
    ) -> Any:
        results = {}
        for name, manifold in self._factors.items():
            function = getattr(manifold, method)
            try:
                results[name] = function(*arguments[name], *shared, **options)
            except (ValueError, TypeError) as error:
                raise type(error)(f"factor {name!r}: {error}") from None
        return self._collect(results)

    def _arguments(self, what: str, collection: Any) -> dict[Any, Any]:
        if self._named:
            if not isinstance(collection, Mapping):
                raise TypeError(
                    f"{what} must be a dict with names, got {type(collection).__name__}"
                )
            parts = dict(collection)
        else:
            if not isinstance(collection, (tuple, list)):
                raise TypeError(f"{what} must be a tuple, got {type(collection).__name__}")
            parts = dict(enumerate(collection))
        if parts.keys() != self._factors.keys():
            raise ValueError(
                f"{what} must have the entries {list(self._factors)}, got {list(parts)}"
            )
        return parts

    def _collect(self, parts: dict[Any, Any]) -> Any:
        return parts if self._named else tuple(parts.values())

    def _unzip(self, results: Any, count: int = 2) -> Any:
        parts = self._arguments("result", results)
        return tuple(
            self._collect({name: result[k] for name, result in parts.items()}) for k in range(count)
        )

    def _map(self, function: Callable[[Tensor], Tensor], collection: Any) -> Any:
        def apply(part: Any) -> Any:
            if isinstance(part, Tensor):
                return function(part)
            if isinstance(part, Mapping):
                return {name: apply(entry) for name, entry in part.items()}
            return tuple(apply(entry) for entry in part)

        return apply(collection)

    def _flat(self, scalars: Any) -> Tensor:
        """All numbers of all factors in one vector, in at least float32."""
        tensors = list(self._arguments("result", scalars).values())
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, compute_dtype(tensor.dtype))
        return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])

    def _sum(self, scalars: Any) -> Tensor:
        return self._flat(scalars).sum()

    def __repr__(self) -> str:
        return f"ProductManifold({self.manifolds!r})"
