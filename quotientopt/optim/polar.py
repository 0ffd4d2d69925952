"""The polar factor of an update, nearly: polynomials that make its singular values equal.

A matrix D = U Σ Vᵀ gives way to U Vᵀ at the size of D. Two ways lead there: `COEFFICIENTS`, one
polynomial step (:func:`orthogonalise`, :func:`row_polar_factor`), and `COMPOSITION`, which ends
within 7.5 % (:func:`polar_direction`). Both are made of products with Gram matrices, and hence
commute with rotations of rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt.optim.update import Product

# Odd polynomial of degree 9 that is nearest to one on [0.1, 1] (largest error 0.26), by Lawson's
# algorithm; its slope at zero is 7.9, so that smaller singular values grow alike.
COEFFICIENTS = (7.9348, -56.0039, 166.6517, -202.4902, 85.1685)


def polar_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
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


def row_polar_factor(matrix: Tensor) -> Tensor:
    """The same on the rows, scaled: ``P X`` is made nearly equal and has the Frobenius norm of X.

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


# Odd polynomials of degrees 13 and 9 whose composition is nearest to one on [0.02, 1], to within
# 0.0743: each minimises the largest error on the range of the one before, by linear programming
# (benchmarks/polar_composition.py; for quintics: Amsel et al., arXiv 2505.16932).
COMPOSITION = (
    (
        17.246252,
        -324.602975,
        2335.9413604,
        -7618.8060297,
        12332.5145761,
        -9678.3716970,
        2937.7361776,
    ),
    (3.3478554, -6.1291111, 5.6866669, -2.3061991, 0.3341926),
)


def polar_factor_of_gram(gram: Tensor) -> Tensor:
    """P for which P X is nearly the polar factor of X, from ``G = X Xᵀ``; up to a positive scale.

    The polynomials p of `COMPOSITION` are applied one after the other, ``R ← q(R)² R`` and
    ``P ← q(R) P`` with q(σ²) = p(σ)/σ, at eight products of the size of G. Singular values are
    taken over their Schatten 8-norm ``‖G²‖_F^{1/4}``, which G² gives for nothing and which bounds
    the largest one, within a factor of two for up to 256 of them. Those above a fiftieth of it end
    within 7.5 % of one. Rotations go through: G ↦ O G Oᵀ gives O P Oᵀ.

    Parameters
    ----------
    gram : Tensor
        Symmetric, shape ``(L, k, k)``; best the smaller of the two.
    """
    tiny = torch.finfo(gram.dtype).tiny
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
    square = gram @ gram
    bound = torch.linalg.matrix_norm(square, keepdim=True).clamp_min(tiny)
    gram.div_(bound.sqrt())
    square.div_(bound)
    # All products go into five stacks: on a CPU fresh memory costs a fifth more.
    step, factor, spare = (torch.empty_like(gram) for _ in range(3))
    for place, (first, second, *higher) in enumerate(COMPOSITION):
        # q(G) = first + second G + G² (third + fourth G + G² (…)), from the inside out.
        square = torch.bmm(gram, gram, out=square) if place else square
        *pairs, last = higher
        inner, outer = torch.mul(square, last, out=spare), step
        for odd, even in zip(pairs[-1::-2], pairs[-2::-2], strict=True):
            inner.add_(gram, alpha=odd).diagonal(dim1=-2, dim2=-1).add_(even)
            inner, outer = torch.bmm(square, inner, out=outer), inner
        inner.add_(gram, alpha=second).diagonal(dim1=-2, dim2=-1).add_(first)
        factor = inner @ factor if place else factor.copy_(inner)
        if place < len(COMPOSITION) - 1:
            torch.bmm(inner, inner, out=outer)
            gram, square = torch.bmm(outer, gram, out=square), gram
    return factor


# The same of degree 5 throughout, largest error 0.0494, with 0.02 of room for rounding in between.
NARROW_COMPOSITION = (
    (8.0933688, -23.620431, 17.4461522),
    (3.7728237, -2.8198734, 0.5476912),
    (2.9629355, -2.2178883, 0.4795129),
    (2.0897044, -1.4721827, 0.3978229),
)


def polar_factor_by_narrow_products(matrix: Tensor, multiply: Product) -> Tensor:
    """Nearly the polar factor of X, the quintics of `NARROW_COMPOSITION` applied to X itself.

    A Gram matrix in narrow arithmetic holds nothing of singular values whose squares are below its
    rounding, and the recursion on it fails; X itself loses only those below the rounding. Large
    coefficients would amplify it.

    Parameters
    ----------
    matrix : Tensor
        X of entries at most one, shape ``(L, rows, columns)`` with rows ≤ columns.
    multiply : callable
    """
    tiny = torch.finfo(matrix.dtype).tiny
    X = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(tiny)
    for place, (first, third, fifth) in enumerate(NARROW_COMPOSITION):
        gram = multiply(X, X.mT)
        square = multiply(gram, gram)
        if not place:
            # The Schatten 8-norm, with room for rounding.
            bound = 1.02 * torch.linalg.matrix_norm(square, keepdim=True).pow(0.25).clamp_min(tiny)
            X, gram, square = X / bound, gram / bound**2, square / bound**4
        X = first * X + multiply((third * gram).add_(square, alpha=fifth), X)
    return X


def polar_direction(
    matrix: Tensor, right: Tensor | None, multiply: Product = torch.matmul
) -> Tensor:
    """The polar factor of D at the size of D, ``‖D‖_F U Vᵀ/‖U Vᵀ‖_F``, times a rotation.

    Parameters
    ----------
    matrix : Tensor
        D = U Σ Vᵀ, shape ``(L, rows, columns)``.
    right : Tensor, optional
        Orthogonal, shape ``(L, columns, columns)``; folded into one product with P.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    # After many gradients of zero D is so small that its Gram would be rounding. (The norm of order
    # ∞ is ten times slower on a CPU.)
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    unit = matrix / largest.clamp_min(tiny)
    tall = matrix.size(1) >= matrix.size(2)
    if multiply is not torch.matmul:
        size = torch.linalg.matrix_norm(unit, keepdim=True)
        result = polar_factor_by_narrow_products(unit.mT if tall else unit, multiply)
        result = result.mT if tall else result
        result = result if right is None else multiply(result, right)
    else:
        gram = unit.mT @ unit if tall else unit @ unit.mT
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
        factor = polar_factor_of_gram(gram)
        if tall:
            result = unit @ (factor if right is None else factor @ right)
        else:
            result = factor @ unit
            result = result if right is None else result @ right
    norm = torch.linalg.matrix_norm(result, keepdim=True).clamp_min(tiny)
    return result.mul_(largest * size / norm)


def orthogonalise(matrix: Tensor, right: Tensor | None, multiply: Product = torch.matmul) -> Tensor:
    """Make singular values nearly equal, keep the Frobenius norm, and multiply from the right.

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
        factor, size = polar_factor(matrix)
        orthogonal = multiply(matrix, factor if right is None else multiply(factor, right))
    else:
        factor, size = polar_factor(matrix.mT)
        orthogonal = multiply(factor, matrix)
        orthogonal = orthogonal if right is None else multiply(orthogonal, right)
    tiny = torch.finfo(orthogonal.dtype).tiny
    return orthogonal.mul_(
        size / torch.linalg.matrix_norm(orthogonal, keepdim=True).clamp_min(tiny)
    )
