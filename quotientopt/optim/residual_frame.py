"""Frames of the residual axis: eigenvectors of the covariance of dressed gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt.optim.averages import ema_, trace_normalised


def residual_eigenframe(covariance: Tensor, weights_gram: Tensor, tie_break: float) -> Tensor:
    """Columns are eigenvectors of a residual-axis covariance with its ties broken.

    The covariance of dressed gradients is singular early on and where a matrix has fewer rows
    than columns; there the eigenvectors would be rounding noise. Adding
    ``tie_break · WᵀW / ‖W‖²`` of the dressed weights to the trace-normalised covariance breaks the
    ties by something that transforms the same way.

    Parameters
    ----------
    covariance, weights_gram : Tensor
        Symmetric, shape ``(…, d, d)``.
    tie_break : float
        Weight of the second term.
    """
    pooled = trace_normalised(covariance).add(trace_normalised(weights_gram), alpha=tie_break)
    return torch.linalg.eigh(pooled).eigenvectors


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

    def add(self, gram: Tensor) -> None:
        """Pool the Gram of one bucket's dressed gradients in this step."""
        self._sum.add_(gram)

    def accumulate(self, beta: float) -> None:
        """Take the pooled Gram of this step into the covariance."""
        ema_(self.covariance, self._sum, beta)
        self._sum.zero_()

    def refresh(self, weights_gram: Tensor, tie_break: float) -> None:
        """Turn to the eigenvectors of the covariance."""
        frame = residual_eigenframe(self.covariance, weights_gram, tie_break)
        self.change = self.frame.mT @ frame
        self.frame.copy_(frame)
