"""The quotient of full-rank token matrices by O(d): Gram matrices, Bures–Wasserstein metric."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import (
    cholesky,
    compute_dtype,
    frobenius_inner,
    gram,
    orthogonal_polar_factor,
    skew_part,
    standard_normal,
)
from quotientopt.groups import O, StructureGroup
from quotientopt.manifolds._validation import (
    check_batch_shape,
    check_size,
    random_dtype,
    wide_tensor,
)
from quotientopt.manifolds.base import QuotientManifold


class GramQuotient(QuotientManifold[Tensor]):
    """Matrices X ∈ R_*^{N×d} of full column rank modulo ``X ~ X gᵀ``, g ∈ O(d).

    The orbit is named by the Gram matrix ``X Xᵀ``, so the quotient is the manifold of N×N positive
    semidefinite matrices of rank d. The Euclidean metric ``tr(Uᵀ V)`` descends to it: its geodesic
    distance is the Bures–Wasserstein distance. Token matrices up to a rotation of the residual
    stream, and all weights of a model that read or write it, stacked, are such points (François &
    Ravera, arXiv 2602.18948). Not complete: rank may drop along a geodesic.

    Parameters
    ----------
    N, d : int
        Rows and columns of a point; N at least d.
    stabilizer : StructureGroup, optional
        Reserved for the subgroup that fixes a vector; anything but None is refused.
    batch_shape : sequence of int
        Leading dimensions of every tensor.
    check : bool
        Whether to look for non-finite entries and rank deficiency, which waits for the device.

    Raises
    ------
    ValueError
        On sizes that do not fit, or a `stabilizer`.
    """

    def __init__(
        self,
        N: int,
        d: int,
        *,
        stabilizer: StructureGroup | None = None,
        batch_shape: Sequence[int] = (),
        check: bool = True,
    ) -> None:
        self.N, self.d = check_size("N", N), check_size("d", d)
        if d > N:
            raise ValueError(f"full column rank needs N >= d, got {N = }, {d = }")
        if stabilizer is not None:
            raise ValueError(f"stabilizer {stabilizer!r} is not available yet, only None")
        self.group = O(d)
        self.batch_shape = check_batch_shape(batch_shape)
        self.check = check

    @property
    def dim(self) -> int:
        """N d − d(d − 1)/2, of one batch item."""
        return self.N * self.d - self.group.dim

    def check_point(self, x: Tensor) -> None:
        cholesky(gram(self._tensor("x", x).mT), "token matrix x")

    def check_tangent(self, x: Tensor, u: Tensor, *, tolerance: float | None = None) -> None:
        X, U = self._tensor("x", x), self._tensor("u", u)
        if tolerance is not None:
            vertical = torch.linalg.matrix_norm(U - self._horizontal(X, U))
            if bool((vertical > tolerance * torch.linalg.matrix_norm(U)).any()):
                raise ValueError(f"u is not horizontal: vertical part {vertical.max().item():.1e}")

    def random_point(
        self,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        shape = (*self.batch_shape, self.N, self.d)
        dtype = random_dtype(dtype)
        return standard_normal(shape, generator=generator, device=device).to(dtype)

    def random_tangent(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        X = self._tensor("x", x)
        u = self._horizontal(X, standard_normal(X.shape, generator=generator, device=X.device))
        return (u / torch.linalg.matrix_norm(u, keepdim=True)).to(x.dtype)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``tr(uᵀ v)``, of shape `batch_shape`; it does not depend on `x`."""
        self._tensor("x", x)
        return frobenius_inner(self._tensor("u", u), self._tensor("v", v)).to(x.dtype)

    def canonical_projection(self, x: Tensor) -> Tensor:
        """``X Xᵀ``, of shape (*batch_shape, N, N)."""
        return gram(self._tensor("x", x)).to(x.dtype)

    def differential(self, x: Tensor, u: Tensor) -> Tensor:
        """``u Xᵀ + X uᵀ``, of shape (*batch_shape, N, N)."""
        product = self._tensor("u", u) @ self._tensor("x", x).mT
        return (product + product.mT).to(x.dtype)

    def vertical_vector(self, x: Tensor, algebra_element: Tensor) -> Tensor:
        """``X Λᵀ`` for a skew d×d matrix Λ; the symmetric part of anything else is dropped."""
        X = self._tensor("x", x)
        Lambda = self._square("algebra_element", algebra_element, self.d)
        return (X @ skew_part(Lambda).mT).to(x.dtype)

    def vertical_component(self, x: Tensor, u: Tensor) -> Tensor:
        """``X Ω``, what :meth:`horizontal_component` removes."""
        X, U = self._tensor("x", x), self._tensor("u", u)
        return (X @ self._rotation_rate(X, U)).to(x.dtype)

    def horizontal_component(self, x: Tensor, u: Tensor) -> Tensor:
        """``u − X Ω`` with Ω skew and ``XᵀX Ω + Ω XᵀX = Xᵀu − uᵀX``, by an eigendecomposition.

        Horizontal vectors are those with ``Xᵀ u`` symmetric.
        """
        X, U = self._tensor("x", x), self._tensor("u", u)
        return self._horizontal(X, U).to(x.dtype)

    def horizontal_lift(self, x: Tensor, base_tangent: Tensor) -> Tensor:
        """The horizontal u with ``u Xᵀ + X uᵀ = Ḣ``, the symmetric N×N `base_tangent`.

        With ``Y = X (XᵀX)^{-1}`` the particular solution ``Ḣ Y − ½ X Yᵀ Ḣ Y``, projected.
        """
        X = self._tensor("x", x)
        H = self._square("base_tangent", base_tangent, self.N)
        L = cholesky(gram(X.mT), "token matrix x", check=self.check)
        Y = torch.cholesky_solve(X.mT, L).mT
        lift = H @ Y - X @ (Y.mT @ (H @ Y)) / 2
        return self._horizontal(X, lift).to(x.dtype)

    def gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """The Euclidean gradient itself: horizontal if the function is invariant."""
        self._tensor("x", x)
        return self._tensor("euclidean_gradient", euclidean_gradient).to(x.dtype)

    def hessian(
        self, x: Tensor, euclidean_gradient: Tensor, euclidean_hessian: Tensor, u: Tensor
    ) -> Tensor:
        """The horizontal part of the Euclidean Hessian-vector product: the total space is flat."""
        self._tensor("euclidean_gradient", euclidean_gradient)
        self._tensor("u", u)
        return self.horizontal_component(x, euclidean_hessian)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map at horizontal u, ``X + u``; a geodesic while the rank stays d."""
        return (self._tensor("x", x) + self._tensor("u", u)).to(x.dtype)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal u of least norm with ``exp(x, u)`` in y's orbit: ``Y Q − X``.

        ``Q = U Vᵀ`` from the SVD ``Yᵀ X = U Σ Vᵀ``; unique where ``Yᵀ X`` is invertible.
        """
        X, Y = self._tensor("x", x), self._tensor("y", y)
        return (Y @ orthogonal_polar_factor(Y.mT @ X) - X).to(x.dtype)

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map, ``X + u``."""
        return self.exp(x, u)

    def retract_second_order(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map, ``X + u``: geodesics have no acceleration at all."""
        return self.exp(x, u)

    def act(self, g: Tensor, x: Tensor) -> Tensor:
        """``X gᵀ``, for g of shape (*batch_shape, d, d); tangent vectors move likewise."""
        return (self._tensor("x", x) @ self._square("g", g, self.d).mT).to(x.dtype)

    def align(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The representative ``X gᵀ`` closest to `y` in Frobenius norm: orthogonal Procrustes."""
        X, Y = self._tensor("x", x), self._tensor("y", y)
        g = orthogonal_polar_factor(Y.mT @ X)
        return (X @ g.mT).to(x.dtype), g.to(compute_dtype(x.dtype))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The Bures–Wasserstein distance ``‖Y Q − X‖_F``, with Q as in :meth:`log`."""
        X, Y = self._tensor("x", x), self._tensor("y", y)
        difference = Y @ orthogonal_polar_factor(Y.mT @ X) - X
        return torch.linalg.matrix_norm(difference).to(x.dtype)

    def section(self, x: Tensor, kind: str = "svd") -> tuple[Tensor, Tensor]:
        """See :func:`quotientopt.sections.gram_svd` and :func:`quotientopt.sections.gram_polar`.

        Parameters
        ----------
        x : Tensor
        kind : {"svd", "polar"}
        """
        self._tensor("x", x)
        return sections.gram_section(kind, x, check=self.check)

    def _rotation_rate(self, X: Tensor, U: Tensor) -> Tensor:
        """Ω of :meth:`horizontal_component`."""
        S = gram(X.mT)
        if self.check:
            cholesky(S, "token matrix x")
        w, basis = torch.linalg.eigh(S)
        product = X.mT @ U
        right_hand = basis.mT @ (product - product.mT) @ basis
        return basis @ (right_hand / (w.unsqueeze(-1) + w.unsqueeze(-2))) @ basis.mT

    def _horizontal(self, X: Tensor, U: Tensor) -> Tensor:
        return U - X @ self._rotation_rate(X, U)

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        shape = (*self.batch_shape, self.N, self.d)
        return wide_tensor(name, tensor, shape, check=self.check)

    def _square(self, name: str, tensor: Tensor, size: int) -> Tensor:
        return wide_tensor(name, tensor, (*self.batch_shape, size, size), check=self.check)

    def __repr__(self) -> str:
        return f"GramQuotient({self.N}, {self.d}, batch_shape={self.batch_shape})"
