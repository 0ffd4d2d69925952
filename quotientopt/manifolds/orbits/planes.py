"""Orbits under a rotary commutant: a complex rank-one matrix per plane, AᵀB of the passing rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair
from quotientopt.groups import RotaryCommutant
from quotientopt.manifolds.orbits.base import product_distance
from quotientopt.manifolds.orbits.products import (
    aligning_element,
    lift_product,
    squared_distance,
)


class PlaneOrbits:
    """Orbits of pairs whose planes do not vanish and whose passing rows have full rank.

    The complex rows a, b of a plane enter the attention scores through ``aᴴ b`` alone: its real
    part is the plane's share of ``Aᵀ B``, its imaginary part what the rotation by a relative
    position mixes in.
    """

    sections = ("svd", "balanced", "orthonormal", "triangular")

    def __init__(self, group: RotaryCommutant) -> None:
        self.group = group

    def check_columns(self, n: int, m: int, metric: str) -> None:
        """The passing rows of both factors need full rank."""
        rows = len(self.group.pass_rows)
        if rows > n or rows > m:
            raise ValueError(
                f"full rank of the {rows} passing rows needs {rows} <= n and {rows} <= m, "
                f"got {n = }, {m = }"
            )

    def invariant_shape(self, n: int, m: int) -> tuple[int, ...]:
        """(rotary_dim + 1, n, m), without the 1 where no row passes."""
        return self.group.rotary_dim + bool(self.group.pass_rows), n, m

    def invariants(self, x: Pair) -> Tensor:
        """Real parts of ``aᴴ b`` of all planes, their imaginary parts, then the passing product."""
        (planes_A, planes_B), (passing_A, passing_B) = self._split(x)
        return self._join(planes_A.mH @ planes_B, passing_A.mT @ passing_B)

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """Derivative of the products."""
        (planes_A, planes_B), (passing_A, passing_B) = self._split(x)
        (du_A, du_B), (dp_A, dp_B) = self._split(u)
        return self._join(
            du_A.mH @ planes_B + planes_A.mH @ du_B, dp_A.mT @ passing_B + passing_A.mT @ dp_B
        )

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """:func:`~quotientopt.manifolds.orbits.products.lift_product` of every product."""
        planes, passing = self._split(x)
        count = len(self.group.planes)
        real, imaginary, rest = base.split((count, count, base.shape[-3] - 2 * count), dim=-3)
        plane_A, plane_B = lift_product(planes, torch.complex(real, imaginary))
        lift_A, lift_B = passing
        if self.group.pass_rows:
            lift_A, lift_B = lift_product(passing, rest.squeeze(-3))
        return (
            self.group.from_complex_rows(plane_A.squeeze(-2), lift_A),
            self.group.from_complex_rows(plane_B.squeeze(-2), lift_B),
        )

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """Root of the sum of squared distances between the products."""
        (planes_x, passing_x), (planes_y, passing_y) = self._split(x), self._split(y)
        squared = squared_distance(planes_x, planes_y).sum(dim=-1)
        if self.group.pass_rows:
            squared = squared + squared_distance(passing_x, passing_y)
        return product_distance(self.group, x, y, squared)

    def aligning_element(self, x: Pair, y: Pair, *, check: bool) -> Pair:
        """``g_y^{-1} k g_x`` with balancing elements, k a phase per plane and an orthogonal block.

        The phases and the block solve the Procrustes problem of the balanced representatives.
        """
        element_of = partial(sections.rotary_balanced_element, self.group)
        return aligning_element(element_of, self.group.unitary_factor, x, y, check=check)

    def section(self, kind: str, x: Pair, *, check: bool, **options: Any) -> Any:
        """See :func:`quotientopt.sections.rotary_section`."""
        return sections.rotary_section(kind, self.group, *x, check=check, **options)

    def _split(self, x: Pair) -> tuple[Pair, Pair]:
        """Complex rows of the planes, (*batch, planes, 1, n), and real passing rows."""
        planes = tuple(self.group.complex_rows(X).unsqueeze(-2) for X in x)
        passing = tuple(X[..., self.group.rotary_dim :, :] for X in x)
        return (planes[0], planes[1]), (passing[0], passing[1])

    def _join(self, planes: Tensor, passing: Tensor) -> Tensor:
        rest = (passing.unsqueeze(-3),) if self.group.pass_rows else ()
        return torch.cat((planes.real, planes.imag, *rest), dim=-3)
