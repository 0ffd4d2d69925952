"""Orbits under GL(r): the product AᴴB of the factors names them, for real or complex factors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import Pair
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups import GL
from quotientopt.manifolds.orbits.base import product_distance
from quotientopt.sections.factor import dress


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
