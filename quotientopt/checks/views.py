"""Manifolds of other packages under the names that the checks use."""

from typing import Any

import torch

from quotientopt.checks.points import multiply, number


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
