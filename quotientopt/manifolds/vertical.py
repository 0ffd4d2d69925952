"""Vertical components of tangent vectors: one function for each structure group and metric.

A vertical vector ``(−Λᵀ A, Λ B)``, with Λ in the Lie algebra of the group, is found by least
squares and kept as r×r matrices times rows (:class:`VerticalVector`).

Under groups that are the units of a matrix algebra, GL(r) and rotary commutants, the Lie algebra is
the whole matrix algebra. In the coordinates of the metric's isometry the factors have orthonormal
rows ``Â = L_A^{-1} A`` and ``B̂ = L_B^{-1} B``, and the equations are well conditioned whatever
representative of the orbit the pair is (:func:`algebra_preconditioned`,
:func:`algebra_right_invariant`).

Under O(r) the vector is ``(Λ A, Λ B)`` with skew Λ (:func:`skew_preconditioned`,
:func:`skew_right_invariant`, :func:`skew_euclidean`).

Last comes the choice among them, :func:`vertical_component`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, solve_lyapunov, solve_paired_lyapunov, subtract_product
from quotientopt.groups import GL, O, RotaryCommutant, StructureGroup
from quotientopt.manifolds.metrics import Factor, FactorPoint, JointPoint


class VerticalVector(NamedTuple):
    """``(C_A R_A, C_B R_B)`` with r×r coefficients C and rows R, multiplied out when needed."""

    coefficients_A: Tensor  # noqa: N815 -- A is the factor's name
    coefficients_B: Tensor  # noqa: N815 -- B is the factor's name
    rows_A: Tensor  # noqa: N815
    rows_B: Tensor  # noqa: N815

    def dense(self) -> Pair:
        """The pair of products."""
        return self.coefficients_A @ self.rows_A, self.coefficients_B @ self.rows_B

    def subtracted_from(self, u: Pair) -> Pair:
        """u less the vector, in one pass over each factor."""
        return (
            subtract_product(u[0], self.coefficients_A, self.rows_A),
            subtract_product(u[1], self.coefficients_B, self.rows_B),
        )


def algebra_preconditioned(x: FactorPoint, u: Pair) -> VerticalVector:
    """``(−L_B^{-T} Kᵀ Â, L_A^{-T} K B̂)`` with ``K = ½ ρ(L_Aᵀ u_B B̂ᵀ − Â u_Aᵀ L_B)``.

    Here ``K = L_Aᵀ Λ L_B``; there is no equation to solve.
    """
    from_B = x.A.root.mT @ x.B.coordinates(u[1])
    from_A = x.A.coordinates(u[0]).mT @ x.B.root
    K = x.group.row_products(from_B - from_A) / 2
    return VerticalVector(
        x.A.in_frame(-x.B.solve_root_transposed(K.mT)),
        x.B.in_frame(x.A.solve_root_transposed(K)),
        x.A.frame,
        x.B.frame,
    )


def algebra_right_invariant(x: FactorPoint, u: Pair) -> VerticalVector:
    """``(−L_A N_A Â, L_B N_B B̂)`` with N_B and N_A similar to Λ and Λᵀ.

    With ``T_A = ρ(L_A^{-1} u_A Âᵀ)``, likewise T_B, and ``W = L_Aᵀ L_B``, whose singular values are
    those of ``Aᵀ B``, they solve ``N_B WᵀW + WᵀW N_B = T_B WᵀW − Wᵀ T_Aᵀ W`` and
    ``N_A WWᵀ + WWᵀ N_A = W T_Bᵀ Wᵀ − T_A WWᵀ``. On a rotary plane everything commutes and
    ``N_B = ½ (T_B − T_Aᵀ) = N_Aᵀ``.
    """
    T_A = x.group.row_products(x.A.solve_root(x.A.coordinates(u[0])))
    T_B = x.group.row_products(x.B.solve_root(x.B.coordinates(u[1])))
    N_B = (T_B - T_A.mT) / 2
    N_A = N_B.mT.clone()
    rows = _linear_rows(x.group)
    if rows.start < rows.stop:
        W = (x.A.root.mT @ x.B.root)[..., rows, rows]
        N_B[..., rows, rows], N_A[..., rows, rows] = _solve_linear(
            W, T_A[..., rows, rows], T_B[..., rows, rows]
        )
    return VerticalVector(
        x.A.in_frame(-x.A.root @ N_A), x.B.in_frame(x.B.root @ N_B), x.A.frame, x.B.frame
    )


def _solve_linear(W: Tensor, T_A: Tensor, T_B: Tensor) -> tuple[Tensor, Tensor]:
    Q_right, Q_left = W.mT @ W, W @ W.mT
    return solve_paired_lyapunov(
        W, T_B @ Q_right - W.mT @ T_A.mT @ W, W @ T_B.mT @ W.mT - T_A @ Q_left
    )


def _linear_rows(group: StructureGroup) -> slice:
    """The rows that the group mixes freely."""
    start = group.rotary_dim if isinstance(group, RotaryCommutant) else 0
    return slice(start, group.r)


def skew_preconditioned(x: FactorPoint, u: Pair) -> VerticalVector:
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


def skew_right_invariant(x: FactorPoint, u: Pair) -> VerticalVector:
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


def skew_euclidean(x: JointPoint, u: Pair) -> VerticalVector:
    """``Λ S + S Λ = K − Kᵀ`` with ``S = A Aᵀ + B Bᵀ`` and ``K = u_A Aᵀ + u_B Bᵀ``."""
    K = u[0] @ x.A.mT + u[1] @ x.B.mT
    Lambda = solve_lyapunov(x.S, K - K.mT)
    return VerticalVector(Lambda, Lambda, x.A, x.B)


VerticalComponent = Callable[[Any, Pair], VerticalVector]

_COMPONENTS: dict[type[StructureGroup], dict[str, VerticalComponent]] = {
    GL: {
        "preconditioned": algebra_preconditioned,
        "right-invariant": algebra_right_invariant,
    },
    RotaryCommutant: {
        "preconditioned": algebra_preconditioned,
        "right-invariant": algebra_right_invariant,
    },
    O: {
        "preconditioned": skew_preconditioned,
        "right-invariant": skew_right_invariant,
        "euclidean": skew_euclidean,
    },
}


def vertical_component(group: StructureGroup, metric: str) -> VerticalComponent:
    """The function that computes vertical components.

    Raises
    ------
    ValueError
        If factor pairs are not divided by such a group, or the metric is not invariant under it.
    """
    if type(group) not in _COMPONENTS:
        known = ", ".join(kind.__name__ for kind in _COMPONENTS)
        raise ValueError(f"factor pairs are divided by one of {known}, got {group!r}")
    components = _COMPONENTS[type(group)]
    if metric not in components:
        raise ValueError(f"metric for {group!r} must be one of {tuple(components)}, got {metric!r}")
    return components[metric]
