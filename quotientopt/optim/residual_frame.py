"""Frames of the residual axis: eigenvectors of the covariance of dressed gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt.optim.averages import break_ties, ema_


def residual_eigenframe(covariance: Tensor, weights_gram: Tensor) -> Tensor:
    """Columns are eigenvectors of a residual-axis covariance, its ties broken by the weights.

    Parameters
    ----------
    covariance, weights_gram : Tensor
        Σ (u∂)ᵀ(u∂) and WᵀW of the dressed weights, symmetric, shape ``(…, d, d)``.
    """
    return torch.linalg.eigh(break_ties(covariance, weights_gram)).eigenvectors


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

    def refresh(self, weights_gram: Tensor) -> None:
        """Turn to the eigenvectors of the covariance."""
        frame = residual_eigenframe(self.covariance, weights_gram)
        self.change = self.frame.mT @ frame
        self.frame.copy_(frame)
