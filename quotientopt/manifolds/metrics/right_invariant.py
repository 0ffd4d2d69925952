"""The right-invariant metric: each factor is measured relative to itself."""

import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt.groups import StructureGroup
from quotientopt.manifolds.metrics.base import Factor, FactorPoint, factorize


class RightInvariant:
    """``⟨ξ, η⟩ = tr(S_A^{-1} ξ_A η_Aᵀ) + tr(S_B^{-1} ξ_B η_Bᵀ)``.

    The geometry of two-factor quotients (Mishra et al. 2014); a step is relative to the scale of
    the factors. Invariant as the preconditioned metric is.
    """

    name = "right-invariant"

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> FactorPoint:
        """See :func:`~quotientopt.manifolds.metrics.base.factorize`."""
        return factorize(pair, group, check=check, stored=stored)

    def isometry(self, x: FactorPoint, xi: Pair) -> Pair:
        """``(L_A^{-1} ξ_A, L_B^{-1} ξ_B)``."""
        return x.A.solve_root(xi[0]), x.B.solve_root(xi[1])

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """``(S_A ∂_A, S_B ∂_B)``."""
        return (
            x.A.root @ (x.A.root.mT @ euclidean[0]),
            x.B.root @ (x.B.root.mT @ euclidean[1]),
        )

    def gradient_derivative(
        self, x: FactorPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """``Ṡ_A[ξ] ∂_A + S_A ∂̇_A``, and with B."""
        linear = self.gradient(x, euclidean_hessian)
        return (
            x.gram_derivative(x.A, xi[0]) @ euclidean_gradient[0] + linear[0],
            x.gram_derivative(x.B, xi[1]) @ euclidean_gradient[1] + linear[1],
        )

    def christoffel(self, x: FactorPoint, xi: Pair, eta: Pair) -> Pair:
        """Koszul's formula; the factors do not interact.

        ``Γ_A = ½ [ρ(ξ_A η_Aᵀ + η_A ξ_Aᵀ) S_A^{-1} A − Ṡ_A[ξ] S_A^{-1} η_A − Ṡ_A[η] S_A^{-1} ξ_A]``,
        and with B.
        """

        def of_factor(X: Factor, xi_X: Tensor, eta_X: Tensor) -> Tensor:
            return (
                x.symmetric_product(xi_X, eta_X) @ X.solve(X.rows)
                - x.gram_derivative(X, xi_X) @ X.solve(eta_X)
                - x.gram_derivative(X, eta_X) @ X.solve(xi_X)
            ) / 2

        return of_factor(x.A, xi[0], eta[0]), of_factor(x.B, xi[1], eta[1])
