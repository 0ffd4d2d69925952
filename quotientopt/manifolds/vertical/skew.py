"""Vertical vectors under O(r): ``(Λ A, Λ B)`` with skew Λ, found by least squares."""

import torch
from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt._lyapunov import solve_lyapunov
from quotientopt.manifolds.metrics import Factor, FactorPoint, JointPoint
from quotientopt.manifolds.vertical.base import VerticalVector


def euclidean(x: JointPoint, u: Pair) -> VerticalVector:
    """``Λ S + S Λ = K − Kᵀ`` with ``S = A Aᵀ + B Bᵀ`` and ``K = u_A Aᵀ + u_B Bᵀ``."""
    K = u[0] @ x.A.mT + u[1] @ x.B.mT
    Lambda = solve_lyapunov(x.S, K - K.mT)
    return VerticalVector(Lambda, Lambda, x.A, x.B)


def preconditioned(x: FactorPoint, u: Pair) -> VerticalVector:
    """``S_A Λ S_B + S_B Λ S_A = ½ (R − Rᵀ)`` with ``R = S_A u_B Bᵀ − A u_Aᵀ S_B``.

    With ``F = L_Aᵀ L_B^{-T}``, ``T = L_Aᵀ u_B B̂ᵀ − Â u_Aᵀ L_B`` and ``Y = L_Bᵀ Λ L_B`` it is the
    Lyapunov equation ``FᵀF Y + Y FᵀF = ½ (Fᵀ T − Tᵀ F)``.
    """
    F = x.B.solve_root(x.A.root).mT
    T = x.A.root.mT @ x.B.coordinates(u[1]) - x.A.coordinates(u[0]).mT @ x.B.root
    product = F.mT @ T
    Y = solve_lyapunov(F.mT @ F, (product - product.mT) / 2)
    Lambda = x.B.solve_root_transposed(x.B.solve_root_transposed(Y).mT).mT
    return VerticalVector(Lambda, Lambda, x.A.rows, x.B.rows)


def right_invariant(x: FactorPoint, u: Pair) -> VerticalVector:
    """``Σ_X S_X Λ S_X^{-1} + S_X^{-1} Λ S_X = R − Rᵀ`` with ``R = Σ_X S_X^{-1} u_X Xᵀ``.

    X runs over A and B. No decomposition diagonalises both terms: a dense linear system in the
    r(r − 1)/2 entries of Λ is solved, in O(r⁶) operations and O(r⁴) memory for each batch item.
    """
    row, column = torch.triu_indices(x.group.r, x.group.r, 1, device=x.A.root.device)
    system = _conjugation(x.A, row, column) + _conjugation(x.B, row, column)
    R = _rotation(x.A, u[0]) + _rotation(x.B, u[1])
    entries = (R - R.mT)[..., row, column].unsqueeze(-1)
    root, _ = torch.linalg.cholesky_ex(system, check_errors=False)
    solution = torch.cholesky_solve(entries, root).squeeze(-1)
    Lambda = torch.zeros_like(R)
    Lambda[..., row, column] = solution
    Lambda[..., column, row] = -solution
    return VerticalVector(Lambda, Lambda, x.A.rows, x.B.rows)


def _rotation(X: Factor, xi: Tensor) -> Tensor:
    """``S^{-1} ξ Xᵀ``."""
    return X.solve(X.coordinates(xi)) @ X.root.mT


def _conjugation(X: Factor, row: Tensor, column: Tensor) -> Tensor:
    """``Λ ↦ S Λ S^{-1} + S^{-1} Λ S`` on the entries above the diagonal of skew matrices."""
    S = X.root @ X.root.mT
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    inverse = torch.cholesky_solve(identity, X.root)

    def product(left: Tensor, right: Tensor) -> Tensor:
        # Entry (i, j) of left (e_k e_lᵀ − e_l e_kᵀ) right, for i < j and k < l.
        i, j = row.unsqueeze(-1), column.unsqueeze(-1)
        return left[..., i, row] * right[..., column, j] - left[..., i, column] * right[..., row, j]

    return product(S, inverse) + product(inverse, S)
