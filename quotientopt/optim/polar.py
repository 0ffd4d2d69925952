"""The polar factor of an update, nearly: polynomials that make its singular values equal.

A matrix D = U Σ Vᵀ gives way to U Vᵀ at the size of D. Two ways lead there: `COEFFICIENTS`, one
polynomial step (:func:`orthogonalise`, :func:`row_polar_factor`), and `COMPOSITION`, which ends
within 7.5 % (:func:`polar_direction`). Both are made of products with Gram matrices, and hence
commute with rotations of rows and columns. At the end the products themselves, at a precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quotientopt.optim.update import Product

PRECISIONS = ("highest", "high", "fast")

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


def _in_powers_of_the_centred(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Those of q(G) in powers of T = 2 G − 1, which is between -1 and 1 where G is between 0 and 1.

    In powers of G those of a steep polynomial are thousands of both signs, and float32 loses three
    digits where they cancel; in powers of T they are fifty at most.
    """
    found = [0.0] * len(coefficients)
    for coefficient in reversed(coefficients):
        found = [(low + high) / 2 for low, high in zip([0.0, *found], [*found, 0.0], strict=True)]
        found[0] += coefficient
        found = found[: len(coefficients)]
    return tuple(found)


CENTRED = _in_powers_of_the_centred(COMPOSITION[0])


# Of a matrix's sides: where a Gram matrix made anew takes as many products as one carried along.
NEARLY_SQUARE = 1.5


class _Polynomials:
    """The polynomials q of `COMPOSITION`, p(σ) = σ q(σ²), of stacks of Gram matrices.

    All products go into the same stacks: on a CPU fresh memory costs a fifth more.

    Parameters
    ----------
    gram : Tensor
        G = X Xᵀ, shape ``(L, k, k)``; is written over.

    Attributes
    ----------
    scale : Tensor
        What X is to be multiplied with, so that its singular values are at most one: they are
        taken over their Schatten 8-norm ``‖G²‖_F^{1/4}``, which G² gives for nothing and which
        bounds the largest one, within a factor of two for up to 256 of them.
    """

    def __init__(self, gram: Tensor) -> None:
        tiny = torch.finfo(gram.dtype).tiny
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
        self.gram = gram.div_(trace)
        self.square = gram @ gram
        bound = torch.linalg.matrix_norm(self.square, keepdim=True).clamp_min(tiny)
        self.gram.div_(bound.sqrt())
        self.square.div_(bound)
        self.scale = trace.rsqrt() * bound.pow(-0.25)  # Of zero finite, one after the other.
        self._spare = [torch.empty_like(gram) for _ in range(2)]

    def first(self) -> Tensor:
        """q₁(G), two products; ``gram`` and ``square`` become T = 2 G − 1 and T²."""
        self.square.mul_(4).sub_(self.gram, alpha=4).diagonal(dim1=-2, dim2=-1).add_(1)
        self.gram.mul_(2).diagonal(dim1=-2, dim2=-1).sub_(1)
        return self._value(CENTRED)

    def second(self) -> Tensor:
        """q₂(G) of what ``gram`` is now."""
        torch.bmm(self.gram, self.gram, out=self.square)
        return self._value(COMPOSITION[1])

    def _value(self, coefficients: Sequence[float]) -> Tensor:
        """a + b G + G² (c + d G + G² (…)), from the inside out."""
        *pairs, last = coefficients
        inner, outer = torch.mul(self.square, last, out=self._spare[0]), self._spare[1]
        for odd, even in zip(pairs[:1:-2], pairs[-2:0:-2], strict=True):
            inner.add_(self.gram, alpha=odd).diagonal(dim1=-2, dim2=-1).add_(even)
            inner, outer = torch.bmm(self.square, inner, out=outer), inner
        self._spare = [outer, inner]
        inner.add_(self.gram, alpha=pairs[1]).diagonal(dim1=-2, dim2=-1).add_(pairs[0])
        return inner


def polar_factor_of_gram(gram: Tensor) -> Tensor:
    """P for which P X is nearly the polar factor of X, from ``G = X Xᵀ``; up to a positive scale.

    The polynomials p of `COMPOSITION` are applied one after the other, ``R ← q(R)² R`` and
    ``P ← q(R) P`` with q(σ²) = p(σ)/σ, at eight products of the size of G. Singular values above a
    fiftieth of the largest end within 7.5 % of one. Rotations go through: G ↦ O G Oᵀ gives O P Oᵀ.
    Where X is not well conditioned G holds little of its small singular values, and
    :func:`polar_factor_of_square` is more accurate.

    Parameters
    ----------
    gram : Tensor
        Symmetric, shape ``(L, k, k)``; best the smaller of the two. Is written over.
    """
    polynomials = _Polynomials(gram)
    factor = polynomials.first().clone()
    # G again, from T; then R = q(G)² G in its place.
    gram.mul_(0.5).diagonal(dim1=-2, dim2=-1).add_(0.5)
    torch.bmm(factor, gram, out=polynomials.square)
    torch.bmm(factor, polynomials.square, out=gram)
    return polynomials.second() @ factor


def polar_factor_of_square(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """P and Y = q₁(G) X for which P Y is nearly the polar factor of X, up to a positive scale.

    Of a matrix that is nearly square Y's own Gram costs less than carrying that of X along, and
    it is accurate however small the singular values of X were.

    Parameters
    ----------
    matrix : Tensor
        X, shape ``(L, k, n)`` with k ≤ n.
    gram : Tensor
        X Xᵀ; is written over.
    """
    polynomials = _Polynomials(gram)
    shrunk = polynomials.first() @ matrix.mul(polynomials.scale)
    torch.bmm(shrunk, shrunk.mT, out=gram)
    return polynomials.second(), shrunk


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
        wide = unit.mT if tall else unit
        gram = wide @ wide.mT
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
        if wide.size(2) < NEARLY_SQUARE * wide.size(1):
            factor, wide = polar_factor_of_square(wide, gram)
        else:
            factor = polar_factor_of_gram(gram)
        if tall:
            result = wide.mT @ (factor if right is None else factor @ right)
        else:
            result = factor @ wide
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


def bfloat16_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of factors rounded to bfloat16, in the dtype of ``left``."""
    return (left.bfloat16() @ right.bfloat16()).to(left.dtype)


def tensor_core_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where torch may round the factors to TF32."""
    return left @ right


@contextlib.contextmanager
def products_at(precision: str, dtype: torch.dtype, device: torch.device) -> Iterator[Product]:
    """The product that rotations and polar steps take at one of `PRECISIONS`.

    ``"highest"``: of their dtype. ``"high"``: TF32 on CUDA devices, elsewhere as ``"highest"``.
    ``"fast"``: of factors rounded to bfloat16. Those of float64 always are of their dtype.
    """
    if precision == "fast" and dtype == torch.float32:
        yield bfloat16_product
    elif precision == "high" and dtype == torch.float32 and device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield tensor_core_product
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield torch.matmul
