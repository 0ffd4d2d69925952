"""A quotient manifold behind the interface of geoopt's manifolds."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic

import geoopt
import torch
from torch import Tensor

from quotientopt.manifolds.base import PointT, QuotientManifold

Verdict = tuple[bool, str | None]


class QuotientAdapter(geoopt.Manifold, Generic[PointT]):
    """Translates geoopt's calls, on one tensor, to a :class:`QuotientManifold`.

    Points are tensors ``(*batch, rows, columns)`` with any batch, every item a manifold of its own;
    batches of arguments are broadcast. Points are representatives and stay where steps lead them:
    :meth:`projx` is the identity, and vectors are tangent if they are horizontal.

    The manifold has no tensors of its own, so it serves all devices and dtypes; results have the
    dtype of the point, the arithmetic is float64 where the device has it.

    Attributes
    ----------
    name : str
    ndim : int
        2.
    reversible : bool
        False: a retraction is not undone by that of the reversed vector.
    """

    ndim = 2
    reversible = False

    @abstractmethod
    def quotient(self, batch_shape: Sequence[int] = ()) -> QuotientManifold[PointT]:
        """The manifold itself, for points of that batch: sections, distances, Hessians, …"""

    @property
    @abstractmethod
    def matrix_shape(self) -> tuple[int, int]:
        """The last two dimensions of a point."""

    @abstractmethod
    def _unpack(self, tensor: Tensor) -> PointT:
        """The point or tangent vector that a tensor stands for."""

    @abstractmethod
    def _pack(self, point: PointT) -> Tensor:
        """The tensor of a point or tangent vector."""

    @property
    def dim(self) -> int:
        """Dimension of the quotient, of one batch item."""
        return self.quotient().dim

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """``x + u``, equivariant."""
        x, u = self._expand(x, u)
        quotient = self.quotient(x.shape[:-2])
        return self._pack(quotient.retract(self._unpack(x), self._unpack(u)))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The horizontal component of `v` at `y`, where a step from `x` has led to."""
        x, y, v = self._expand(x, y, v)
        quotient = self.quotient(x.shape[:-2])
        return self._pack(quotient.transport(*(self._unpack(tensor) for tensor in (x, y, v))))

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """The Riemannian metric, of shape ``(*batch)``, with `keepdim` ``(*batch, 1, 1)``.

        One number per batch item, so that the second moment of geoopt's RiemannianAdam is
        invariant too.
        """
        x, u, v = self._expand(x, u, u if v is None else v)
        quotient = self.quotient(x.shape[:-2])
        value = quotient.inner(self._unpack(x), self._unpack(u), self._unpack(v))
        return value[..., None, None] if keepdim else value

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The horizontal component."""
        x, u = self._expand(x, u)
        quotient = self.quotient(x.shape[:-2])
        return self._pack(quotient.horizontal_component(self._unpack(x), self._unpack(u)))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The Riemannian gradient, horizontal whatever the cost is.

        That of an invariant cost is horizontal by itself. What a regularizer that is not invariant
        adds along the orbit (geoopt's ``weight_decay`` is one) is dropped.
        """
        x, u = self._expand(x, u)
        quotient, point = self.quotient(x.shape[:-2]), self._unpack(x)
        gradient = quotient.gradient(point, self._unpack(u))
        return self._pack(quotient.horizontal_component(point, gradient))

    def projx(self, x: Tensor) -> Tensor:
        """`x` itself: every matrix of full rank is a point."""
        return x

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> geoopt.ManifoldTensor:
        """A point with independent standard normal entries.

        Parameters
        ----------
        *size : int or tuple of int
            Shape of the point, batch included; by default a single one.
        dtype, device, generator
            As for :func:`torch.randn`.

        Raises
        ------
        ValueError
            If the last two dimensions are not those of a point.
        TypeError
            On any other keyword.
        """
        if kwargs:
            raise TypeError(f"random() got an unexpected keyword argument {next(iter(kwargs))!r}")
        shape = geoopt.utils.size2shape(*size) if size else self.matrix_shape
        self._assert_check_shape(shape, "x")
        quotient = self.quotient(shape[:-2])
        point = quotient.random_point(generator=generator, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(self._pack(point), manifold=self)

    def _check_shape(self, shape: Sequence[int], name: str) -> Verdict:
        if tuple(shape[-2:]) == self.matrix_shape:
            return True, None
        wanted = ", ".join(str(size) for size in self.matrix_shape)
        return False, f"'{name}' on the {self} must have shape (*batch, {wanted}), not {(*shape,)}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> Verdict:
        """Finite and of full rank, which is no equality: the tolerances do not enter."""
        try:
            self.quotient(x.shape[:-2]).check_point(self._unpack(x))
        except (TypeError, ValueError) as error:
            return False, str(error)
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> Verdict:
        """Horizontal: the vertical component is at most ``atol + rtol ‖u‖`` long."""
        try:
            x, u = self._expand(x, u)
            quotient = self.quotient(x.shape[:-2])
            point, vector = self._unpack(x), self._unpack(u)
            vertical = quotient.norm(point, quotient.vertical_component(point, vector))
            bound = atol + rtol * quotient.norm(point, vector)
        except (TypeError, ValueError) as error:
            return False, str(error)
        if bool((vertical <= bound).all()):
            return True, None
        return False, f"'u' is not horizontal: vertical component {vertical.max().item():.1e}"

    def _expand(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors expanded to their common batch.

        Raises
        ------
        ValueError
            On a wrong shape, or batches that do not broadcast.
        """
        for tensor, name in zip(tensors, ("x", "u", "v"), strict=False):
            self._assert_check_shape(tensor.shape, name)
        try:
            batch = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))
        except RuntimeError:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ValueError(f"batches on the {self} do not match: {shapes}") from None
        return tuple(tensor.expand(*batch, *self.matrix_shape) for tensor in tensors)
