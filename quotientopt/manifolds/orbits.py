"""Orbits of factor pairs: invariants, distance, alignment and sections for each structure group.

In reading order: what the manifold of factor pairs needs to know about the orbits of its group
(:class:`Orbits`); products of factors, real or complex, and distances between them; and the orbits
themselves, named

- under GL(r) by the product ``AᵀB`` (:class:`ProductOrbits`),
- under a rotary commutant by a complex rank-one matrix per plane and ``AᵀB`` of the passing rows
  (:class:`PlaneOrbits`),
- under O(r) by the Gram matrix ``[A B]ᵀ[A B]`` of all columns (:class:`JointGramOrbits`).

:func:`orbits_of` chooses among them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair, frobenius_inner, gram, orthogonal_polar_factor, safe_root
from quotientopt.groups import GL, O, RotaryCommutant, StructureGroup
from quotientopt.sections.factor import dress


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


def solve_rows(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """``(X Xᴴ)^{-1} X Y``, and orthonormal rows that span those of X."""
    Q, R = torch.linalg.qr(X.mH)
    return torch.linalg.solve_triangular(R, Q.mH @ Y, upper=True), Q.mH


def lift_product(x: Pair, base: Tensor) -> Pair:
    """A solution of ``u_Aᴴ B + Aᴴ u_B = Ġ``, for Ġ tangent to the matrices of rank r.

    ``((B Bᴴ)^{-1} B Ġᴴ, (A Aᴴ)^{-1} A Ġ (I − Bᴴ (B Bᴴ)^{-1} B))``, from LQ decompositions.
    """
    lift_A, rows = solve_rows(x[1], base.mH)
    image, _ = solve_rows(x[0], base)
    return lift_A, image - (image @ rows.mH) @ rows


def squared_distance(x: Pair, y: Pair) -> Tensor:
    """``‖A₁ᴴ B₁ − A₂ᴴ B₂‖²_F``, without n×m matrices and without cancellation.

    The difference is ``[A₁; A₂]ᴴ [B₁; −B₂]``; with the triangular factors of QR decompositions
    of both conjugate transposed stacks its norm is ``‖R_A R_Bᴴ‖_F``.
    """
    left, right = torch.cat((x[0], y[0]), dim=-2), torch.cat((x[1], -y[1]), dim=-2)
    _, R_A = torch.linalg.qr(left.detach().mH, mode="r")
    _, R_B = torch.linalg.qr(right.detach().mH, mode="r")
    return torch.linalg.matrix_norm(R_A @ R_B.mH).square()


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


def aligning_element(
    element_of: Callable[..., Pair],
    compact_factor: Callable[[Tensor], Tensor],
    x: Pair,
    y: Pair,
    *,
    check: bool,
) -> Pair:
    """``g_y^{-1} k g_x`` and its inverse transpose, k from the Procrustes problem of dressed pairs.

    Parameters
    ----------
    element_of : callable
        Element ``(g, g^{-T})`` that dresses a pair, from its Gram matrices, up to a compact group.
    compact_factor : callable
        The element of the compact group nearest to a matrix.
    x, y, check
        As for :meth:`Orbits.aligning_element`.
    """
    dressed_x, g_x, contra_x = dress(element_of, *x, check=check)
    dressed_y, g_y, contra_y = dress(element_of, *y, check=check)
    k = compact_factor(sum_of_products(dressed_y, dressed_x))
    return contra_y.mT @ k @ g_x, g_y.mT @ k @ contra_x


def sum_of_products(x: Pair, y: Pair) -> Tensor:
    """``A₁ A₂ᵀ + B₁ B₂ᵀ``."""
    return x[0] @ y[0].mT + x[1] @ y[1].mT


class ProductOrbits:
    """Orbits of pairs of full row rank under GL(r)."""

    sections = ("svd", "balanced", "orthonormal", "triangular")

    def __init__(self, group: GL) -> None:
        self.group = group

    def check_columns(self, n: int, m: int, metric: str) -> None:
        """Both factors need full row rank."""
        if self.group.r > n or self.group.r > m:
            raise ValueError(
                f"full row rank needs r <= n and r <= m, got r = {self.group.r}, {n = }, {m = }"
            )

    def invariant_shape(self, n: int, m: int) -> tuple[int, ...]:
        """(n, m)."""
        return n, m

    def invariants(self, x: Pair) -> Tensor:
        """``Aᵀ B``."""
        return x[0].mT @ x[1]

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """``u_Aᵀ B + Aᵀ u_B``."""
        return u[0].mT @ x[1] + x[0].mT @ u[1]

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """See :func:`lift_product`."""
        return lift_product(x, base)

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """``‖A₁ᵀ B₁ − A₂ᵀ B₂‖_F``."""
        return product_distance(self.group, x, y, squared_distance(x, y))

    def aligning_element(self, x: Pair, y: Pair, *, check: bool) -> Pair:
        """``g_y^{-1} O g_x``: balanced representatives differ by the O of a Procrustes problem."""
        compact = orthogonal_polar_factor
        return aligning_element(sections.balanced_element, compact, x, y, check=check)

    def section(self, kind: str, x: Pair, *, check: bool, **options: Any) -> Any:
        """See :func:`quotientopt.sections.section`."""
        return sections.section(kind, *x, check=check, **options)


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
        """:func:`~quotientopt.manifolds.orbits.lift_product` of every product."""
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


class JointGramOrbits:
    """Orbits of pairs under O(r), which turns both factors alike."""

    sections = ("svd", "polar")

    def __init__(self, group: O) -> None:
        self.group = group

    def check_columns(self, n: int, m: int, metric: str) -> None:
        """[A B] needs full row rank; both factors, unless the metric is Euclidean."""
        r = self.group.r
        if metric == "euclidean" and r > n + m:
            raise ValueError(f"full row rank of [A B] needs r <= n + m, got {r = }, {n = }, {m = }")
        if metric != "euclidean" and (r > n or r > m):
            raise ValueError(f"full row rank needs r <= n and r <= m, got {r = }, {n = }, {m = }")

    def invariant_shape(self, n: int, m: int) -> tuple[int, ...]:
        """(n + m, n + m)."""
        return n + m, n + m

    def invariants(self, x: Pair) -> Tensor:
        """``[A B]ᵀ [A B]``: AᵀB, AᵀA and BᵀB."""
        return gram(stack_columns(x).mT)

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """``[u_A u_B]ᵀ [A B] + [A B]ᵀ [u_A u_B]``."""
        product = stack_columns(u).mT @ stack_columns(x)
        return product + product.mT

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """With ``X = [A B]`` and ``Y = (X Xᵀ)^{-1} X``: ``Y Ḣ (I − ½ Yᵀ X)``."""
        X = stack_columns(x)
        image, rows = solve_rows(X, base)
        lifted = image - (image @ rows.mT) @ rows / 2
        columns = x[0].shape[-1]
        return lifted[..., :columns], lifted[..., columns:]

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """``min_Q (‖Q A₁ − A₂‖² + ‖Q B₁ − B₂‖²)^{1/2}``: Bures–Wasserstein between the Grams."""
        Q, _ = self.aligning_element(x, y, check=False)
        X, Y = stack_columns(x), stack_columns(y)
        size = torch.linalg.matrix_norm(X.detach()) + torch.linalg.matrix_norm(Y.detach())
        return safe_root((Q @ X - Y).square().sum(dim=(-2, -1)), rounding(self.group.r, size))

    def aligning_element(self, x: Pair, y: Pair, *, check: bool) -> Pair:
        """Orthogonal Procrustes: the polar factor of ``A₂ A₁ᵀ + B₂ B₁ᵀ``."""
        Q = orthogonal_polar_factor(sum_of_products(y, x))
        return Q, Q

    def section(self, kind: str, x: Pair, *, check: bool, **options: Any) -> Any:
        """See :func:`quotientopt.sections.orthogonal_section`."""
        return sections.orthogonal_section(kind, *x, check=check, **options)


def orbits_of(group: StructureGroup) -> Orbits:
    """The orbits of a group that :func:`~quotientopt.manifolds.vertical.vertical_component` knows.

    Raises
    ------
    TypeError
        For another group.
    """
    if isinstance(group, GL):
        return ProductOrbits(group)
    if isinstance(group, RotaryCommutant):
        return PlaneOrbits(group)
    if type(group) is O:
        return JointGramOrbits(group)
    raise TypeError(f"orbits of factor pairs under {group!r} are not known")
