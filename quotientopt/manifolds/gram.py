"""The quotient of full-rank token matrices by O(d): Gram matrices, Bures–Wasserstein metric."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import (
    cholesky,
    compute_dtype,
    frobenius_inner,
    gram,
    orthogonal_polar_factor,
    safe_root,
    solve_lyapunov,
    standard_normal,
    wide,
)
from quotientopt.groups import O, StabilizerOfOnes, StructureGroup
from quotientopt.manifolds.base import (
    QuotientManifold,
    check_batch_shape,
    check_group_element,
    check_size,
    random_dtype,
    wide_tensor,
)


class GramQuotient(QuotientManifold[Tensor]):
    """Matrices X ∈ R_*^{N×d} modulo ``X ~ X gᵀ``, g ∈ O(d) or the stabiliser of the ones vector.

    Under O(d) the orbit is named by the Gram matrix ``X Xᵀ``, so the quotient is the manifold of
    N×N positive semidefinite matrices of rank min(N, d): with fewer tokens than dimensions, of the
    positive definite ones. Points have full rank. With N < d they have a stabiliser O(d − N), so
    that orbits are smaller than the group and elements that lead from one point to another are not
    unique; horizontal vectors are ``M X`` with M symmetric, and all of the geometry is that of N×N
    matrices. The Euclidean metric ``tr(Uᵀ V)`` descends to it:
    its geodesic distance is the Bures–Wasserstein distance. Token matrices up to a rotation of the
    residual stream, and all weights of a model that read or write it, stacked, are such points
    (François & Ravera, arXiv 2602.18948). Not complete: rank may drop along a geodesic.

    LayerNorm's centring singles out the all-ones vector 1 of R^d and breaks O(d) to its stabiliser:
    then the inner products ``X 1`` of the rows with 1 are invariants as well, and only the part of
    the rows orthogonal to 1 moves, which has to have the full rank min(N, d − 1).

    Parameters
    ----------
    N, d : int
        Rows and columns of a point.
    stabilizer : StabilizerOfOnes or O, optional
        The group; ``O(d)`` by default.
    batch_shape : sequence of int
        Leading dimensions of every tensor.
    check : bool
        Whether to look for non-finite entries and rank deficiency, which waits for the device.

    Raises
    ------
    ValueError
        On sizes that do not fit, or another `stabilizer`.
    """

    group: O

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
        self.group = _orthogonal_group(stabilizer, d)
        self._moving = d - 1 if isinstance(self.group, StabilizerOfOnes) else d
        self._broad = self._moving > N
        self.batch_shape = check_batch_shape(batch_shape)
        self.check = check

    @property
    def dim(self) -> int:
        """N d less the dimension of the orbits.

        That is the dimension of the group, d(d − 1)/2 or (d − 1)(d − 2)/2, where N is at least d
        (d − 1), and less by that of the stabiliser, O(d − N) or O(d − 1 − N), where it is not.
        """
        free = max(self._moving - self.N, 0)
        return self.N * self.d - self.group.dim + free * (free - 1) // 2

    @property
    def acts_freely(self) -> bool:
        """Whether only the identity leaves a point where it is; False for N < d."""
        return self._moving <= self.N

    @property
    def section_kinds(self) -> tuple[str, ...]:
        """The kinds that :meth:`section` knows."""
        return ("svd", "polar", "triangular")

    def check_point(self, x: Tensor) -> None:
        self._moving_gram(self._tensor("x", x), x.dtype, check=True)

    def check_tangent(self, x: Tensor, u: Tensor, *, tolerance: float | None = None) -> None:
        X, U = self._tensor("x", x), self._tensor("u", u)
        if tolerance is not None:
            vertical = torch.linalg.matrix_norm(self._vertical(X, U, x.dtype))
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
        u = standard_normal(X.shape, generator=generator, device=X.device)
        u = u - self._vertical(X, u, x.dtype)
        return (u / torch.linalg.matrix_norm(u, keepdim=True)).to(x.dtype)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``tr(uᵀ v)``, of shape `batch_shape`; it does not depend on `x`."""
        self._tensor("x", x)
        return frobenius_inner(self._tensor("u", u), self._tensor("v", v)).to(x.dtype)

    def canonical_projection(self, x: Tensor) -> Tensor:
        """``X Xᵀ``, of shape (*batch_shape, N, N).

        Under ``StabilizerOfOnes`` ``[X Xᵀ, X 1]``, of shape (*batch_shape, N, N + 1).
        """
        X = self._tensor("x", x)
        return self._with_sums(gram(X), X).to(x.dtype)

    def differential(self, x: Tensor, u: Tensor) -> Tensor:
        """``u Xᵀ + X uᵀ``, with a further column ``u 1`` under ``StabilizerOfOnes``."""
        X, U = self._tensor("x", x), self._tensor("u", u)
        product = U @ X.mT
        return self._with_sums(product + product.mT, U).to(x.dtype)

    def vertical_vector(self, x: Tensor, algebra_element: Tensor) -> Tensor:
        """``X Λᵀ`` for a d×d matrix Λ, which is projected to the Lie algebra of the group first."""
        X = self._tensor("x", x)
        Lambda = self._square("algebra_element", algebra_element, self.d)
        return (X @ self.group.algebra_projection(Lambda).mT).to(x.dtype)

    def vertical_component(self, x: Tensor, u: Tensor) -> Tensor:
        """``X Ω``, what :meth:`horizontal_component` removes."""
        X, U = self._tensor("x", x), self._tensor("u", u)
        return self._vertical(X, U, x.dtype).to(x.dtype)

    def horizontal_component(self, x: Tensor, u: Tensor) -> Tensor:
        """``u − X Ω`` with Ω skew and ``XᵀX Ω + Ω XᵀX = Xᵀu − uᵀX``, by an eigendecomposition.

        Horizontal vectors are those with ``Xᵀ u`` symmetric. With N < d these are ``M X``, M
        symmetric with ``XXᵀ M + M XXᵀ = u Xᵀ + X uᵀ``. Under ``StabilizerOfOnes`` the same
        holds for the parts of X and u orthogonal to 1.
        """
        X, U = self._tensor("x", x), self._tensor("u", u)
        return (U - self._vertical(X, U, x.dtype)).to(x.dtype)

    def horizontal_lift(self, x: Tensor, base_tangent: Tensor) -> Tensor:
        """The horizontal u with ``u Xᵀ + X uᵀ = Ḣ``, the symmetric N×N `base_tangent`.

        With ``Y = X (XᵀX)^{-1}`` the particular solution ``Ḣ Y − ½ X Yᵀ Ḣ Y``, projected; with
        N < d ``M X`` with ``XXᵀ M + M XXᵀ = Ḣ``. Under
        ``StabilizerOfOnes`` the last column of `base_tangent` is ``u 1``, and the rest is solved
        for the parts orthogonal to 1.
        """
        X = self._tensor("x", x)
        columns = self.N + (self._moving < self.d)
        shape = (*self.batch_shape, self.N, columns)
        base = wide_tensor("base_tangent", base_tangent, shape, check=self.check)
        H, fixed = base[..., : self.N], torch.zeros_like(X)
        if self._moving < self.d:
            sums, rate = X.sum(dim=-1, keepdim=True), base[..., self.N :]
            product = rate @ sums.mT / self.d
            H, fixed = H - product - product.mT, (rate / self.d).expand_as(X)
        moving, S = self._moving_gram(X, x.dtype, check=self.check)
        if self._broad:
            lift = solve_lyapunov(S, (H + H.mT) / 2) @ moving
            return (fixed + self.group.from_moving_part(lift)).to(x.dtype)
        Y = torch.cholesky_solve(moving.mT, torch.linalg.cholesky_ex(S).L).mT
        lift = H @ Y - moving @ (Y.mT @ (H @ Y)) / 2
        U = fixed + self.group.from_moving_part(lift)
        return (U - self._vertical(X, U, x.dtype)).to(x.dtype)

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

    def integrability_tensor(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """O'Neill's tensor ``A_u v = ½ [u, v]^vertical`` of horizontal u and v.

        ``X Ω`` with Ω skew and ``XᵀX Ω + Ω XᵀX = vᵀu − uᵀv`` (of the parts orthogonal to 1 under
        ``StabilizerOfOnes``): the vertical part of the derivative along u of any horizontal field
        through v, and of half the bracket of horizontal extensions of u and v. It vanishes for all
        u and v exactly where the horizontal spaces are integrable; transport around a small loop
        turns the representative by it (O'Neill, *The fundamental equations of a submersion*, 1966).
        With N < d, ``u = M X`` and ``v = K X``: ``XXᵀ Y X`` with ``XXᵀ Y + Y XXᵀ = K M − M K``.
        """
        X, U, V = self._tensor("x", x), self._tensor("u", u), self._tensor("v", v)
        moving, S = self._moving_gram(X, x.dtype, check=self.check)
        if self._broad:
            M, K = (
                solve_lyapunov(S, product + product.mT)
                for product in (self.group.moving_part(W) @ moving.mT for W in (U, V))
            )
            turning = solve_lyapunov(S, K @ M - M @ K)
            return self.group.from_moving_part(S @ turning @ moving).to(x.dtype)
        product = self.group.moving_part(V).mT @ self.group.moving_part(U)
        rate = solve_lyapunov(S, product - product.mT)
        return self.group.from_moving_part(moving @ rate).to(x.dtype)

    def sectional_curvature(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """``3 ‖A_u v‖² / (‖u‖² ‖v‖² − ⟨u, v⟩²)`` for horizontal, linearly independent u and v.

        O'Neill's formula over a flat total space: the quotient is curved non-negatively.
        """
        vertical = wide(self.integrability_tensor(x, u, v))
        U, V = self._tensor("u", u), self._tensor("v", v)
        area = frobenius_inner(U, U) * frobenius_inner(V, V) - frobenius_inner(U, V).square()
        return (3 * frobenius_inner(vertical, vertical) / area).to(x.dtype)

    def geodesic(self, x: Tensor, u: Tensor, t: float | Tensor) -> Tensor:
        """``X + t u`` for horizontal u: a geodesic while the rank stays full.

        Parameters
        ----------
        x, u : Tensor, shape (*batch_shape, N, d)
        t : float or Tensor
            Time, one for all or of shape `batch_shape`.
        """
        X, U = self._tensor("x", x), self._tensor("u", u)
        t = torch.as_tensor(t, device=X.device).to(X.dtype)[..., None, None]
        return (X + t * U).to(x.dtype)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map at horizontal u, ``X + u``; a geodesic while the rank stays full."""
        return (self._tensor("x", x) + self._tensor("u", u)).to(x.dtype)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The horizontal u of least norm with ``exp(x, u)`` in y's orbit: ``Y Q − X``.

        ``Q = U Vᵀ`` from the SVD ``Yᵀ X = U Σ Vᵀ``; unique where ``Yᵀ X`` has the rank of a point.
        """
        X, Y = self._tensor("x", x), self._tensor("y", y)
        return (self._aligned(Y, X) - X).to(x.dtype)

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map, ``X + u``."""
        return self.exp(x, u)

    def retract_second_order(self, x: Tensor, u: Tensor) -> Tensor:
        """The exponential map, ``X + u``: geodesics have no acceleration at all."""
        return self.exp(x, u)

    def act(self, g: Tensor, x: Tensor) -> Tensor:
        """``X gᵀ``, for g of shape (*batch_shape, d, d); tangent vectors move likewise."""
        X, wide_g = self._tensor("x", x), self._square("g", g, self.d)
        if self.check:
            check_group_element(self.group, g)
        return (X @ wide_g.mT).to(x.dtype)

    def align(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The representative ``X gᵀ`` closest to `y` in Frobenius norm: orthogonal Procrustes.

        With N < d, g is one of many, and a constant for autograd.
        """
        X, Y = self._tensor("x", x), self._tensor("y", y)
        g = self._aligning_element(X, Y)
        return self._aligned(X, Y, g).to(x.dtype), g.to(compute_dtype(x.dtype))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The Bures–Wasserstein distance ``‖Y Q − X‖_F``, with Q as in :meth:`log`.

        Differentiable by autograd to any order. At zero, where it has no derivative, and where it
        is zero to working precision, the gradient is taken to be zero.
        """
        X, Y = self._tensor("x", x), self._tensor("y", y)
        difference = self._aligned(Y, X) - X
        size = torch.linalg.matrix_norm(X.detach()) + torch.linalg.matrix_norm(Y.detach())
        floor = 8 * self.d * torch.finfo(size.dtype).eps * size
        return safe_root(difference.square().sum(dim=(-2, -1)), floor).to(x.dtype)

    @overload
    def section(
        self,
        x: Tensor,
        kind: str = ...,
        *,
        return_gap: Literal[False] = ...,
        warn_below: float | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def section(
        self,
        x: Tensor,
        kind: str = ...,
        *,
        return_gap: Literal[True],
        warn_below: float | None = ...,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def section(
        self, x: Tensor, kind: str = ..., *, return_gap: bool, warn_below: float | None = ...
    ) -> Any: ...

    def section(
        self,
        x: Tensor,
        kind: str = "svd",
        *,
        return_gap: bool = False,
        warn_below: float | None = None,
    ) -> Any:
        """A canonical representative of x's orbit, and a g that leads to it.

        See :func:`quotientopt.sections.gram_svd`, :func:`~quotientopt.sections.gram_polar` and
        :func:`~quotientopt.sections.gram_triangular`.

        Parameters
        ----------
        x : Tensor
        kind : {"svd", "polar", "triangular"}
        return_gap, warn_below
            See :meth:`QuotientManifold.section`.
        """
        self._tensor("x", x)
        return sections.gram_section(
            kind,
            x,
            stabilizer=self.group,
            check=self.check,
            return_gap=return_gap,
            warn_below=warn_below,
        )

    def _aligning_element(self, X: Tensor, Y: Tensor) -> Tensor:
        overlap = self.group.moving_part(Y).mT @ self.group.moving_part(X)
        overlap = overlap.detach() if self._broad else overlap
        return self.group.element_of_moving(orthogonal_polar_factor(overlap))

    def _aligned(self, X: Tensor, Y: Tensor, g: Tensor | None = None) -> Tensor:
        """The representative of X's orbit closest to Y."""
        if not self._broad:
            return X @ (self._aligning_element(X, Y) if g is None else g).mT
        # With X = L_X V_X, Y = L_Y V_Y it is L_X R V_Y, R the polar factor of L_Xᵀ L_Y: N×N.
        moving = self.group.moving_part(X)
        _, R_X = torch.linalg.qr(moving.mT)
        V_Y, R_Y = torch.linalg.qr(self.group.moving_part(Y).mT)
        turned = R_X.mT @ orthogonal_polar_factor(R_X @ R_Y.mT) @ V_Y.mT
        return X - self.group.from_moving_part(moving) + self.group.from_moving_part(turned)

    def _moving_gram(self, X: Tensor, stored: torch.dtype, *, check: bool) -> tuple[Tensor, Tensor]:
        """The moving part of X and its smaller Gram matrix, refused if singular."""
        moving = self.group.moving_part(X)
        S = gram(moving if self._broad else moving.mT)
        if check:
            part = "token matrix x" if self._moving == self.d else "part of x orthogonal to 1"
            cholesky(S, part, precision=torch.finfo(stored).eps)
        return moving, S

    def _vertical(self, X: Tensor, U: Tensor, stored: torch.dtype) -> Tensor:
        moving, S = self._moving_gram(X, stored, check=self.check)
        part = self.group.moving_part(U)
        # Once more, for S has the squared condition number: what is horizontal in the first result
        # goes, or what is vertical in the rest comes.
        vertical = self._vertical_once(moving, S, part)
        if self._broad:
            vertical = self._vertical_once(moving, S, vertical)
        else:
            vertical = vertical + self._vertical_once(moving, S, part - vertical)
        return self.group.from_moving_part(vertical)

    def _vertical_once(self, moving: Tensor, S: Tensor, part: Tensor) -> Tensor:
        if self._broad:
            product = part @ moving.mT
            return part - solve_lyapunov(S, product + product.mT) @ moving
        product = moving.mT @ part
        return moving @ solve_lyapunov(S, product - product.mT)

    def _with_sums(self, matrix: Tensor, X: Tensor) -> Tensor:
        if self._moving == self.d:
            return matrix
        return torch.cat((matrix, X.sum(dim=-1, keepdim=True)), dim=-1)

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        shape = (*self.batch_shape, self.N, self.d)
        return wide_tensor(name, tensor, shape, check=self.check)

    def _square(self, name: str, tensor: Tensor, size: int) -> Tensor:
        return wide_tensor(name, tensor, (*self.batch_shape, size, size), check=self.check)

    def __repr__(self) -> str:
        stabilizer = f", stabilizer={self.group!r}" if self._moving < self.d else ""
        return f"GramQuotient({self.N}, {self.d}{stabilizer}, batch_shape={self.batch_shape})"


def _orthogonal_group(stabilizer: StructureGroup | None, d: int) -> O:
    if stabilizer is None:
        return O(d)
    if not isinstance(stabilizer, O) or stabilizer.r != d:
        raise ValueError(
            f"stabilizer must be None, O({d}) or StabilizerOfOnes({d}), got {stabilizer!r}"
        )
    return stabilizer
