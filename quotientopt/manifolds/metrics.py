"""The Riemannian metrics on factor pairs, as pure functions of a factorised point.

For a point (A, B) write ``S_A = ρ(A Aᵀ)`` and ``S_B = ρ(B Bᵀ)``, where ρ is the group's
:meth:`~quotientopt.groups.StructureGroup.row_products`: the identity for GL(r) and O(r), the Gram
matrix of complex rows for the planes of a rotary commutant. For a tangent vector ξ write
``Ṡ_A[ξ] = ρ(ξ_A Aᵀ + A ξ_Aᵀ)``, likewise ``Ṡ_B``.

In reading order: the points that metrics compute with (:class:`FactorPoint`, made by
:func:`factorize`, and :class:`JointPoint`), what a :class:`Metric` provides, and the three of them,
:class:`Preconditioned`, :class:`RightInvariant` and :class:`Euclidean`, by name in :data:`METRICS`.
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

    def times_gram(self, Y: Tensor) -> Tensor:
        """``S Y``."""
        return self.root @ (self.root.mT @ Y)

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


class JointPoint(NamedTuple):
    """A factor pair with the Gram matrix ``S = A Aᵀ + B Bᵀ`` of the rows of [A B]."""

    A: Tensor
    B: Tensor
    S: Tensor


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


class Preconditioned:
    """``⟨ξ, η⟩ = tr(S_B ξ_A η_Aᵀ) + tr(S_A ξ_B η_Bᵀ)``.

    Steepest descent is scaled gradient descent (Mishra et al. 2012; da Silva, Dangel & Oore,
    arXiv 2505.05409). Invariant under GL(r), and under a rotary commutant with its own S_A and S_B.
    """

    name = "preconditioned"

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> FactorPoint:
        """See :func:`~quotientopt.manifolds.metrics.factorize`."""
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


class RightInvariant:
    """``⟨ξ, η⟩ = tr(S_A^{-1} ξ_A η_Aᵀ) + tr(S_B^{-1} ξ_B η_Bᵀ)``.

    The geometry of two-factor quotients (Mishra et al. 2014); a step is relative to the scale of
    the factors. Invariant as the preconditioned metric is.
    """

    name = "right-invariant"

    def point(
        self, pair: Pair, group: StructureGroup, *, check: bool = True, stored: torch.dtype
    ) -> FactorPoint:
        """See :func:`~quotientopt.manifolds.metrics.factorize`."""
        return factorize(pair, group, check=check, stored=stored)

    def isometry(self, x: FactorPoint, xi: Pair) -> Pair:
        """``(L_A^{-1} ξ_A, L_B^{-1} ξ_B)``."""
        return x.A.solve_root(xi[0]), x.B.solve_root(xi[1])

    def gradient(self, x: FactorPoint, euclidean: Pair) -> Pair:
        """``(S_A ∂_A, S_B ∂_B)``."""
        return x.A.times_gram(euclidean[0]), x.B.times_gram(euclidean[1])

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


METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (Preconditioned(), RightInvariant(), Euclidean())
}
