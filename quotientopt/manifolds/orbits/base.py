"""What the manifold of factor pairs needs to know about the orbits of its group."""

from typing import Any, Protocol

import torch
from torch import Tensor

from quotientopt._linalg import Pair, frobenius_inner, safe_root
from quotientopt.groups import StructureGroup


class Orbits(Protocol):
    """Invariants, distances, alignment and sections of the orbits of one group.

    Tensors arrive in the widest precision.
    """

    @property
    def group(self) -> StructureGroup:
        """The group."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Kinds that :meth:`section` knows."""

    def check_columns(self, n: int, m: int, metric: str) -> None:
        """Raise ``ValueError`` if no pair with so many columns has the rank it needs."""

    def invariant_shape(self, n: int, m: int) -> tuple[int, ...]:
        """Shape of the invariants of one batch item."""

    def invariants(self, x: Pair) -> Tensor:
        """A complete set of invariants: equal exactly for points of one orbit."""

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """Derivative of :meth:`invariants` along u."""

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """Some u with ``differential(x, u) = base``, not necessarily horizontal."""

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """A distance between orbits, differentiable away from zero."""

    def aligning_element(self, x: Pair, y: Pair, *, check: bool) -> Pair:
        """The g that moves x to where it is closest to y, and ``g^{-T}``."""

    def section(self, kind: str, x: Pair, *, check: bool, **options: Any) -> Any:
        """Canonical representative and the element that leads to it; options as of the sections."""


def product_distance(group: StructureGroup, x: Pair, y: Pair, squared_value: Tensor) -> Tensor:
    """Distance between products of factors, with derivatives from the polarisation formula.

    The value is the root of `squared_value`, computed without cancellation. Its square is also
    ``⟨ρ(A₁A₁ᵀ), B₁B₁ᵀ⟩ + ⟨ρ(A₂A₂ᵀ), B₂B₂ᵀ⟩ − 2⟨ρ(A₂A₁ᵀ), B₂B₁ᵀ⟩``, a polynomial that loses half of
    the digits where the points are close but whose derivatives of any order are right.
    """

    def overlap(p: Pair, q: Pair) -> Tensor:
        return frobenius_inner(group.row_products(p[0] @ q[0].mT), p[1] @ q[1].mT)

    own_x, own_y = overlap(x, x), overlap(y, y)
    polynomial = own_x + own_y - 2 * overlap(x, y)
    squared = polynomial - polynomial.detach() + squared_value.detach()
    size = own_x.detach().clamp_min(0).sqrt() + own_y.detach().clamp_min(0).sqrt()
    return safe_root(squared, rounding(group.r, size))


def rounding(r: int, size: Tensor) -> Tensor:
    """What counts as zero among distances between invariants of the norm `size`."""
    return 8 * r * torch.finfo(size.dtype).eps * size


def stack_columns(x: Pair) -> Tensor:
    """``[A B]``."""
    return torch.cat(tuple(x), dim=-1)
