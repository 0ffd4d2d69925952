"""Token matrices modulo rotations as points of geoopt."""

from collections.abc import Sequence

from torch import Tensor

from quotientopt.geoopt.base import QuotientAdapter
from quotientopt.groups import StructureGroup
from quotientopt.manifolds import GramQuotient


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
