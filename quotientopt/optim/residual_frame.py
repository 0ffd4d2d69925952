"""Frames of the residual axis: eigenvectors of the covariance of dressed gradients.

The first frame is an eigen-decomposition. Later ones follow the covariance by a step of orthogonal
iteration from the last frame, which is cheaper and needs nothing to break ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt.optim.averages import break_ties, ema_, trace_normalised

# Relative to the mean eigenvalue.
SHIFT = 1e-3


def residual_eigenframe(covariance: Tensor, weights_gram: Tensor, pooled_gram: Tensor) -> Tensor:
    """Columns are eigenvectors of a residual-axis covariance, its ties broken by the weights.

    Parameters
    ----------
    covariance, weights_gram : Tensor
        Σ (u∂)ᵀ(u∂) and WᵀW of the dressed weights, symmetric, shape ``(…, d, d)``.
    pooled_gram : Tensor
        WᵀW summed over all matrices of the stream, ``(d, d)``: a matrix with few rows leaves
        directions free that only the others tell apart.
    """
    return torch.linalg.eigh(break_ties(covariance, weights_gram, pooled_gram)).eigenvectors


def next_eigenframe(covariance: Tensor, frame: Tensor) -> Tensor:
    """One step of orthogonal iteration, Q ← orthonormalise((R + δ) Q), largest Rayleigh first.

    The shift δ, a thousandth of the mean eigenvalue, leaves directions without gradients as they
    are. Rotations of the axis go through: from O R Oᵀ and O Q comes O times the same. (Vyas et al.,
    arXiv 2409.11321, use the same iteration.)

    Parameters
    ----------
    covariance, frame : Tensor
        R and orthogonal Q, shape ``(…, d, d)``.
    """
    covariance = trace_normalised(covariance)
    image = covariance @ frame
    rayleigh = (frame * image).sum(-2, keepdim=True)
    order = rayleigh.argsort(dim=-1, descending=True, stable=True).expand_as(frame)
    image = image.add_(frame, alpha=SHIFT / frame.size(-1))
    return orthonormalise(image.gather(-1, order))


def orthonormalise(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition with positive diagonal, of invertible ``(…, d, d)`` matrices.

    On accelerators by Cholesky's decomposition of the Gram matrix in float64, which is batched
    there as Householder's reflections are not; one that fails gives NaN, as does a NaN.
    """
    if matrix.device.type == "cpu":
        Q, R = torch.linalg.qr(matrix)
        return Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return orthonormalise_by_cholesky(matrix)


def orthonormalise_by_cholesky(matrix: Tensor) -> Tensor:
    """The same as :func:`orthonormalise`, by Cholesky's decomposition."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    wide = wide / torch.linalg.vector_norm(wide, dim=-2, keepdim=True)
    factor = torch.linalg.cholesky_ex(wide.mT @ wide).L
    return torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.to(matrix.dtype)


def rotate_(frame: Tensor, covariance: Tensor, rotation: Tensor) -> None:
    """Move a residual frame and covariance along with ``W ↦ W Oᵀ``: Q ↦ O Q, R ↦ O R Oᵀ."""
    rotation = rotation.to(frame)
    frame.copy_(rotation @ frame)
    covariance.copy_(rotation @ covariance @ rotation.mT)


class SharedResidualFrame:
    """One residual frame for all matrices of a stream, from their pooled covariance.

    Attributes
    ----------
    covariance, frame, change : Tensor
        R, Q and Q_oldᵀ Q_new, each ``(d, d)``.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (dimension, dimension)
        self.covariance = torch.zeros(shape, dtype=dtype, device=device)
        self.frame = torch.zeros(shape, dtype=dtype, device=device)
        self.change = torch.zeros(shape, dtype=dtype, device=device)
        self._sum = torch.zeros(shape, dtype=dtype, device=device)
        self.oriented = False

    def add(self, gram: Tensor) -> None:
        """Pool the Gram of one bucket's dressed gradients in this step."""
        self._sum.add_(gram)

    def accumulate(self, beta: float, gate: Tensor | None = None) -> None:
        """Take the pooled Gram of this step into the covariance, unless the gate is zero."""
        ema_(self.covariance, self._sum, beta, gate)
        self._sum.zero_()

    def refresh(self, weights_gram: Tensor | None) -> None:
        """Turn to the eigenvectors of the covariance: the first time with the weights' Gram."""
        if weights_gram is None:
            frame = next_eigenframe(self.covariance, self.frame)
        else:
            frame = residual_eigenframe(self.covariance, weights_gram, weights_gram)
        self.oriented = True
        self.change = self.frame.mT @ frame
        self.frame.copy_(frame)
