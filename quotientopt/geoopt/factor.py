"""Factor pairs as points of geoopt: one tensor with A and B side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt.geoopt.base import QuotientAdapter
from quotientopt.groups import StructureGroup
from quotientopt.manifolds import FactorQuotient


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
