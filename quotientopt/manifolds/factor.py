"""The quotient of full-rank factor pairs by GL(r): attention circuits and low-rank adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt import sections
from quotientopt._linalg import (
    Pair,
    compute_dtype,
    orthogonal_polar_factor,
    standard_normal,
)
from quotientopt.groups import GL, StructureGroup
from quotientopt.manifolds._validation import (
    check_batch_shape,
    check_size,
    random_dtype,
    wide_tensor,
)
from quotientopt.manifolds.base import QuotientManifold
from quotientopt.manifolds.metrics import METRICS, FactorPoint, factorize


class FactorQuotient(QuotientManifold[Pair]):
    """Pairs (A, B) of full row rank r modulo ``(A, B) ~ (g^{-T} A, g B)``, g ∈ GL(r).

    A is r×n, B is r×m; the orbit is named by ``π(A, B) = Aᵀ B``, an n×m matrix of rank r, so the
    quotient is the manifold of rank-r matrices, of dimension r(n + m − r). Query and key weights of
    an attention head, its value and output weights and the factors of a low-rank adapter are such
    pairs (François & Ravera, arXiv 2602.18948; da Silva, Dangel & Oore, arXiv 2505.05409). Neither
    metric is complete under :meth:`retract`: rank may drop at the end of a step.

    Parameters
    ----------
    r, n, m : int
        Rows of both factors, columns of A and columns of B; r at most n and m.
    group : StructureGroup, optional
        ``GL(r)``, the default and so far the only group.
    metric : {"preconditioned", "right-invariant"}
        ``tr(B Bᵀ ξ_A η_Aᵀ) + tr(A Aᵀ ξ_B η_Bᵀ)``: each factor is measured by its effect on the
        product (Mishra et al. 2012); or ``tr((A Aᵀ)^{-1} ξ_A η_Aᵀ) + tr((B Bᵀ)^{-1} ξ_B η_Bᵀ)``:
        relative to itself (Mishra et al. 2014). Both are GL(r)-invariant.
    batch_shape : sequence of int
        Leading dimensions of every tensor.
    check : bool
        Whether to look for non-finite entries and rank deficiency, which waits for the device.

    Raises
    ------
    ValueError
        On sizes that do not fit, or a group or metric that is not available.
    """

    def __init__(
        self,
        r: int,
        n: int,
        m: int,
        *,
        group: StructureGroup | None = None,
        metric: str = "preconditioned",
        batch_shape: Sequence[int] = (),
        check: bool = True,
    ) -> None:
        self.r, self.n, self.m = check_size("r", r), check_size("n", n), check_size("m", m)
        if r > n or r > m:
            raise ValueError(f"full row rank needs r <= n and r <= m, got {r = }, {n = }, {m = }")
        self.group = GL(r) if group is None else group
        if self.group != GL(r):
            raise ValueError(f"group {self.group!r} is not available yet, only GL({r})")
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not available yet, only {tuple(METRICS)}")
        self._metric = METRICS[metric]
        self.batch_shape = check_batch_shape(batch_shape)
        self.check = check

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self._metric.name

    @property
    def dim(self) -> int:
        """r(n + m − r), of one batch item."""
        return self.r * (self.n + self.m - self.r)

    def check_point(self, x: Pair) -> None:
        factorize(self._pair("x", x))

    def check_tangent(self, x: Pair, u: Pair, *, tolerance: float | None = None) -> None:
        point, wide_u = self._factorize(x), self._pair("u", u)
        if tolerance is not None:
            vertical = self._metric_norm(point, self._vertical(point, wide_u))
            if bool((vertical > tolerance * self._metric_norm(point, wide_u)).any()):
                raise ValueError(f"u is not horizontal: vertical part {vertical.max().item():.1e}")

    def random_point(
        self,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Pair:
        dtype = random_dtype(dtype)
        A, B = self._standard_normal(generator, device)
        return A.to(dtype), B.to(dtype)

    def random_tangent(self, x: Pair, *, generator: torch.Generator | None = None) -> Pair:
        point = self._factorize(x)
        u = self._horizontal(point, self._standard_normal(generator, point.A.device))
        norm = self._metric_norm(point, u)[..., None, None]
        return self._like(x, (u[0] / norm, u[1] / norm))

    def inner(self, x: Pair, u: Pair, v: Pair) -> Tensor:
        point = self._factorize(x)
        return self._metric.inner(point, self._pair("u", u), self._pair("v", v)).to(x[0].dtype)

    def canonical_projection(self, x: Pair) -> Tensor:
        """``Aᵀ B``, of shape (*batch_shape, n, m). Dense: for inspection and small problems."""
        A, B = self._pair("x", x)
        return (A.mT @ B).to(x[0].dtype)

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """``u_Aᵀ B + Aᵀ u_B``, of shape (*batch_shape, n, m). Dense."""
        (A, B), (u_A, u_B) = self._pair("x", x), self._pair("u", u)
        return (u_A.mT @ B + A.mT @ u_B).to(x[0].dtype)

    def vertical_vector(self, x: Pair, algebra_element: Tensor) -> Pair:
        """``(−Λᵀ A, Λ B)`` for an r×r matrix Λ, of shape (*batch_shape, r, r)."""
        A, B = self._pair("x", x)
        Lambda = self._tensor("algebra_element", algebra_element, self.r, self.r)
        return self._like(x, (-Lambda.mT @ A, Lambda @ B))

    def vertical_component(self, x: Pair, u: Pair) -> Pair:
        """``(−M A, Mᵀ B)``, what :meth:`horizontal_component` removes."""
        return self._like(x, self._vertical(self._factorize(x), self._pair("u", u)))

    def horizontal_component(self, x: Pair, u: Pair) -> Pair:
        """``(u_A + M A, u_B − Mᵀ B)`` with an r×r matrix M that depends on the metric.

        Preconditioned: ``M = ½ [(B Bᵀ)^{-1} B u_Bᵀ − u_A Aᵀ (A Aᵀ)^{-1}]``. Right-invariant: the
        solution of ``M S + S M = A Aᵀ B u_Bᵀ − u_A Aᵀ B Bᵀ`` with ``S = A Aᵀ B Bᵀ``, by Cholesky
        and a symmetric eigendecomposition.
        """
        return self._like(x, self._horizontal(self._factorize(x), self._pair("u", u)))

    def horizontal_lift(self, x: Pair, base_tangent: Tensor) -> Pair:
        """The horizontal u with ``u_Aᵀ B + Aᵀ u_B = Ġ``, the n×m `base_tangent`.

        The particular solution ``((B Bᵀ)^{-1} B Ġᵀ, (A Aᵀ)^{-1} A Ġ (I − Bᵀ (B Bᵀ)^{-1} B))``,
        projected.
        """
        point = self._factorize(x)
        G = self._tensor("base_tangent", base_tangent, self.n, self.m)
        lift_A = point.solve_B(point.B @ G.mT)
        image = point.solve_A(point.A @ G)
        lift_B = image - (image @ point.B.mT) @ point.solve_B(point.B)
        return self._like(x, self._horizontal(point, (lift_A, lift_B)))

    def gradient(self, x: Pair, euclidean_gradient: Pair) -> Pair:
        """``((B Bᵀ)^{-1} ∂_A, (A Aᵀ)^{-1} ∂_B)``; right-invariant: ``(A Aᵀ ∂_A, B Bᵀ ∂_B)``.

        Horizontal by itself if the function is invariant; no projection is applied.
        """
        partials = self._pair("euclidean_gradient", euclidean_gradient)
        return self._like(x, self._metric.gradient(self._factorize(x), partials))

    def hessian(self, x: Pair, euclidean_gradient: Pair, euclidean_hessian: Pair, u: Pair) -> Pair:
        """Horizontal part of ``D grad[u] + Γ(grad, u)``, Γ the Christoffel form of the metric."""
        point, direction = self._factorize(x), self._pair("u", u)
        partials = self._pair("euclidean_gradient", euclidean_gradient)
        second = self._pair("euclidean_hessian", euclidean_hessian)
        derivative = self._metric.gradient_derivative(point, partials, second, direction)
        gradient = self._metric.gradient(point, partials)
        Gamma = self._metric.christoffel(point, gradient, direction)
        covariant = derivative[0] + Gamma[0], derivative[1] + Gamma[1]
        return self._like(x, self._horizontal(point, covariant))

    def retract(self, x: Pair, u: Pair) -> Pair:
        (A, B), (u_A, u_B) = self._pair("x", x), self._pair("u", u)
        return self._like(x, (A + u_A, B + u_B))

    def retract_second_order(self, x: Pair, u: Pair) -> Pair:
        """``x + u − ½ Γ(u, u)``, the geodesic up to third order, for horizontal u."""
        point, (u_A, u_B) = self._factorize(x), self._pair("u", u)
        Gamma_A, Gamma_B = self._metric.christoffel(point, (u_A, u_B), (u_A, u_B))
        return self._like(x, (point.A + u_A - Gamma_A / 2, point.B + u_B - Gamma_B / 2))

    def act(self, g: Tensor, x: Pair) -> Pair:
        """``(g^{-T} A, g B)``; tangent vectors are moved by the same formula."""
        A, B = self._pair("x", x)
        wide_g = self._tensor("g", g, self.r, self.r)
        return self._like(x, self.group.act(wide_g, (A, B)))

    def align(self, x: Pair, y: Pair) -> tuple[Pair, Tensor]:
        """The representative of x's orbit closest to `y`, closeness measured in y's balanced gauge.

        Both pairs are dressed by the balanced section; the balanced representatives of an orbit
        differ by O(r), and the rotation O that brings the dressed x nearest to the dressed y is a
        Procrustes problem of size r×r: ``g = g_y^{-1} O g_x``. If both lie on one orbit the result
        is `y`. Invariant under a change of x's representative, equivariant under one of y's.
        """
        (A, B), y_point = self._pair("x", x), self._factorize(y)
        x_point = self._factorize(x)
        g_x, contra_x = sections.balanced_element(x_point.SA, x_point.SB, check=self.check)
        g_y, contra_y = sections.balanced_element(y_point.SA, y_point.SB, check=self.check)
        dressed_A, dressed_B = contra_x @ A, g_x @ B
        overlap = contra_y @ y_point.A @ dressed_A.mT + g_y @ y_point.B @ dressed_B.mT
        rotation = orthogonal_polar_factor(overlap)
        # g_y and its inverse transpose are symmetric, hence inverse to each other.
        aligned = self._like(x, (g_y @ rotation @ dressed_A, contra_y @ rotation @ dressed_B))
        return aligned, (contra_y @ rotation @ g_x).to(compute_dtype(x[0].dtype))

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """``‖A₁ᵀ B₁ − A₂ᵀ B₂‖_F``, without n×m matrices and without cancellation.

        The difference is ``[A₁; A₂]ᵀ [B₁; −B₂]``; with the triangular factors of QR decompositions
        of both transposed stacks its norm is ``‖R_A R_Bᵀ‖_F``. Not differentiable by autograd.
        """
        (A1, B1), (A2, B2) = self._pair("x", x), self._pair("y", y)
        _, R_A = torch.linalg.qr(torch.cat((A1, A2), dim=-2).mT, mode="r")
        _, R_B = torch.linalg.qr(torch.cat((B1, -B2), dim=-2).mT, mode="r")
        return torch.linalg.matrix_norm(R_A @ R_B.mT).to(x[0].dtype)

    def section(self, x: Pair, kind: str = "svd") -> tuple[Pair, Tensor]:
        """See :func:`quotientopt.sections.section`.

        Parameters
        ----------
        x : tuple of Tensor
        kind : {"svd", "balanced", "orthonormal", "triangular"}
        """
        self._pair("x", x)
        return sections.section(kind, *x, check=self.check)

    def _standard_normal(
        self, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Pair:
        A = standard_normal((*self.batch_shape, self.r, self.n), generator=generator, device=device)
        B = standard_normal((*self.batch_shape, self.r, self.m), generator=generator, device=device)
        return A, B

    def _horizontal(self, x: FactorPoint, u: Pair) -> Pair:
        M = self._metric.multiplier(x, u)
        return u[0] + M @ x.A, u[1] - M.mT @ x.B

    def _vertical(self, x: FactorPoint, u: Pair) -> Pair:
        M = self._metric.multiplier(x, u)
        return -M @ x.A, M.mT @ x.B

    def _metric_norm(self, x: FactorPoint, u: Pair) -> Tensor:
        return self._metric.inner(x, u, u).sqrt()

    def _factorize(self, x: Pair) -> FactorPoint:
        return factorize(self._pair("x", x), check=self.check)

    def _pair(self, name: str, pair: Pair) -> Pair:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair (A, B) of tensors, got {type(pair).__name__}")
        return (
            self._tensor(f"{name}[0]", pair[0], self.r, self.n),
            self._tensor(f"{name}[1]", pair[1], self.r, self.m),
        )

    def _tensor(self, name: str, tensor: Tensor, rows: int, columns: int) -> Tensor:
        shape = (*self.batch_shape, rows, columns)
        return wide_tensor(name, tensor, shape, check=self.check)

    @staticmethod
    def _like(x: Pair, pair: Pair) -> Pair:
        return pair[0].to(x[0].dtype), pair[1].to(x[1].dtype)

    def __repr__(self) -> str:
        return (
            f"FactorQuotient({self.r}, {self.n}, {self.m}, group={self.group!r}, "
            f"metric={self.metric!r}, batch_shape={self.batch_shape})"
        )
