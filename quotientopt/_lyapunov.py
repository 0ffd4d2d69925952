"""Lyapunov equations and polar factors with derivatives that do not mind equal eigenvalues.

Both are computed from spectral decompositions but are smooth where eigenvalues coincide, so their
derivatives are written down here instead of being taken through the decompositions, which divide by
the gaps.
"""

from typing import Any

import torch
from torch import Tensor


class _Lyapunov(torch.autograd.Function):
    """Y with ``P Y + Y P = C``, given the eigenvalues and eigenvectors of P."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, C: Tensor, values: Tensor, basis: Tensor) -> Tensor:
        rotated = basis.mT @ C @ basis
        return basis @ (rotated / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ basis.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        P, _, values, basis = inputs
        ctx.save_for_backward(P, output, values, basis)
        ctx.save_for_forward(P, output, values, basis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The operator is self-adjoint; differentiating the equation gives the part of P.
        P, Y, values, basis = ctx.saved_tensors
        Z = _Lyapunov.apply(P, gradients[0], values, basis)
        return -(Z @ Y.mT + Y.mT @ Z), Z, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        P, Y, values, basis = ctx.saved_tensors
        dP, dC = tangents[0], tangents[1]
        change = torch.zeros_like(Y) if dC is None else dC
        if dP is not None:
            change = change - dP @ Y - Y @ dP
        return _Lyapunov.apply(P, change, values, basis)


class _PolarFactor(torch.autograd.Function):
    """``Q = U Vᵀ`` of a square matrix M, given the SVD ``M = U Σ Vᵀ``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, U: Tensor, values: Tensor, Vt: Tensor) -> Tensor:
        return U @ Vt

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        M, _, values, Vt = inputs
        ctx.save_for_backward(M, output, values, Vt)
        ctx.save_for_forward(M, output, values, Vt)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # dQ = Q Y with P Y + Y P = Qᵀ dM − dMᵀ Q and P = Qᵀ M = V Σ Vᵀ.
        M, Q, values, Vt = ctx.saved_tensors
        Z = _Lyapunov.apply(Q.mT @ M, Q.mT @ gradients[0], values, Vt.mT)
        return Q @ (Z - Z.mT), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        M, Q, values, Vt = ctx.saved_tensors
        change = Q.mT @ tangents[0]
        return Q @ _Lyapunov.apply(Q.mT @ M, change - change.mT, values, Vt.mT)


def solve_lyapunov(P: Tensor, C: Tensor) -> Tensor:
    """The solution Y of ``P Y + Y P = C``, by an eigendecomposition of P.

    What :func:`scipy.linalg.solve_continuous_lyapunov` computes for symmetric P, batched, and
    differentiable to any order wherever P is positive definite.

    Parameters
    ----------
    P : Tensor, shape (*batch, r, r)
        Symmetric positive definite.
    C : Tensor, shape (*batch, r, r)
    """
    values, basis = torch.linalg.eigh(P.detach())
    return _Lyapunov.apply(P, C, values, basis)


def solve_paired_lyapunov(W: Tensor, C_right: Tensor, C_left: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions of ``WᵀW Y + Y WᵀW = C_right`` and ``WWᵀ Z + Z WWᵀ = C_left`` by one SVD of W.

    The SVD does not square the condition number of W.

    Parameters
    ----------
    W, C_right, C_left : Tensor, shape (*batch, r, r)
        W is invertible.
    """
    U, values, Vt = torch.linalg.svd(W.detach())
    squares = values.square()
    right = _Lyapunov.apply(W.mT @ W, C_right, squares, Vt.mT)
    return right, _Lyapunov.apply(W @ W.mT, C_left, squares, U)


def orthogonal_polar_factor(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square one: ``U Vᵀ`` of its SVD ``U Σ Vᵀ``.

    Differentiable to any order where the matrix is invertible, equal singular values included.
    """
    U, values, Vt = torch.linalg.svd(matrix.detach())
    return _PolarFactor.apply(matrix, U, values, Vt)
