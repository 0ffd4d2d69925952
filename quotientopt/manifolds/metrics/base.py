"""What a metric on factor pairs provides, and pairs of full-rank factors ready for use.

For a point (A, B) write ``S_A = ρ(A Aᵀ)`` and ``S_B = ρ(B Bᵀ)``, where ρ is the group's
:meth:`~quotientopt.groups.StructureGroup.row_products`: the identity for GL(r) and O(r), the Gram
matrix of complex rows for the planes of a rotary commutant. For a tangent vector ξ write
``Ṡ_A[ξ] = ρ(ξ_A Aᵀ + A ξ_Aᵀ)``, likewise ``Ṡ_B``.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quotientopt._linalg import Pair, cholesky, wide_dtype
from quotientopt.groups import RotaryCommutant, StructureGroup


class Factor(NamedTuple):
    """A factor X with the Cholesky factor L of ``S = ρ(X Xᵀ)``.

    Attributes
    ----------
    rows : Tensor, shape (*batch, r, n)
        X itself.
    root : Tensor, shape (*batch, r, r)
        L, lower triangular.
    orthonormal : Tensor or None
        ``L^{-1} X``, whose rows are orthonormal, where it is kept (see :func:`factorize`).
    """

    rows: Tensor
    root: Tensor
    orthonormal: Tensor | None

    @property
    def frame(self) -> Tensor:
        """The rows that :meth:`in_frame` refers to: ``L^{-1} X`` where it is kept, else X."""
        return self.rows if self.orthonormal is None else self.orthonormal

    def in_frame(self, N: Tensor) -> Tensor:
        """The r×r matrix that multiplies :attr:`frame` to give ``N L^{-1} X``."""
        if self.orthonormal is not None:
            return N
        return torch.linalg.solve_triangular(self.root, N, upper=False, left=False)

    def solve(self, Y: Tensor) -> Tensor:
        """``S^{-1} Y``, by an explicit inverse where precision is to spare: one product."""
        if self.orthonormal is None:
            return torch.cholesky_inverse(self.root) @ Y
        return torch.cholesky_solve(Y, self.root)

    def solve_root(self, Y: Tensor) -> Tensor:
        """``L^{-1} Y``."""
        return torch.linalg.solve_triangular(self.root, Y, upper=False)

    def solve_root_transposed(self, Y: Tensor) -> Tensor:
        """``L^{-T} Y``."""
        return torch.linalg.solve_triangular(self.root.mT, Y, upper=True)

    def coordinates(self, xi: Tensor) -> Tensor:
        """``ξ (L^{-1} X)ᵀ``, of shape (*batch, r, r)."""
        if self.orthonormal is not None:
            return xi @ self.orthonormal.mT
        return torch.linalg.solve_triangular(
            self.root.mT, xi @ self.rows.mT, upper=True, left=False
        )


class FactorPoint(NamedTuple):
    """A factor pair of full rank and the group that acts on it."""

    A: Factor
    B: Factor
    group: StructureGroup

    def gram_derivative(self, X: Factor, xi: Tensor) -> Tensor:
        """``Ṡ[ξ] = ρ(ξ Xᵀ + X ξᵀ)``."""
        return self.symmetric_product(xi, X.rows)

    def symmetric_product(self, xi: Tensor, eta: Tensor) -> Tensor:
        """``ρ(ξ ηᵀ + η ξᵀ)``."""
        product = xi @ eta.mT
        return self.group.row_products(product + product.mT)


def factorize(
    pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
) -> FactorPoint:
    """Cholesky factors of the Gram matrices of a pair.

    A Gram matrix squares the condition number of its factor. Where the pair is `stored` in a lower
    precision than it is computed in, nothing is lost by that. Where it is not, a second pass
    (Cholesky QR, twice) takes it back: the Gram matrix of the nearly orthonormal ``L^{-1} X`` is
    well conditioned.

    Raises
    ------
    ValueError
        If `check` and a factor is not finite or rank-deficient.
    """
    A, B = pair
    refine = stored == wide_dtype(A.device)
    precision = torch.finfo(stored).eps
    rows = "planes and passing rows of the " if isinstance(group, RotaryCommutant) else ""

    def factor(X: Tensor, name: str) -> Factor:
        S = group.row_products(X @ X.mT)
        L = cholesky(S, f"{rows}{name}", check=check, precision=precision)
        if not refine:
            return Factor(X, L, None)
        orthonormal = torch.linalg.solve_triangular(L, X, upper=False)
        correction, _ = torch.linalg.cholesky_ex(
            group.row_products(orthonormal @ orthonormal.mT), check_errors=False
        )
        orthonormal = torch.linalg.solve_triangular(correction, orthonormal, upper=False)
        return Factor(X, L @ correction, orthonormal)

    return FactorPoint(factor(A, "left factor A"), factor(B, "right factor B"), group)


class Metric(Protocol):
    """What a metric on factor pairs provides; ξ and η are pairs ``(ξ_A, ξ_B)``.

    Points are whatever :meth:`point` makes of a pair.
    """

    name: str

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> Any:
        """Factorisations of a pair; ``ValueError`` where the metric is not defined."""

    def isometry(self, x: Any, xi: Pair) -> Pair:
        """A linear image of ξ whose Frobenius norm is the norm of ξ."""

    def gradient(self, x: Any, euclidean: Pair) -> Pair:
        """The vector that represents a differential: ``⟨grad, ξ⟩_x = tr(∂_Aᵀ ξ_A + ∂_Bᵀ ξ_B)``."""

    def gradient_derivative(
        self, x: Any, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """Directional derivative of :meth:`gradient` along ξ, in coordinates."""

    def christoffel(self, x: Any, xi: Pair, eta: Pair) -> Pair:
        """The symmetric ``Γ(ξ, η)`` of the Levi-Civita connection ``∇_ξ η = Dη[ξ] + Γ(ξ, η)``."""
