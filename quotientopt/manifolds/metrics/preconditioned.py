"""The preconditioned metric: each factor is measured by its effect on the product."""

import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt.groups import StructureGroup
from quotientopt.manifolds.metrics.base import FactorPoint, factorize


class Preconditioned:
    """``⟨ξ, η⟩ = tr(S_B ξ_A η_Aᵀ) + tr(S_A ξ_B η_Bᵀ)``.

    Steepest descent is scaled gradient descent (Mishra et al. 2012; da Silva, Dangel & Oore,
    arXiv 2505.05409). Invariant under GL(r), and under a rotary commutant with its own S_A and S_B.
    """

    name = "preconditioned"

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> FactorPoint:
        """See :func:`~quotientopt.manifolds.metrics.base.factorize`."""
        return factorize(pair, group, check=check, stored=stored)

    def isometry(self, x: FactorPoint, xi: Pair) -> Pair:
        """``(L_Bᵀ ξ_A, L_Aᵀ ξ_B)``."""
        return x.B.root.mT @ xi[0], x.A.root.mT @ xi[1]

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """``(S_B^{-1} ∂_A, S_A^{-1} ∂_B)``."""
        return x.B.solve(euclidean[0]), x.A.solve(euclidean[1])

    def gradient_derivative(
        self, x: FactorPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """``S_B^{-1} (∂̇_A − Ṡ_B[ξ] grad_A)``, and with A and B exchanged."""
        grad_A, grad_B = self.gradient(x, euclidean_gradient)
        hessian_A, hessian_B = euclidean_hessian
        return (
            x.B.solve(hessian_A - x.gram_derivative(x.B, xi[1]) @ grad_A),
            x.A.solve(hessian_B - x.gram_derivative(x.A, xi[0]) @ grad_B),
        )

    def christoffel(self, x: FactorPoint, xi: Pair, eta: Pair) -> Pair:
        """Koszul's formula, with ``Ṡ`` the Gram derivatives of the other factor.

        ``Γ_A = ½ S_B^{-1} (Ṡ_B[ξ] η_A + Ṡ_B[η] ξ_A − ρ(ξ_B η_Bᵀ + η_B ξ_Bᵀ) A)``, and with A and B
        exchanged.
        """

        def form(own: Tensor, other: int) -> Tensor:
            factor, side = (x.A, x.B)[other], 1 - other
            return (
                x.gram_derivative(factor, xi[other]) @ eta[side]
                + x.gram_derivative(factor, eta[other]) @ xi[side]
                - x.symmetric_product(xi[other], eta[other]) @ own
            )

        return x.B.solve(form(x.A.rows, 1)) / 2, x.A.solve(form(x.B.rows, 0)) / 2
