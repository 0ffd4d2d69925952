"""The Euclidean metric, invariant under O(r)."""

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, cholesky
from quotientopt.groups import StructureGroup


class JointPoint(NamedTuple):
    """A factor pair with the Gram matrix ``S = A Aᵀ + B Bᵀ`` of the rows of [A B]."""

    A: Tensor
    B: Tensor
    S: Tensor


class Euclidean:
    """``⟨ξ, η⟩ = tr(ξ_A η_Aᵀ) + tr(ξ_B η_Bᵀ)``, for pairs whose [A B] has full row rank.

    The pair is the token matrix [A B]ᵀ modulo O(r), with the Bures–Wasserstein metric.
    """

    name = "euclidean"

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> JointPoint:
        """The joint Gram matrix; ``ValueError`` if `check` and [A B] is rank-deficient."""
        A, B = pair
        S = A @ A.mT + B @ B.mT
        if check:
            cholesky(S, "[A B]", precision=torch.finfo(stored).eps)
        return JointPoint(A, B, S)

    def isometry(self, x: JointPoint, xi: Pair) -> Pair:
        """ξ itself."""
        return xi

    def gradient(self, x: JointPoint, euclidean: Pair) -> Pair:
        """The Euclidean gradient itself."""
        return euclidean

    def gradient_derivative(
        self, x: JointPoint, euclidean_gradient: Pair, euclidean_hessian: Pair, xi: Pair
    ) -> Pair:
        """The Euclidean Hessian-vector product."""
        return euclidean_hessian

    def christoffel(self, x: JointPoint, xi: Pair, eta: Pair) -> Pair:
        """Zero: the total space is flat."""
        return torch.zeros_like(xi[0]), torch.zeros_like(xi[1])
