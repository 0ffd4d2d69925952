"""A step from an update towards its polar factor."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd polynomial of degree 9 that is nearest to one on [0.1, 1] (largest error 0.26), by Lawson's
# algorithm; its slope at zero is 7.9, so that smaller singular values grow alike.
COEFFICIENTS = (7.9348, -56.0039, 166.6517, -202.4902, 85.1685)


def evening_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric P for which ``matrix @ P`` has nearly equal singular values.

    The polar factor of X = U Σ Vᵀ is U Vᵀ = X (XᵀX)^{-1/2}. Here X P = U p(Σ/s) Vᵀ s' with an odd
    polynomial p close to one, so that P is a polynomial of G = XᵀX and takes two products of its
    size. s = ‖G‖_F^{1/2}, the Schatten 4-norm of X, bounds the largest singular value, far more
    tightly than the Frobenius norm. P moves with rotations of the columns, P ↦ RᵀPR, and ignores
    those of the rows: nothing is lost of an optimizer's equivariance.

    Parameters
    ----------
    matrix : Tensor
        X, shape ``(L, rows, columns)``; best with rows ≥ columns.

    Returns
    -------
    factor : Tensor
        P, shape ``(L, columns, columns)``, up to a positive scale.
    size : Tensor
        ‖X‖_F, shape ``(L, 1, 1)``.
    """
    gram = matrix.mT @ matrix
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
    return _polynomial(_normalised(gram)), size


def row_evening_factor(matrix: Tensor) -> Tensor:
    """The same on the rows, scaled: ``P X`` is evened out and has the Frobenius norm of X.

    For few rows: ‖P X‖² = ⟨P G, P⟩ with G = XXᵀ costs next to nothing then.

    Parameters
    ----------
    matrix : Tensor
        X, shape ``(…, rows, columns)``.

    Returns
    -------
    Tensor
        P, shape ``(…, rows, rows)``.
    """
    gram = _normalised(matrix @ matrix.mT)
    before = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    # A copy: the polynomial is made in place.
    factor = _polynomial(gram.clone())
    after = (factor @ gram).mul_(factor).sum((-2, -1))
    scale = (before / after.clamp_min(torch.finfo(gram.dtype).tiny)).sqrt_()
    return factor.mul_(scale[..., None, None])


def _normalised(gram: Tensor) -> Tensor:
    """Over its Frobenius norm, in place; first over its largest entry, which may be tiny."""
    tiny = torch.finfo(gram.dtype).tiny
    gram.div_(gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(tiny))
    return gram.div_(torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny))


def _polynomial(gram: Tensor) -> Tensor:
    """p(√G)/√G with the odd p of `COEFFICIENTS`; changes its argument."""
    c1, c3, c5, c7, c9 = COEFFICIENTS
    square = gram @ gram
    factor = (c3 * gram).add_(square, alpha=c5)
    factor.diagonal(dim1=-2, dim2=-1).add_(c1)
    return factor.add_(square @ gram.mul_(c7).add_(square, alpha=c9))


def even_out(matrix: Tensor, right: Tensor | None) -> Tensor:
    """Even out the singular values of X, keep its Frobenius norm, and multiply from the right.

    Parameters
    ----------
    matrix : Tensor
        X, shape ``(L, rows, columns)``.
    right : Tensor, optional
        Orthogonal, shape ``(L, columns, columns)``; folded into one product with P.

    Returns
    -------
    Tensor
        Shape ``(L, rows, columns)``.
    """
    if matrix.size(1) >= matrix.size(2):
        factor, size = evening_factor(matrix)
        evened = matrix @ (factor if right is None else factor @ right)
    else:
        factor, size = evening_factor(matrix.mT)
        evened = factor @ matrix
        evened = evened if right is None else evened @ right
    tiny = torch.finfo(evened.dtype).tiny
    return evened.mul_(size / torch.linalg.matrix_norm(evened, keepdim=True).clamp_min(tiny))
