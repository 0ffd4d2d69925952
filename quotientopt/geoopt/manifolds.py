"""Our quotient manifolds behind the interface of geoopt's manifolds.

In reading order: what both have in common (:class:`QuotientAdapter`); factor pairs as one tensor
with A and B side by side (:class:`FactorManifold`); token matrices modulo rotations
(:class:`GramManifold`); and an equivariant start for the momentum of geoopt's RiemannianSGD
(:func:`zero_momentum_`).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic

import geoopt
import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt.groups import StructureGroup
from quotientopt.manifolds import FactorQuotient, GramQuotient
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


class FactorManifold(QuotientAdapter[Pair]):
    """Pairs (A, B) modulo ``(g^{-T} A, g B)``, packed into one tensor ``[A, B]``.

    A point has shape ``(*batch, r, n + m)``, its first n columns A and the last m columns B; see
    :class:`quotientopt.manifolds.FactorQuotient` for the geometry, :meth:`pack_point` and
    :meth:`unpack_tensor` for the packing. :meth:`unpack_tensor` returns views, so a model can
    compute with the two factors of one :class:`geoopt.ManifoldParameter`.

    Parameters
    ----------
    r, n, m : int
        Rows of both factors, columns of A, columns of B.
    group : StructureGroup, optional
        ``GL(r)`` by default.
    metric : str
        As of :class:`quotientopt.manifolds.FactorQuotient`.
    check : bool
        Whether to look for non-finite entries and rank deficiency at every call, which waits for
        the device.

    Raises
    ------
    ValueError
        On sizes that do not fit, or a group or metric that is not available.
    """

    name = "Factor"

    def __init__(
        self,
        r: int,
        n: int,
        m: int,
        *,
        group: StructureGroup | None = None,
        metric: str = "preconditioned",
        check: bool = True,
    ) -> None:
        super().__init__()
        single = FactorQuotient(r, n, m, group=group, metric=metric, check=check)
        self.r, self.n, self.m = single.r, single.n, single.m
        self.group, self.metric, self.check = single.group, single.metric, check

    def quotient(self, batch_shape: Sequence[int] = ()) -> FactorQuotient:
        """The :class:`quotientopt.manifolds.FactorQuotient` for points of that batch."""
        return FactorQuotient(
            self.r,
            self.n,
            self.m,
            group=self.group,
            metric=self.metric,
            batch_shape=batch_shape,
            check=self.check,
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(r, n + m)``."""
        return self.r, self.n + self.m

    def pack_point(self, *tensors: Tensor) -> Tensor:
        """``[A, B]`` of the two factors.

        Raises
        ------
        ValueError
            If these are not two tensors, ``(*batch, r, n)`` and ``(*batch, r, m)``.
        """
        if len(tensors) != 2:
            raise ValueError(f"a point is packed from two tensors A and B, got {len(tensors)}")
        A, B = tensors
        shapes = (*A.shape[:-2], self.r, self.n), (*A.shape[:-2], self.r, self.m)
        if (tuple(A.shape), tuple(B.shape)) != shapes:
            raise ValueError(
                f"A and B must have shapes (*batch, {self.r}, {self.n}) and "
                f"(*batch, {self.r}, {self.m}), got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        return torch.cat((A, B), dim=-1)

    def unpack_tensor(self, tensor: Tensor) -> Pair:
        """The factors A and B, views of the tensor."""
        self._assert_check_shape(tensor.shape, "x")
        return self._unpack(tensor)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The second-order retraction: a geodesic up to third order, which has no closed form.

        With the metric "euclidean" it is the exponential map itself.
        """
        x, u = self._expand(x, u)
        quotient = self.quotient(x.shape[:-2])
        return self._pack(quotient.retract_second_order(self._unpack(x), self._unpack(u)))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal vector of least norm that leads from `x` to the orbit of `y`.

        Raises
        ------
        NotImplementedError
            Unless the metric is "euclidean": geodesics of the others have no closed form.
        """
        self._require_closed_geodesics("logarithmic map")
        x, y = self._expand(x, y)
        return self._pack(self.quotient(x.shape[:-2]).log(self._unpack(x), self._unpack(y)))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The geodesic distance, of shape ``(*batch)`` or ``(*batch, 1, 1)``.

        Raises
        ------
        NotImplementedError
            Unless the metric is "euclidean": geodesics of the others have no closed form.
        """
        self._require_closed_geodesics("geodesic distance")
        x, y = self._expand(x, y)
        value = self.quotient(x.shape[:-2]).distance(self._unpack(x), self._unpack(y))
        return value[..., None, None] if keepdim else value

    def _require_closed_geodesics(self, name: str) -> None:
        if self.metric != "euclidean":
            raise NotImplementedError(
                f"FactorManifold has no {name} in closed form for the metric {self.metric!r}; "
                "quotient(batch_shape).distance is a distance of the invariants"
            )

    def _unpack(self, tensor: Tensor) -> Pair:
        return tensor[..., : self.n], tensor[..., self.n :]

    def _pack(self, point: Pair) -> Tensor:
        return torch.cat(point, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.r}, {self.n}, {self.m}, group={self.group!r}, metric={self.metric!r}"


class GramManifold(QuotientAdapter[Tensor]):
    """Matrices X of full rank modulo ``X gᵀ``, with the Bures–Wasserstein metric.

    A point has shape ``(*batch, N, d)``; see :class:`quotientopt.manifolds.GramQuotient` for the
    geometry. Exponential map, logarithm and distance are exact.

    Parameters
    ----------
    N, d : int
        Rows and columns of a point, of rank min(N, d).
    stabilizer : StructureGroup, optional
        As of :class:`quotientopt.manifolds.GramQuotient`.
    check : bool
        Whether to look for non-finite entries and rank deficiency at every call, which waits for
        the device.

    Raises
    ------
    ValueError
        On sizes that do not fit, or a stabilizer that is not available.
    """

    name = "Gram"

    def __init__(
        self,
        N: int,
        d: int,
        *,
        stabilizer: StructureGroup | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        single = GramQuotient(N, d, stabilizer=stabilizer, check=check)
        self.N, self.d = single.N, single.d
        self.stabilizer, self.check = stabilizer, check

    def quotient(self, batch_shape: Sequence[int] = ()) -> GramQuotient:
        """The :class:`quotientopt.manifolds.GramQuotient` for points of that batch."""
        return GramQuotient(
            self.N, self.d, stabilizer=self.stabilizer, batch_shape=batch_shape, check=self.check
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(N, d)``."""
        return self.N, self.d

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map ``x + u`` of a horizontal vector."""
        x, u = self._expand(x, u)
        return self.quotient(x.shape[:-2]).exp(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal vector of least norm that leads from `x` to the orbit of `y`.

        ``expmap(x, logmap(x, y))`` is the representative of y's orbit that is closest to `x`, in
        general not `y` itself.
        """
        x, y = self._expand(x, y)
        return self.quotient(x.shape[:-2]).log(x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The Bures–Wasserstein distance of the orbits, of shape ``(*batch)`` or (*batch, 1, 1)."""
        x, y = self._expand(x, y)
        value = self.quotient(x.shape[:-2]).distance(x, y)
        return value[..., None, None] if keepdim else value

    def _unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    def _pack(self, point: Tensor) -> Tensor:
        return point

    def extra_repr(self) -> str:
        stabilizer = "" if self.stabilizer is None else f", stabilizer={self.stabilizer!r}"
        return f"{self.N}, {self.d}{stabilizer}"


def zero_momentum_(optimizer: geoopt.optim.RiemannianSGD) -> None:
    """Let the momentum of a new RiemannianSGD start at zero.

    By itself geoopt 0.5 starts the momentum of a parameter with its first *Euclidean* gradient,
    which is no tangent vector: the steps then depend on the representative. From zero the first
    step is that of plain gradient descent (times ``1 - dampening``), and all steps are equivariant.

    Parameters
    ----------
    optimizer : geoopt.optim.RiemannianSGD
        Before its first step.

    Raises
    ------
    TypeError
        If it is another optimizer.
    ValueError
        If it has taken a step already; nothing is changed then.
    """
    if not isinstance(optimizer, geoopt.optim.RiemannianSGD):
        raise TypeError(f"optimizer must be a geoopt RiemannianSGD, got {type(optimizer).__name__}")
    if any("momentum_buffer" in state for state in optimizer.state.values()):
        raise ValueError("the optimizer has momentum already: call zero_momentum_ before step()")
    for group in optimizer.param_groups:
        if group["momentum"] > 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
