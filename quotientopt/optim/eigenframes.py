"""Eigenframes: orthonormal coordinates that follow a covariance of dressed gradients.

The first ones are eigenvectors, their ties broken by Grams of the weights (:func:`break_ties`);
where a frame turns all the time, later ones take a step of orthogonal iteration
(:func:`next_eigenframe`). (Vyas et al., arXiv 2409.11321.) Then those of each kind: residual,
heads, hidden units, embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt.groups import PlaneCommutant, RotaryCommutant, StructureGroup

TIE_BREAK = 1e-3
# Relative to the mean eigenvalue.
SHIFT = 1e-3
# Both frames of a matrix come from its first gradient, which they would make diagonal: Adam would
# divide the other entries by their own rounding. A tenth of the weights keeps them away from zero.
ROW_TIES = 100.0


def trace_normalised(matrix: Tensor) -> Tensor:
    """``matrix`` over its trace, so that eigen-decompositions see numbers of order one."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return matrix / trace.clamp_min(torch.finfo(matrix.dtype).tiny)


def break_ties(covariance: Tensor, *weights_grams: Tensor, times: float = 1.0) -> Tensor:
    """Trace-normalised covariance of dressed gradients, plus a little of the dressed weights'.

    The covariance is singular early on and where fewer gradients than directions were seen; there
    its eigenvectors would be rounding noise. Grams of weights break the ties by something that
    transforms the same way; together they must have full rank.
    """
    broken = trace_normalised(covariance)
    for gram in weights_grams:
        broken = broken.add_(trace_normalised(gram), alpha=times * TIE_BREAK)
    return broken


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
    """Q of the QR decomposition with positive diagonal, of ``(…, n, d)`` matrices of full rank.

    Columns of zeros stay zero, NaN gives NaN. On accelerators by Cholesky's decomposition of Gram
    matrices, which is batched there as Householder's reflections are not.
    """
    if matrix.device.type == "cpu":
        Q, R = torch.linalg.qr(matrix)
        return Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return orthonormalise_by_cholesky(matrix)


def orthonormalise_by_cholesky(matrix: Tensor) -> Tensor:
    """The same as :func:`orthonormalise`, by Cholesky's decomposition of Grams, in its own dtype.

    Shifted Cholesky-QR (Fukaya et al. 2020): from columns of norm one, twice ``X ← X L⁻ᵀ`` with
    ``L Lᵀ = XᵀX + s``, s of the size of the rounding of XᵀX, which leaves it positive and takes
    small singular values up by a factor of s^{-1/2}, then once without s. A product of triangular
    matrices is triangular, so that it is the Q of the QR decomposition. float64, of which consumer
    GPUs make a sixty-fourth as much, is not needed.
    """
    norms = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    absent = (norms == 0).to(matrix)
    columns = matrix / (norms + absent)
    shift = 4 * matrix.size(-2) * torch.finfo(matrix.dtype).eps
    for added in (shift, shift, 0.0):
        gram = columns.mT @ columns
        gram.diagonal(dim1=-2, dim2=-1).add_(absent[..., 0, :] + added)
        factor = torch.linalg.cholesky_ex(gram).L
        columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
    return columns


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


def residual_eigenframes(
    covariance: Tensor,
    frame: Tensor,
    weights_gram: Tensor | None,
    pooled_gram: Tensor | None,
    oriented: Sequence[bool],
) -> Tensor:
    """Residual frames that follow their covariances, first ones where there is none yet.

    Parameters
    ----------
    covariance, frame : Tensor
        R, and the frames before, ``(L, d, d)``.
    weights_gram, pooled_gram : Tensor, optional
        As in :func:`residual_eigenframe`; needed where a frame is new.
    oriented : sequence of bool
        Which of them have a frame.
    """
    turned = next_eigenframe(covariance, frame) if any(oriented) else frame
    if weights_gram is None or pooled_gram is None:
        return turned
    first = residual_eigenframe(covariance, weights_gram, pooled_gram)
    return torch.where(torch.tensor(oriented, device=frame.device)[:, None, None], turned, first)


def head_eigenframe(group: StructureGroup, covariance: Tensor, weights_gram: Tensor) -> Tensor:
    """Rows are eigenvectors of the dressed gradient covariance, its ties broken by the weights.

    They fix the rotation O that a section leaves over.

    Parameters
    ----------
    group : StructureGroup
        For a RotaryCommutant the rotated planes stay as they are (the second moment is taken per
        complex entry there), and only the rows that pass get eigenvectors. Planes that share a
        frequency are turned to the complex eigenvectors of the hermitian part.
    covariance, weights_gram : Tensor
        Σ u∂ (u∂)ᵀ and the Gram of the dressed factor, symmetric, shape ``(…, r, r)``.
    """
    pooled = break_ties(covariance, weights_gram)
    if isinstance(group, PlaneCommutant):
        parts, block = group.parts(pooled)
        parts = [torch.linalg.eigh(part).eigenvectors.mH for part in parts]
        return group.element(parts, torch.linalg.eigh(block).eigenvectors.mT)
    if not isinstance(group, RotaryCommutant):
        return torch.linalg.eigh(pooled).eigenvectors.mT
    frame = torch.eye(group.r, dtype=pooled.dtype, device=pooled.device)
    frame = frame.repeat(*pooled.shape[:-2], 1, 1)
    if len(group.pass_rows):
        rows = torch.as_tensor(group.pass_rows, device=pooled.device)
        passing = pooled[..., rows[:, None], rows]
        frame[..., rows[:, None], rows] = torch.linalg.eigh(passing).eigenvectors.mT
    return frame


def hidden_eigenframes(
    covariance: Tensor, frame: Tensor, norms: Tensor | None, new: Sequence[bool]
) -> Tensor:
    """Frames of hidden units, columns orthonormal, that follow the covariance of their gradients.

    The first ones are eigenvectors of the covariance and a tenth of the units' squared norms, which
    permutations of the units move along and rotations of the stream leave; later ones take one
    step of orthogonal iteration.

    Parameters
    ----------
    covariance, frame : Tensor
        Of ∂∂ᵀ, and the frames before, ``(L, rows, rows)``.
    norms : Tensor, optional
        Squared norms of the units' weights, ``(L, rows)``; needed where a frame is new.
    new : sequence of bool
        Which of them have no frame yet.
    """
    turned = frame if all(new) else next_eigenframe(covariance, frame)
    if norms is None:
        return turned
    ties = break_ties(covariance, norms.diag_embed(), times=ROW_TIES)
    first = torch.linalg.eigh(ties).eigenvectors
    return torch.where(
        torch.tensor(new, device=frame.device)[:, None, None], first.flip(-1), turned
    )


def embedding_frames(
    frame: Tensor, weights_gram: Tensor, pooled_gram: Tensor, oriented: Sequence[bool]
) -> Tensor:
    """Frames of embeddings, made once: eigenvectors of the weights' Gram where there is none.

    Each token's gradient is sparse in time and tells no frame; Adam needs any coordinates that
    rotate with the stream.
    """
    first = torch.linalg.eigh(break_ties(weights_gram, pooled_gram)).eigenvectors
    return torch.where(torch.tensor(oriented, device=frame.device)[:, None, None], frame, first)


def rotate_(frame: Tensor, covariance: Tensor | None, rotation: Tensor) -> None:
    """Move a residual frame and covariance along with ``W ↦ W Oᵀ``: Q ↦ O Q, R ↦ O R Oᵀ."""
    rotation = rotation.to(frame)
    frame.copy_(rotation @ frame)
    if covariance is not None:
        covariance.copy_(rotation @ covariance @ rotation.mT)
