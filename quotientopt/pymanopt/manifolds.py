"""The manifolds for pymanopt's solvers.

In reading order: points and tangent vectors of two arrays, with the arithmetic that the solvers use
(:class:`FactorPair`); factor pairs modulo a structure group (:class:`FactorManifold`); and token
matrices modulo rotations of their columns (:class:`GramManifold`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt.groups import RotaryCommutant, StructureGroup
from quotientopt.manifolds import FactorQuotient, GramQuotient
from quotientopt.manifolds.factor_geometry import FactorGeometry
from quotientopt.pymanopt.base import Dtype, QuotientAdapter, same_values


class _Fields(NamedTuple):
    A: Any
    B: Any


class FactorPair(_Fields):
    """A pair ``(A, B)`` of NumPy arrays or torch tensors that adds and scales like one vector.

    A tuple: it unpacks, and the manifolds of :mod:`quotientopt.manifolds` take it where its members
    are tensors. Scalars are used as Python numbers, so that a NumPy scalar does not widen the
    dtype.
    """

    __slots__ = ()

    # Without these a NumPy scalar on the left would treat the pair as a sequence to broadcast over.
    __array_priority__ = 1000
    __array_ufunc__ = None

    def __add__(self, other: Any) -> "FactorPair":
        A, B = other
        return FactorPair(self.A + A, self.B + B)

    def __sub__(self, other: Any) -> "FactorPair":
        A, B = other
        return FactorPair(self.A - A, self.B - B)

    def __mul__(self, scalar: Any) -> "FactorPair":
        scalar = float(scalar)
        return FactorPair(scalar * self.A, scalar * self.B)

    def __rmul__(self, scalar: Any) -> "FactorPair":
        return self * scalar

    def __truediv__(self, scalar: Any) -> "FactorPair":
        scalar = float(scalar)
        return FactorPair(self.A / scalar, self.B / scalar)

    def __neg__(self) -> "FactorPair":
        return FactorPair(-self.A, -self.B)


class FactorManifold(QuotientAdapter[Pair]):
    """:class:`quotientopt.manifolds.FactorQuotient` for pymanopt's solvers.

    Rank-r matrices ``Aᵀ B`` as pairs (A, B) modulo ``(A, B) ~ (g^{-T} A, g B)``. Points and tangent
    vectors are :class:`FactorPair`; where a point is expected any pair of arrays does. Solvers of
    pymanopt then take the same path, cost for cost, from every representative of the starting
    point.

    Parameters
    ----------
    r, n, m : int
        Rows of both factors, columns of A and columns of B; r at most n and m.
    batch_shape : sequence of int
        Leading dimensions: a product of as many manifolds, in one point.
    group : StructureGroup, optional
        ``GL(r)`` unless given.
    metric : {"preconditioned", "right-invariant", "euclidean"}
        As in :class:`~quotientopt.manifolds.FactorQuotient`.
    retraction : {"additive", "second-order"}
        ``x + u``, whose second-order expansions hold at critical points only, or the retraction
        along which they hold at every point.
    backend : {"numpy", "torch"}
        Points of NumPy arrays, or of torch tensors on any device.
    device : torch.device or str, optional
        Of random points: torch's default device, or the CPU with NumPy.
    dtype : torch.dtype or numpy dtype, optional
        Of random points: double precision, unless the device has none.

    Raises
    ------
    ValueError
        On sizes, a group, a metric, a retraction, a backend or a device that is not available.
    TypeError
        On a dtype that is no real floating-point one.
    """

    quotient: FactorQuotient

    def __init__(
        self,
        r: int,
        n: int,
        m: int,
        *,
        batch_shape: Sequence[int] = (),
        group: StructureGroup | None = None,
        metric: str = "preconditioned",
        retraction: str = "additive",
        backend: str = "numpy",
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ) -> None:
        options: dict[str, Any] = {"group": group, "metric": metric, "batch_shape": batch_shape}
        quotient = FactorQuotient(r, n, m, **options)
        super().__init__(
            f"Quotient of factor pairs {r}x{n}, {r}x{m} by {quotient.group!r}, {metric} metric"
            + (f", batch {quotient.batch_shape}" if quotient.batch_shape else ""),
            quotient,
            _WorkingQuotient(quotient),
            point_layout=2,
            retraction=retraction,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def to_torch(self, name: str, point: Any) -> Pair:
        if not isinstance(point, (tuple, list)) or len(point) != 2:
            raise TypeError(f"{name} must be a pair (A, B) of arrays, got {type(point).__name__}")
        return self.arrays.to_torch(point[0]), self.arrays.to_torch(point[1])

    def from_torch(self, point: Pair) -> FactorPair:
        return FactorPair(self.arrays.from_torch(point[0]), self.arrays.from_torch(point[1]))

    @property
    def typical_dist(self) -> float:
        """Root mean square length of a standard normal point in its own metric.

        ``√(2nmr)`` preconditioned, ``√(2r)`` right-invariant, ``√(r(n + m))`` Euclidean, times the
        square root of the number of batch items; a rotary commutant adds its rotated rows to the r
        of the first and takes half of them from the r of the second. Trust regions start from an
        eighth of it: pass ``Delta_bar`` and ``Delta0`` to the solver where the scale of the
        solution is another.
        """
        r, n, m = self.quotient.r, self.quotient.n, self.quotient.m
        group = self.quotient.group
        rotated = group.rotary_dim if isinstance(group, RotaryCommutant) else 0
        squares = {
            "preconditioned": 2 * n * m * (r + rotated),
            "right-invariant": 2 * r - rotated,
            "euclidean": r * (n + m),
        }
        return math.sqrt(self._batch_size * squares[self.quotient.metric])

    def exp(self, point: Any, tangent_vector: Any) -> FactorPair:
        """``x + u`` for the Euclidean metric; the other metrics have no closed form.

        Raises
        ------
        NotImplementedError
            For the other metrics, on which pymanopt's checks turn to :meth:`retraction`.
        """
        if self.quotient.metric != "euclidean":
            raise NotImplementedError(
                f"exp has no closed form for the metric {self.quotient.metric!r}: use retraction"
            )
        x, u = self.to_torch("point", point), self.to_torch("tangent_vector", tangent_vector)
        return self.from_torch(self._working.retract(x, u))

    def log(self, point_a: Any, point_b: Any) -> FactorPair:
        """``y − x`` with y the representative of `point_b` that is aligned with `point_a`.

        The additive retraction of it is exactly y, and it is equivariant. It is the inverse of
        :meth:`exp` for the Euclidean metric; for the others it need not be horizontal, which the
        solvers without derivatives, the only ones to use it, do not ask for.
        """
        x, y = self.to_torch("point_a", point_a), self.to_torch("point_b", point_b)
        (A, B), _ = self.quotient.align_balanced(y, x)
        return self.from_torch((A - x[0], B - x[1]))

    def zero_vector(self, point: Any) -> FactorPair:
        A, B = self.to_torch("point", point)
        return self.from_torch((torch.zeros_like(A), torch.zeros_like(B)))


class _WorkingQuotient(FactorQuotient):
    """A factor quotient that looks at vectors never, and at a point when it is first seen."""

    def __init__(self, quotient: FactorQuotient) -> None:
        super().__init__(
            quotient.r,
            quotient.n,
            quotient.m,
            group=quotient.group,
            metric=quotient.metric,
            batch_shape=quotient.batch_shape,
            check=False,
        )
        self._geometry = _SharedFactorizations(quotient.group, quotient.metric, check=False)


class _SharedFactorizations(FactorGeometry):
    """The geometry with the factorisations of the latest two pairs, known by their values.

    A solver asks for many inner products, projections and Hessian-vector products at one point,
    each of which needs the same factorisations, the dearest part of all. The Hessian needs those of
    another representative as well.
    """

    def __init__(self, group: StructureGroup, metric: str, *, check: bool) -> None:
        super().__init__(group, metric, check=check)
        self._latest: list[tuple[Pair, Any]] = []

    def point(self, x: Pair, *, check: bool | None = None) -> Any:
        for pair, known in self._latest:
            if same_values(x[0], pair[0]) and same_values(x[1], pair[1]):
                return known
        copy = x[0].clone(), x[1].clone()  # the caller may go on to write to the arrays of x
        point = super().point(copy, check=True if check is None else check)
        self._latest = [(copy, point), *self._latest[:1]]
        return point


class GramManifold(QuotientAdapter[Tensor]):
    """:class:`quotientopt.manifolds.GramQuotient` for pymanopt's solvers.

    Positive semidefinite N×N matrices ``X Xᵀ`` of rank min(N, d) as matrices X modulo
    ``X ~ X gᵀ``. Points and tangent vectors are single arrays. pymanopt's ``PSDFixedRank`` is the
    case N ≥ d without batch, without stabilizer and on the CPU.

    Parameters
    ----------
    N, d : int
        Rows and columns of a point, of rank min(N, d).
    stabilizer : StructureGroup, optional
        As in :class:`~quotientopt.manifolds.GramQuotient`; None divides by all of O(d).
    batch_shape : sequence of int
        Leading dimensions: a product of as many manifolds, in one point.
    backend : {"numpy", "torch"}
        Points are NumPy arrays, or torch tensors on any device.
    device : torch.device or str, optional
        Of random points: torch's default device, or the CPU with NumPy.
    dtype : torch.dtype or numpy dtype, optional
        Of random points: double precision, unless the device has none.

    Raises
    ------
    ValueError
        On sizes, a stabilizer, a backend or a device that is not available.
    TypeError
        On a dtype that is no real floating-point one.
    """

    quotient: GramQuotient

    def __init__(
        self,
        N: int,
        d: int,
        *,
        stabilizer: StructureGroup | None = None,
        batch_shape: Sequence[int] = (),
        backend: str = "numpy",
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ) -> None:
        options: dict[str, Any] = {"stabilizer": stabilizer, "batch_shape": batch_shape}
        quotient = GramQuotient(N, d, **options)
        super().__init__(
            f"Quotient of {N}x{d} matrices by {quotient.group!r}"
            + (f", batch {quotient.batch_shape}" if quotient.batch_shape else ""),
            quotient,
            GramQuotient(N, d, check=False, **options),
            point_layout=1,
            retraction="additive",  # the exponential map itself
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def to_torch(self, name: str, point: Any) -> Tensor:
        return self.arrays.to_torch(point)

    def from_torch(self, point: Tensor) -> Any:
        return self.arrays.from_torch(point)

    def euclidean_to_riemannian_gradient(self, point: Any, euclidean_gradient: Any) -> Any:
        """The Euclidean gradient itself, at a point of full rank."""
        self.quotient.check_point(self.to_torch("point", point))
        return super().euclidean_to_riemannian_gradient(point, euclidean_gradient)

    @property
    def typical_dist(self) -> float:
        """Root mean square length of a standard normal point, ``√(Nd)`` for each batch item."""
        return math.sqrt(self._batch_size * self.quotient.N * self.quotient.d)

    def exp(self, point: Any, tangent_vector: Any) -> Any:
        """The exponential map, ``X + U``."""
        return self.retraction(point, tangent_vector)

    def log(self, point_a: Any, point_b: Any) -> Any:
        """The inverse of :meth:`exp` up to the choice of a representative, ``Y Q − X``."""
        x, y = self.to_torch("point_a", point_a), self.to_torch("point_b", point_b)
        return self.from_torch(self.quotient.log(x, y))

    def zero_vector(self, point: Any) -> Any:
        return self.from_torch(torch.zeros_like(self.to_torch("point", point)))
