"""The geometry of factor pairs under one group and metric, for any batch shape."""

from typing import Any

from torch import Tensor

from quotientopt._linalg import Pair, frobenius_inner, wide, wide_dtype
from quotientopt.groups import StructureGroup
from quotientopt.manifolds.metrics import METRICS
from quotientopt.manifolds.orbits import orbits_of
from quotientopt.manifolds.representative import well_conditioned
from quotientopt.manifolds.vertical import vertical_component


class FactorGeometry:
    """What :class:`~quotientopt.manifolds.FactorQuotient` computes, without checks of shapes.

    Pairs come as they are stored and go back in the widest precision.

    Parameters
    ----------
    group : StructureGroup
    metric : str
    check : bool
        Whether to refuse rank-deficient points.

    Raises
    ------
    ValueError
        If the group is not known or the metric not invariant under it.
    """

    def __init__(self, group: StructureGroup, metric: str, *, check: bool) -> None:
        self.group = group
        self.vertical_component = vertical_component(group, metric)
        self.metric = METRICS[metric]
        self.orbits = orbits_of(group)
        self.check = check

    def point(self, x: Pair, *, check: bool | None = None) -> Any:
        """Factorisations of a point; what is not finite shows there too."""
        stored = x[0].dtype if x[0].dtype == x[1].dtype else wide_dtype(x[0].device)
        check = self.check if check is None else check
        return self.metric.point(_wide(x), self.group, check=check, stored=stored)

    def inner(self, x: Pair, u: Pair, v: Pair) -> Tensor:
        """``⟨u, v⟩_x``."""
        return self._inner(self.point(x), _wide(u), _wide(v))

    def norms(self, x: Pair, u: Pair) -> tuple[Tensor, Tensor]:
        """Norms of u and of its vertical component."""
        point, vector = self.point(x), _wide(u)
        vertical = self.vertical_component(point, vector).dense()
        size, vertical_size = (self._inner(point, w, w).sqrt() for w in (vector, vertical))
        return size, vertical_size

    def vertical(self, x: Pair, u: Pair) -> Pair:
        """The vertical component of u."""
        return self.vertical_component(self.point(x), _wide(u)).dense()

    def horizontal(self, x: Pair, u: Pair) -> Pair:
        """The horizontal component of u."""
        return self._horizontal(self.point(x), _wide(u))

    def unit_horizontal(self, x: Pair, u: Pair) -> Pair:
        """The horizontal component of u, scaled to norm 1."""
        point = self.point(x)
        horizontal = self._horizontal(point, _wide(u))
        norm = self._inner(point, horizontal, horizontal).sqrt()[..., None, None]
        return horizontal[0] / norm, horizontal[1] / norm

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """The horizontal u with the derivative `base` of the invariants."""
        return self._horizontal(self.point(x), self.orbits.lift(_wide(x), wide(base)))

    def gradient(self, x: Pair, partials: Pair) -> Pair:
        """The Riemannian gradient."""
        return self.metric.gradient(self.point(x), _wide(partials))

    def hessian(self, x: Pair, partials: Pair, second: Pair, u: Pair) -> Pair:
        """Horizontal part of ``D grad[u] + Γ(grad, u)``, at a well-conditioned representative."""
        point, partials, second, u = self.point(x), _wide(partials), _wide(second), _wide(u)
        there = well_conditioned(point)
        if there is None:
            return self._hessian(point, partials, second, u)
        hessian = self._hessian(
            self.point(there.pair, check=False),
            there.cotangent(partials),
            there.cotangent(second),
            there.tangent(u),
        )
        return there.back(hessian)

    def second_order_step(self, x: Pair, u: Pair) -> Pair:
        """``x + u − ½ Γ(u, u)``."""
        point, (A, B), u = self.point(x), _wide(x), _wide(u)
        there = well_conditioned(point)
        if there is None:
            Gamma = self.metric.christoffel(point, u, u)
        else:
            moved = there.tangent(u)
            representative = self.point(there.pair, check=False)
            Gamma = there.back(self.metric.christoffel(representative, moved, moved))
        return A + u[0] - Gamma[0] / 2, B + u[1] - Gamma[1] / 2

    def _inner(self, point: Any, u: Pair, v: Pair) -> Tensor:
        image = self.metric.isometry(point, u)
        other = image if v is u else self.metric.isometry(point, v)
        return frobenius_inner(image[0], other[0]) + frobenius_inner(image[1], other[1])

    def _horizontal(self, point: Any, u: Pair) -> Pair:
        return self.vertical_component(point, u).subtracted_from(u)

    def _hessian(self, point: Any, partials: Pair, second: Pair, u: Pair) -> Pair:
        derivative = self.metric.gradient_derivative(point, partials, second, u)
        Gamma = self.metric.christoffel(point, self.metric.gradient(point, partials), u)
        return self._horizontal(point, (derivative[0] + Gamma[0], derivative[1] + Gamma[1]))


def _wide(pair: Pair) -> Pair:
    return wide(pair[0]), wide(pair[1])
