"""The quotient of factor pairs by a structure group: attention circuits and low-rank adapters."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from quotientopt._linalg import Pair, compute_dtype, standard_normal, wide
from quotientopt.groups import GL, O, StructureGroup
from quotientopt.manifolds.base import (
    QuotientManifold,
    check_batch_shape,
    check_group_element,
    check_size,
    check_tensor,
    random_dtype,
)
from quotientopt.manifolds.factor_geometry import FactorGeometry, in_blocks
from quotientopt.manifolds.nearest import nearest_element, relative_charge

# Of the charge over its size, beyond which a representative is not taken for the nearest one.
NEAREST = 1e-6


class FactorQuotient(QuotientManifold[Pair]):
    """Pairs (A, B) modulo ``(A, B) ~ (g^{-T} A, g B)`` for g in a structure group G ≤ GL(r).

    A is r×n, B is r×m. Query and key weights of an attention head, its value and output weights and
    the factors of a low-rank adapter are such pairs (François & Ravera, arXiv 2602.18948; da Silva,
    Dangel & Oore, arXiv 2505.05409). The group decides what names an orbit, and which pairs are
    points:

    ==================== ============================================= =========================
    group                invariants                                    points
    ==================== ============================================= =========================
    ``GL(r)``            ``Aᵀ B``, n×m of rank r                       A and B of full row rank
    ``RotaryCommutant``  ``aᴴ b``, n×m complex of rank 1, for the      no complex row vanishes,
                         complex rows a, b of every plane, and         the passing rows have
                         ``Aᵀ B`` of the passing rows                  full rank
    ``O(r)``             ``[A B]ᵀ [A B]``, (n + m)×(n + m) of rank r   A and B of full row rank;
                                                                       metric "euclidean": [A B]
    ==================== ============================================= =========================

    The dimension is r(n + m) less that of the group: r(n + m − r) for GL(r). No metric is complete
    under :meth:`retract`: rank may drop at the end of a step.

    Parameters
    ----------
    r, n, m : int
        Rows of both factors, columns of A and columns of B.
    group : GL, RotaryCommutant or O, optional
        The structure group; ``GL(r)`` by default.
    metric : {"preconditioned", "right-invariant", "euclidean"}
        ``tr(S_B ξ_A η_Aᵀ) + tr(S_A ξ_B η_Bᵀ)``: each factor is measured by its effect on the
        product (Mishra et al. 2012); ``tr(S_A^{-1} ξ_A η_Aᵀ) + tr(S_B^{-1} ξ_B η_Bᵀ)``: relative to
        itself (Mishra et al. 2014); or ``tr(ξ_A η_Aᵀ) + tr(ξ_B η_Bᵀ)``, for O(r) only. Here
        ``S_A = A Aᵀ`` and ``S_B = B Bᵀ``; for a rotary commutant the Gram matrix of the passing
        rows and the squared lengths of the complex rows of the planes, which is the product of the
        metrics of all planes. Each metric is invariant under the group it may be used with.
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
        self.group = GL(r) if group is None else group
        self._geometry = FactorGeometry(self.group, metric, check=check)
        self._orbits = self._geometry.orbits
        if self.group.r != r:
            raise ValueError(f"group {self.group!r} does not act on factors of {r} rows")
        self._orbits.check_columns(n, m, metric)
        self.batch_shape = check_batch_shape(batch_shape)

    @property
    def check(self) -> bool:
        """Whether non-finite entries and rank deficiency are looked for."""
        return self._geometry.check

    @check.setter
    def check(self, check: bool) -> None:
        self._geometry.check = check

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self._geometry.metric.name

    @property
    def dim(self) -> int:
        """r(n + m) less the dimension of the group, of one batch item."""
        return self.r * (self.n + self.m) - self.group.dim

    @property
    def section_kinds(self) -> tuple[str, ...]:
        """The kinds that :meth:`section` knows for the group."""
        return self._orbits.sections

    def check_point(self, x: Pair) -> None:
        self._geometry.point(self._pair("x", x), check=True)

    def check_tangent(self, x: Pair, u: Pair, *, tolerance: float | None = None) -> None:
        if tolerance is None:
            self._pair("u", u)
            self._geometry.point(self._point(x))
            return
        size, vertical = self._in_blocks(self._geometry.norms, x, u=u)
        if bool((vertical > tolerance * size).any()):
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
        u = self._standard_normal(generator, self._point(x)[0].device)
        return self._step(self._geometry.unit_horizontal, x, u=u)

    def inner(self, x: Pair, u: Pair, v: Pair) -> Tensor:
        return self._in_blocks(self._geometry.inner, x, u=u, v=v).to(x[0].dtype)

    def canonical_projection(self, x: Pair) -> Tensor:
        """The invariants that name the orbit. Dense: for inspection and small problems.

        Shapes, after `batch_shape`: (n, m) for GL(r), ``Aᵀ B``; (n + m, n + m) for O(r),
        ``[A B]ᵀ [A B]``; (K, n, m) for a rotary commutant: the real parts of ``aᴴ b`` of all
        planes, then their imaginary parts, then ``Aᵀ B`` of the passing rows if there are any.
        """
        return self._orbits.invariants(self._wide_pair("x", x)).to(x[0].dtype)

    def differential(self, x: Pair, u: Pair) -> Tensor:
        """Derivative of the invariants, for GL(r) ``u_Aᵀ B + Aᵀ u_B``. Dense."""
        pair, vector = self._wide_pair("x", x), self._wide_pair("u", u)
        return self._orbits.differential(pair, vector).to(x[0].dtype)

    def vertical_vector(self, x: Pair, algebra_element: Tensor) -> Pair:
        """``(−Λᵀ A, Λ B)`` for an r×r matrix Λ, of shape (*batch_shape, r, r).

        Λ is projected to the Lie algebra of the group first.
        """
        A, B = self._wide_pair("x", x)
        Lambda = self._tensor("algebra_element", algebra_element, self.r, self.r)
        Lambda = self.group.algebra_projection(wide(Lambda))
        return self._like(x, (-Lambda.mT @ A, Lambda @ B))

    def vertical_component(self, x: Pair, u: Pair) -> Pair:
        """``(−Λᵀ A, Λ B)``, what :meth:`horizontal_component` removes."""
        return self._step(self._geometry.vertical, x, u=u)

    def horizontal_component(self, x: Pair, u: Pair) -> Pair:
        """``(u_A + Λᵀ A, u_B − Λ B)``, with the Λ in the Lie algebra that makes it horizontal.

        For GL(r), preconditioned: ``Λ = ½ [u_B Bᵀ S_B^{-1} − S_A^{-1} A u_Aᵀ]``; on the plane of a
        rotary commutant ``λ = ½ [h(b, u_b)/|b|² − conj(h(a, u_a))/|a|²]`` for both metrics. The
        other cases solve Lyapunov equations of size r, but for O(r) with the right-invariant
        metric, which solves a dense system in the r(r − 1)/2 unknowns of Λ: keep r below 32 there.
        """
        return self._step(self._geometry.horizontal, x, u=u)

    def horizontal_lift(self, x: Pair, base_tangent: Tensor) -> Pair:
        """The horizontal u with ``differential(x, u) = base_tangent``, of the invariants' shape."""
        shape = (*self.batch_shape, *self._orbits.invariant_shape(self.n, self.m))
        check_tensor("base_tangent", base_tangent, shape, check=self.check)
        return self._like(x, self._geometry.lift(self._point(x), base_tangent))

    def gradient(self, x: Pair, euclidean_gradient: Pair) -> Pair:
        """``(S_B^{-1} ∂_A, S_A^{-1} ∂_B)``; right-invariant: ``(S_A ∂_A, S_B ∂_B)``.

        Horizontal by itself if the function is invariant; no projection is applied.
        """
        return self._step(self._geometry.gradient, x, euclidean_gradient=euclidean_gradient)

    def hessian(self, x: Pair, euclidean_gradient: Pair, euclidean_hessian: Pair, u: Pair) -> Pair:
        """Horizontal part of ``D grad[u] + Γ(grad, u)``, Γ the Christoffel form of the metric."""
        return self._step(
            self._geometry.hessian,
            x,
            euclidean_gradient=euclidean_gradient,
            euclidean_hessian=euclidean_hessian,
            u=u,
        )

    def retract(self, x: Pair, u: Pair) -> Pair:
        # One addition is rounded correctly in any precision.
        (A, B), (u_A, u_B) = self._pair("x", x), self._pair("u", u)
        return self._like(x, (A + u_A, B + u_B))

    def retract_second_order(self, x: Pair, u: Pair) -> Pair:
        """``x + u − ½ Γ(u, u)``, the geodesic up to third order, for horizontal u."""
        return self._step(self._geometry.second_order_step, x, u=u)

    def geodesic(self, x: Pair, u: Pair, t: float | Tensor) -> Pair:
        """``x + t u`` for horizontal u: a geodesic of the Euclidean metric while the rank stays r.

        Raises
        ------
        ValueError
            For the other metrics, whose geodesics have no closed form.
        """
        self._require_closed_geodesics("geodesic")
        (A, B), (u_A, u_B) = self._wide_pair("x", x), self._wide_pair("u", u)
        t = torch.as_tensor(t, device=A.device).to(A.dtype)[..., None, None]
        return self._like(x, (A + t * u_A, B + t * u_B))

    def exp(self, x: Pair, u: Pair) -> Pair:
        """The exponential map of the Euclidean metric at horizontal u, ``x + u``; see geodesic."""
        self._require_closed_geodesics("exp")
        return self.retract(x, u)

    def log(self, x: Pair, y: Pair) -> Pair:
        """The horizontal u of least norm with ``exp(x, u)`` in y's orbit, for the Euclidean metric.

        ``Q y − x`` with the rotation Q that brings y closest to x.
        """
        self._require_closed_geodesics("log")
        (A, B), other = self._wide_pair("x", x), self._wide_pair("y", y)
        Q, _ = self._orbits.aligning_element(other, (A, B), check=self.check)
        return self._like(x, (Q @ other[0] - A, Q @ other[1] - B))

    def act(self, g: Tensor, x: Pair) -> Pair:
        """``(g^{-T} A, g B)``; tangent vectors are moved by the same formula."""
        pair = self._pair("x", x)
        self._tensor("g", g, self.r, self.r)
        if self.check:
            check_group_element(self.group, g)
        return self.group.act(g, pair)

    def align(self, x: Pair, y: Pair, *, return_charge: bool = False) -> Any:
        """The representative of x's orbit closest to `y` in Frobenius norm, and the g to it.

        For O(r) by orthogonal Procrustes. For the other groups by Newton's method on the group,
        from the start that :meth:`align_balanced` gives, to where the charge of the difference,
        ``Δ_B Bᵀ − A Δ_Aᵀ`` in the Lie algebra, vanishes: the difference is then orthogonal to the
        orbit. Of the minima found in both components of GL the nearer one, never further than the
        start; if both pairs lie on one orbit the result is `y`. It does not depend on the
        representative of x; under one of y's it is equivariant where the group element is
        orthogonal, since others change lengths. g is a constant for autograd.

        Parameters
        ----------
        x, y : tuple of Tensor
        return_charge : bool
            Return the norm of that charge over ``‖A Aᵀ‖ + ‖B Bᵀ‖`` as well, of shape `batch_shape`:
            the certificate, about 1e-13.

        Warns
        -----
        RuntimeWarning
            Where Newton's method ended before the charge was below 1e-6: the result is nearer than
            that of :meth:`align_balanced`, but not the nearest. Pairs whose singular values are
            spread over orders of magnitude, or a y far larger than x, may be such.
        """
        pair, other = self._aligned_input(x, y)
        g, contragredient = self._orbits.aligning_element(pair, other, check=self.check)
        if not isinstance(self.group, O):
            g, contragredient, certificate = nearest_element(
                self.group, pair, other, (g, contragredient)
            )
            if bool((certificate > NEAREST).any()):
                warnings.warn(
                    "align: the nearest representative was not reached, the charge of the "
                    f"difference is {certificate.max().item():.0e} of its size (return_charge=True "
                    "returns it)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        wide_pair = contragredient @ pair[0], g @ pair[1]
        result = self._like(x, wide_pair), g.to(compute_dtype(x[0].dtype))
        if not return_charge:
            return result
        charge = relative_charge(self.group, wide_pair, other)
        return (*result, charge.to(compute_dtype(x[0].dtype)))

    def align_balanced(self, x: Pair, y: Pair) -> tuple[Pair, Tensor]:
        """A representative of x's orbit near `y` in closed form, and the g that leads to it.

        Both pairs are dressed by the balanced section, whose representatives of one orbit differ by
        the compact part of the group (O(r); a phase for every plane and O on the passing rows), and
        the k that brings the dressed x nearest to the dressed y is found there (Procrustes):
        ``g = g_y^{-1} k g_x``. If both lie on one orbit the result is `y`. Invariant under a change
        of x's representative, equivariant under one of y's, and differentiable; it lies further
        from y than :meth:`align`, by 3 to 20 % for unrelated pairs. For O(r) the same as
        :meth:`align`.
        """
        pair, other = self._aligned_input(x, y)
        g, contragredient = self._orbits.aligning_element(pair, other, check=self.check)
        aligned = self._like(x, (contragredient @ pair[0], g @ pair[1]))
        return aligned, g.to(compute_dtype(x[0].dtype))

    def _aligned_input(self, x: Pair, y: Pair) -> tuple[Pair, Pair]:
        pair, other = self._wide_pair("x", x), self._wide_pair("y", y)
        if self.check:
            self.check_point(x)
            self.check_point(y)
        return pair, other

    def distance(self, x: Pair, y: Pair) -> Tensor:
        """A distance between orbits: zero exactly if `x` and `y` lie on one. It ignores the metric.

        For GL(r) ``‖A₁ᵀ B₁ − A₂ᵀ B₂‖_F``, for a rotary commutant the root of the sum of squares of
        such norms over the products of all planes and of the passing rows: the Frobenius norm of
        the difference of :meth:`canonical_projection`, without n×m matrices and without
        cancellation. For O(r) ``min_Q (‖Q A₁ − A₂‖² + ‖Q B₁ − B₂‖²)^{1/2}``, the Bures–Wasserstein
        distance of the Gram matrices ``[A B]ᵀ [A B]`` and the geodesic distance of the Euclidean
        metric.

        Differentiable by autograd to any order. At zero, where it has no derivative, and where it
        is zero to working precision, the gradient is taken to be zero.
        """
        pair, other = self._wide_pair("x", x), self._wide_pair("y", y)
        return self._orbits.distance(pair, other).to(x[0].dtype)

    @overload
    def section(
        self,
        x: Pair,
        kind: str = ...,
        *,
        return_gap: Literal[False] = ...,
        warn_below: float | None = ...,
    ) -> tuple[Pair, Tensor]: ...

    @overload
    def section(
        self,
        x: Pair,
        kind: str = ...,
        *,
        return_gap: Literal[True],
        warn_below: float | None = ...,
    ) -> tuple[Pair, Tensor, Tensor]: ...

    @overload
    def section(
        self, x: Pair, kind: str = ..., *, return_gap: bool, warn_below: float | None = ...
    ) -> Any: ...

    def section(
        self,
        x: Pair,
        kind: str = "svd",
        *,
        return_gap: bool = False,
        warn_below: float | None = None,
    ) -> Any:
        """A canonical representative of x's orbit, and the g that leads to it.

        See :func:`quotientopt.sections.section` for GL(r),
        :func:`~quotientopt.sections.rotary_section` for rotary commutants and
        :func:`~quotientopt.sections.orthogonal_section` for O(r).

        Parameters
        ----------
        x : tuple of Tensor
        kind : {"svd", "balanced", "orthonormal", "triangular"}, for O(r) {"svd", "polar"}
        return_gap, warn_below
            See :meth:`QuotientManifold.section`.
        """
        if kind not in self.section_kinds:
            raise ValueError(
                f"section must be one of {self.section_kinds} for {self.group!r}, got {kind!r}"
            )
        self._pair("x", x)
        return self._orbits.section(
            kind, x, check=self.check, return_gap=return_gap, warn_below=warn_below
        )

    def _require_closed_geodesics(self, name: str) -> None:
        if self.metric != "euclidean":
            raise ValueError(
                f"{name} has no closed form for the metric {self.metric!r}, "
                "use retract_second_order or metric='euclidean' with group O(r)"
            )

    def _standard_normal(
        self, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Pair:
        A = standard_normal((*self.batch_shape, self.r, self.n), generator=generator, device=device)
        B = standard_normal((*self.batch_shape, self.r, self.m), generator=generator, device=device)
        return A, B

    def _step(self, function: Callable[..., Pair], x: Pair, **vectors: Pair) -> Pair:
        """A function of a point and vectors, its result rounded to the dtypes of the point."""

        def rounded(x: Pair, *vectors: Pair) -> Pair:
            return self._like(x, function(x, *vectors))

        return self._in_blocks(rounded, x, **vectors)

    def _in_blocks(self, function: Callable[..., Any], x: Pair, **vectors: Pair) -> Any:
        pairs = [self._pair(name, vector) for name, vector in vectors.items()]
        return in_blocks(function, self.batch_shape, self._point(x), *pairs)

    def _point(self, x: Pair) -> Pair:
        """A pair that is going to be factorised, which finds what is not finite."""
        return self._pair("x", x, check=False)

    def _wide_pair(self, name: str, pair: Pair) -> Pair:
        A, B = self._pair(name, pair)
        return wide(A), wide(B)

    def _pair(self, name: str, pair: Pair, *, check: bool | None = None) -> Pair:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair (A, B) of tensors, got {type(pair).__name__}")
        return (
            self._tensor(f"{name}[0]", pair[0], self.r, self.n, check=check),
            self._tensor(f"{name}[1]", pair[1], self.r, self.m, check=check),
        )

    def _tensor(
        self, name: str, tensor: Tensor, rows: int, columns: int, *, check: bool | None = None
    ) -> Tensor:
        shape = (*self.batch_shape, rows, columns)
        check_tensor(name, tensor, shape, check=self.check if check is None else check)
        return tensor

    @staticmethod
    def _like(x: Pair, pair: Pair) -> Pair:
        return pair[0].to(x[0].dtype), pair[1].to(x[1].dtype)

    def __repr__(self) -> str:
        return (
            f"FactorQuotient({self.r}, {self.n}, {self.m}, group={self.group!r}, "
            f"metric={self.metric!r}, batch_shape={self.batch_shape})"
        )
