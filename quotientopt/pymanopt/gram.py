"""Token matrices modulo rotations of their columns, for pymanopt."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.groups import StructureGroup
from quotientopt.manifolds import GramQuotient
from quotientopt.pymanopt.arrays import Dtype
from quotientopt.pymanopt.base import QuotientAdapter


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
