"""Vertical vectors under groups that are the units of a matrix algebra: GL(r), rotary planes.

Their Lie algebra is the whole matrix algebra, so a vertical vector ``(−Λᵀ A, Λ B)`` is found by
least squares over all r×r matrices Λ of the algebra. In the coordinates of the metric's isometry
the factors have orthonormal rows ``Â = L_A^{-1} A`` and ``B̂ = L_B^{-1} B``, and the equations are
well conditioned whatever representative of the orbit the pair is.
"""

from torch import Tensor

from quotientopt._linalg import Pair
from quotientopt._lyapunov import solve_paired_lyapunov
from quotientopt.groups import RotaryCommutant, StructureGroup
from quotientopt.manifolds.metrics import FactorPoint
from quotientopt.manifolds.vertical.base import VerticalVector


def preconditioned(x: FactorPoint, u: Pair) -> VerticalVector:
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


def right_invariant(x: FactorPoint, u: Pair) -> VerticalVector:
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
