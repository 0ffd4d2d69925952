"""A well-conditioned representative to compute at, where rounding would grow with the pair's own.

Christoffel forms multiply several factors, and a badly conditioned representative squares the
rounding of each. They are equivariant, so they may be computed at another representative and moved
back.
"""

from typing import NamedTuple

from quotientopt._linalg import Pair
from quotientopt.groups import O
from quotientopt.manifolds.metrics import Factor, FactorPoint, JointPoint


class Representative(NamedTuple):
    """The representative ``(L_Bᵀ A, L_B^{-1} B)``, whose second factor has orthonormal rows.

    Attributes
    ----------
    pair : tuple of Tensor
        The representative.
    B : Factor
        The second factor of the point it was made from: ``g = L_B^{-1}``.
    """

    pair: Pair
    B: Factor

    def tangent(self, u: Pair) -> Pair:
        """Move a tangent vector there, ``(L_Bᵀ u_A, L_B^{-1} u_B)``."""
        return self.B.root.mT @ u[0], self.B.solve_root(u[1])

    def cotangent(self, partials: Pair) -> Pair:
        """Move partial derivatives there, ``(L_B^{-1} ∂_A, L_Bᵀ ∂_B)``."""
        return self.B.solve_root(partials[0]), self.B.root.mT @ partials[1]

    def back(self, u: Pair) -> Pair:
        """Move a tangent vector back, ``(L_B^{-T} u_A, L_B u_B)``."""
        return self.B.solve_root_transposed(u[0]), self.B.root @ u[1]


def well_conditioned(x: FactorPoint | JointPoint) -> Representative | None:
    """The representative, where it lies in the orbit and no precision is to spare; else None.

    Elements of O(r) cannot change condition numbers, and points that are stored in a lower
    precision than they are computed in have precision to spare.
    """
    if isinstance(x, JointPoint) or x.B.orthonormal is None or isinstance(x.group, O):
        return None
    return Representative((x.B.root.mT @ x.A.rows, x.B.orthonormal), x.B)
