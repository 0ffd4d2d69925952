"""Derivatives of the sections that do not mind equal singular values.

Singular vectors of equal or nearly equal singular values are determined up to a rotation among
themselves, and differentiating them divides by the gaps. Here the gaps enter in one place only, the
speed at which two axes turn into each other: with the matrix P of a small change in the axes
themselves, ``(P_ij + P_ji) / (σ_j − σ_i)`` for an SVD. Where ``|σ_j − σ_i| ≤ τ σ_1`` with the
tolerance τ, ``1 / (σ_j − σ_i)`` is replaced by ``(σ_j − σ_i) / (τ σ_1)²``: continuous at the
tolerance, zero at equality. The axes of such a block are then held (nearly) still, and whatever
else changes, the matrices that replace Σ in the block included, is exact. So the derivative of any
function that does not depend on the choice of axes in the block stays exact; that of a function
which does is finite.

Roots of positive definite matrices and polar factors are smooth everywhere; they are differentiated
through Lyapunov equations, without gaps.
"""

from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import _Lyapunov


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative gap below which derivatives are regularised: √ε, of float32 for half precision.

    Axes of two singular values are determined to about ε over the gap: below √ε not to half of
    the digits. 1.5e-8 for float64, 3.5e-4 for every other dtype.
    """
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps ** 0.5


def gap_reciprocals(values: Tensor, tolerance: float) -> Tensor:
    """``1 / (σ_j − σ_i)``, regularised below the tolerance; (*batch, r) -> (*batch, r, r).

    Parameters
    ----------
    values : Tensor
        Singular values in decreasing order.
    tolerance : float
        Relative to the largest.
    """
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    floor = tolerance * values.detach()[..., :1, None]
    floor = torch.where(floor > 0, floor, 1)
    wide_enough = gaps.abs() > floor
    # A constant below it: its slope 1 / floor², times what cancels, would drown all else.
    regularised = gaps.detach() / floor.square()
    return torch.where(wide_enough, 1 / torch.where(wide_enough, gaps, 1), regularised)


class _SVD(torch.autograd.Function):
    """``(U, σ, V)`` of an invertible square matrix ``W = U Σ Vᵀ``, given them.

    With ``P = Uᵀ dW V``: ``dU = U K_U``, ``dV = V K_V``, ``K_U + K_V = E ∘ (P + Pᵀ)`` and
    ``K_U − K_V = H ∘ (P − Pᵀ)``, where ``E_ij = 1/(σ_j − σ_i)`` and ``H_ij = 1/(σ_i + σ_j)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        W: Tensor, U: Tensor, values: Tensor, V: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return U.clone(), values.clone(), V.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.tolerance = inputs[4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        U, values, V = ctx.saved_tensors
        E, H = gap_reciprocals(values, ctx.tolerance), _sum_reciprocals(values)
        M_U, M_V = U.mT @ gradients[0], V.mT @ gradients[2]
        turning, shearing = E * (M_U + M_V), H * (M_U - M_V)
        inner = (turning + turning.mT + shearing - shearing.mT) / 2 + torch.diag_embed(gradients[1])
        return U @ inner @ V.mT, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, values, V = ctx.saved_tensors
        P = U.mT @ tangents[0] @ V
        turning = gap_reciprocals(values, ctx.tolerance) * (P + P.mT)
        shearing = _sum_reciprocals(values) * (P - P.mT)
        diagonal = P.diagonal(dim1=-2, dim2=-1).clone()
        return U @ (turning + shearing) / 2, diagonal, V @ (turning - shearing) / 2


class _PrincipalAxes(torch.autograd.Function):
    """``(σ, V)`` with ``S = V Σ² Vᵀ``, given them.

    With ``P = Vᵀ dS V``: ``2 σ_i dσ_i = P_ii`` (zero where σ_i is) and ``dV = V K``,
    ``K_ij = P_ij / (σ_j² − σ_i²)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor, values: Tensor, V: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        return values.clone(), V.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.tolerance = inputs[3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, V = ctx.saved_tensors
        turning = _squared_gap_reciprocals(values, ctx.tolerance) * (V.mT @ gradients[1])
        stretching = gradients[0] * _reciprocals(2 * values)
        inner = (turning + turning.mT) / 2 + torch.diag_embed(stretching)
        return V @ inner @ V.mT, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        values, V = ctx.saved_tensors
        P = V.mT @ tangents[0] @ V
        stretching = P.diagonal(dim1=-2, dim2=-1) * _reciprocals(2 * values)
        return stretching, V @ (_squared_gap_reciprocals(values, ctx.tolerance) * P)


class _SymmetricRoot(torch.autograd.Function):
    """The positive definite Y with ``Y² = S``, given its eigenvalues and eigenvectors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor, values: Tensor, basis: Tensor) -> Tensor:
        return basis @ (values.unsqueeze(-1) * basis.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1], inputs[2])
        ctx.save_for_forward(output, inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Y dY + dY Y = dS, and the operator is self-adjoint.
        return (
            _Lyapunov.apply(ctx.saved_tensors[0], gradients[0], *ctx.saved_tensors[1:]),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Lyapunov.apply(ctx.saved_tensors[0], tangents[0], *ctx.saved_tensors[1:])


class _Inverse(torch.autograd.Function):
    """``P^{-1}``, given it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, inverse: Tensor) -> Tensor:
        return inverse.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradients[0] @ inverse.mT), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse @ tangents[0] @ inverse)


def svd(W: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, σ, V)`` of invertible square matrices, differentiable at every gap.

    Parameters
    ----------
    W : Tensor, shape (*batch, r, r)
    tolerance : float, optional
        Relative gap below which the axes are held still; :func:`default_tolerance`.
    """
    U, values, Vt = torch.linalg.svd(W.detach())
    tolerance = default_tolerance(W.dtype) if tolerance is None else tolerance
    return _SVD.apply(W, U, values, Vt.mT, tolerance)


def principal_axes(S: Tensor, values: Tensor, V: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """σ and V of ``S = V Σ² Vᵀ`` as functions of S; their values are given.

    Parameters
    ----------
    S : Tensor, shape (*batch, r, r)
        Positive semidefinite.
    values : Tensor, shape (*batch, r)
        σ, in decreasing order, found without squaring where S is a Gram matrix. Where one is
        zero, it is a constant.
    V : Tensor, shape (*batch, r, r)
        Orthogonal.
    tolerance : float
        Relative gap below which the axes are held still.
    """
    return _PrincipalAxes.apply(S, values.detach(), V.detach(), tolerance)


def symmetric_root(S: Tensor, values: Tensor, basis: Tensor) -> Tensor:
    """The positive definite ``Y = Q diag(values) Qᵀ`` with ``Y² = S``, as a function of S.

    Differentiable to any order, coinciding eigenvalues included.

    Parameters
    ----------
    S : Tensor, shape (*batch, r, r)
        Positive definite.
    values, basis : Tensor, shapes (*batch, r) and (*batch, r, r)
        Eigenvalues of Y (not of S), and Q.
    """
    return _SymmetricRoot.apply(S, values.detach(), basis.detach())


def symmetric_polar(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``(FᵀF)^{1/2}`` and its inverse, by an SVD of F, which does not square its condition.

    Differentiable to any order where F has full column rank, equal singular values included.

    Parameters
    ----------
    factor : Tensor, shape (*batch, r, r)
    """
    _, values, Vt = torch.linalg.svd(factor.detach())
    root = symmetric_root(factor.mT @ factor, values, Vt.mT)
    return root, _Inverse.apply(root, Vt.mT @ (Vt / values.unsqueeze(-1)))


def _reciprocals(values: Tensor) -> Tensor:
    """``1 / x``, zero at zero."""
    zero = values == 0
    return torch.where(zero, 0, 1 / torch.where(zero, 1, values))


def _sum_reciprocals(values: Tensor) -> Tensor:
    """``1 / (σ_i + σ_j)``, zero where both vanish."""
    return _reciprocals(values.unsqueeze(-2) + values.unsqueeze(-1))


def _squared_gap_reciprocals(values: Tensor, tolerance: float) -> Tensor:
    """``1 / (σ_j² − σ_i²)``, regularised as :func:`gap_reciprocals`."""
    return gap_reciprocals(values, tolerance) * _sum_reciprocals(values)
