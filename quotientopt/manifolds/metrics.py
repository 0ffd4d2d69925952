"""GL(r)-invariant Riemannian metrics on factor pairs, as pure functions of a factorised point.

For a point (A, B) write ``S_A = A Aᵀ`` and ``S_B = B Bᵀ``, and for a tangent vector ξ
``Ṡ_A[ξ] = ξ_A Aᵀ + A ξ_Aᵀ``, likewise ``Ṡ_B``. Vertical vectors are ``(−Λᵀ A, Λ B)`` with any
r×r matrix Λ.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quotientopt._linalg import Pair, cholesky, frobenius_inner, gram


class FactorPoint(NamedTuple):
    """A factor pair with its Gram matrices ``S = L Lᵀ`` and their Cholesky factors."""

    A: Tensor
    B: Tensor
    SA: Tensor
    SB: Tensor
    LA: Tensor
    LB: Tensor

    def solve_A(self, Y: Tensor) -> Tensor:  # noqa: N802 -- A is the factor's name
        """``S_A^{-1} Y``."""
        return torch.cholesky_solve(Y, self.LA)

    def solve_B(self, Y: Tensor) -> Tensor:  # noqa: N802 -- B is the factor's name
        """``S_B^{-1} Y``."""
        return torch.cholesky_solve(Y, self.LB)


def factorize(pair: Pair, *, check: bool = True) -> FactorPoint:
    """Gram matrices and Cholesky factors of a pair; ``ValueError`` where it is rank-deficient."""
    A, B = pair
    SA, SB = gram(A), gram(B)
    LA = cholesky(SA, "left factor A", check=check)
    LB = cholesky(SB, "right factor B", check=check)
    return FactorPoint(A, B, SA, SB, LA, LB)


class Metric(Protocol):
    """What a metric on factor pairs provides; ξ and η are pairs ``(ξ_A, ξ_B)``."""

    name: str

    def inner(self, x: FactorPoint, xi: Pair, eta: Pair) -> Tensor:
        """``⟨ξ, η⟩_x``."""

    def multiplier(self, x: FactorPoint, xi: Pair) -> Tensor:
        """The r×r matrix M for which ``(ξ_A + M A, ξ_B − Mᵀ B)`` is horizontal."""

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """The vector that represents a differential: ``⟨grad, ξ⟩_x = tr(∂_Aᵀ ξ_A + ∂_Bᵀ ξ_B)``."""

    def gradient_derivative(
        self, x: FactorPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """Directional derivative of :meth:`gradient` along ξ, in coordinates."""

    def christoffel(self, x: FactorPoint, xi: Pair, eta: Pair) -> Pair:
        """The symmetric ``Γ(ξ, η)`` of the Levi-Civita connection ``∇_ξ η = Dη[ξ] + Γ(ξ, η)``."""


def gram_derivative(X: Tensor, xi: Tensor) -> Tensor:
    """``Ṡ[ξ] = ξ Xᵀ + X ξᵀ``."""
    product = xi @ X.mT
    return product + product.mT


def _symmetric_product(xi: Tensor, eta: Tensor) -> Tensor:
    """``ξ ηᵀ + η ξᵀ``."""
    product = xi @ eta.mT
    return product + product.mT


class Preconditioned:
    """``⟨ξ, η⟩ = tr(S_B ξ_A η_Aᵀ) + tr(S_A ξ_B η_Bᵀ)``.

    Each factor is measured by what it does to the product ``Aᵀ B``; steepest descent is scaled
    gradient descent (Mishra et al. 2012; da Silva, Dangel & Oore, arXiv 2505.05409).
    """

    name = "preconditioned"

    def inner(self, x: FactorPoint, xi: Pair, eta: Pair) -> Tensor:
        """``tr(S_B ξ_A η_Aᵀ) + tr(S_A ξ_B η_Bᵀ)``."""
        return frobenius_inner(x.SB @ xi[0], eta[0]) + frobenius_inner(x.SA @ xi[1], eta[1])

    def multiplier(self, x: FactorPoint, xi: Pair) -> Tensor:
        """``M = ½ [S_B^{-1} B ξ_Bᵀ − ξ_A Aᵀ S_A^{-1}]``: no Sylvester equation to solve."""
        return (x.solve_B(x.B @ xi[1].mT) - x.solve_A(x.A @ xi[0].mT).mT) / 2

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """``(S_B^{-1} ∂_A, S_A^{-1} ∂_B)``."""
        return x.solve_B(euclidean[0]), x.solve_A(euclidean[1])

    def gradient_derivative(
        self, x: FactorPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """``S_B^{-1} (∂̇_A − Ṡ_B[ξ] grad_A)``, and with A and B exchanged."""
        grad_A, grad_B = self.gradient(x, euclidean_gradient)
        hessian_A, hessian_B = euclidean_hessian
        return (
            x.solve_B(hessian_A - gram_derivative(x.B, xi[1]) @ grad_A),
            x.solve_A(hessian_B - gram_derivative(x.A, xi[0]) @ grad_B),
        )

    def christoffel(self, x: FactorPoint, xi: Pair, eta: Pair) -> Pair:
        """Koszul's formula, with ``Ṡ`` the Gram derivatives of the other factor.

        ``Γ_A = ½ S_B^{-1} (Ṡ_B[ξ] η_A + Ṡ_B[η] ξ_A − (ξ_B η_Bᵀ + η_B ξ_Bᵀ) A)``, and with A and B
        exchanged.
        """
        dSA_xi, dSB_xi = gram_derivative(x.A, xi[0]), gram_derivative(x.B, xi[1])
        dSA_eta, dSB_eta = gram_derivative(x.A, eta[0]), gram_derivative(x.B, eta[1])
        form_A = dSB_xi @ eta[0] + dSB_eta @ xi[0] - _symmetric_product(xi[1], eta[1]) @ x.A
        form_B = dSA_xi @ eta[1] + dSA_eta @ xi[1] - _symmetric_product(xi[0], eta[0]) @ x.B
        return x.solve_B(form_A) / 2, x.solve_A(form_B) / 2


class RightInvariant:
    """``⟨ξ, η⟩ = tr(S_A^{-1} ξ_A η_Aᵀ) + tr(S_B^{-1} ξ_B η_Bᵀ)``.

    Each factor is measured relative to itself (Mishra et al. 2014, the geometry of two-factor
    quotients); a step is relative to the scale of the factors.
    """

    name = "right-invariant"

    def inner(self, x: FactorPoint, xi: Pair, eta: Pair) -> Tensor:
        """``tr(S_A^{-1} ξ_A η_Aᵀ) + tr(S_B^{-1} ξ_B η_Bᵀ)``."""
        return frobenius_inner(x.solve_A(xi[0]), eta[0]) + frobenius_inner(x.solve_B(xi[1]), eta[1])

    def multiplier(self, x: FactorPoint, xi: Pair) -> Tensor:
        """Solve ``M S_A S_B + S_A S_B M = R`` with ``R = S_A B ξ_Bᵀ − ξ_A Aᵀ S_B``.

        With ``S_A = C Cᵀ`` and ``Cᵀ S_B C = U diag(w) Uᵀ`` the matrix ``P = C U`` diagonalises
        ``S_A S_B = P diag(w) P^{-1}``, so ``M = P [(P^{-1} R P)_ij / (w_i + w_j)] P^{-1}``. The w
        are the squared singular values of ``Aᵀ B``.
        """
        right_hand = x.SA @ (x.B @ xi[1].mT) - (xi[0] @ x.A.mT) @ x.SB
        w, U = torch.linalg.eigh(x.LA.mT @ x.SB @ x.LA)
        inner = torch.linalg.solve_triangular(x.LA, right_hand @ x.LA, upper=False)
        solved = (U.mT @ inner @ U) / (w.unsqueeze(-1) + w.unsqueeze(-2))
        outer = x.LA @ (U @ solved @ U.mT)
        return torch.linalg.solve_triangular(x.LA, outer, upper=False, left=False)

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """``(S_A ∂_A, S_B ∂_B)``."""
        return x.SA @ euclidean[0], x.SB @ euclidean[1]

    def gradient_derivative(
        self, x: FactorPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """``Ṡ_A[ξ] ∂_A + S_A ∂̇_A``, and with B."""
        return (
            gram_derivative(x.A, xi[0]) @ euclidean_gradient[0] + x.SA @ euclidean_hessian[0],
            gram_derivative(x.B, xi[1]) @ euclidean_gradient[1] + x.SB @ euclidean_hessian[1],
        )

    def christoffel(self, x: FactorPoint, xi: Pair, eta: Pair) -> Pair:
        """Koszul's formula; the factors do not interact.

        ``Γ_A = ½ [(ξ_A η_Aᵀ + η_A ξ_Aᵀ) S_A^{-1} A − Ṡ_A[ξ] S_A^{-1} η_A − Ṡ_A[η] S_A^{-1} ξ_A]``,
        and with B.
        """
        return (
            self._christoffel_of_factor(x.A, x.LA, xi[0], eta[0]),
            self._christoffel_of_factor(x.B, x.LB, xi[1], eta[1]),
        )

    @staticmethod
    def _christoffel_of_factor(X: Tensor, L: Tensor, xi: Tensor, eta: Tensor) -> Tensor:
        solved_X, solved_xi, solved_eta = (torch.cholesky_solve(Y, L) for Y in (X, xi, eta))
        return (
            _symmetric_product(xi, eta) @ solved_X
            - gram_derivative(X, xi) @ solved_eta
            - gram_derivative(X, eta) @ solved_xi
        ) / 2


METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (Preconditioned(), RightInvariant())
}
