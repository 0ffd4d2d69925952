"""The update of QuotientAdam: pure functions on stacked tensors.

    z = u ∂ Q                                   u: head frame, Q: residual frame
    m ← β₁ m + (1 − β₁) z,  v ← β₂ v + (1 − β₂) z²
    D = m̂ / (√v̂ + ε)
    W ← (1 − ηλ) W − η uᵀ p(D) Qᵀ

The letters are those of docs/quotient_adam.md. In this order: covariances and frames, Adam, polar
step, rounding. The plain form, one matrix at a time, is :mod:`quotientopt.optim.reference`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
PRECISIONS = ("highest", "high", "fast")
TIE_BREAK = 1e-3


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


def ema_(average: Tensor, new: Tensor, beta: float, gate: Tensor | None = None) -> None:
    """Exponential moving average in place that starts at its first non-zero sample.

    ``average`` holds symmetric positive matrices; one that is zero has seen no gradient yet. With
    a ``gate`` of zero nothing changes.
    """
    trace = average.diagonal(dim1=-2, dim2=-1).sum(-1)
    weight = torch.where(trace == 0, 1.0, 1 - beta).to(average.dtype)
    if gate is not None:
        weight = weight * gate.to(weight)
    average.lerp_(new, weight[..., None, None])


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


# Relative to the mean eigenvalue.
SHIFT = 1e-3


def residual_eigenframe(covariance: Tensor, weights_gram: Tensor, pooled_gram: Tensor) -> Tensor:
    """Columns are eigenvectors of a residual-axis covariance, its ties broken by the weights.

    Parameters
    ----------
    covariance, weights_gram : Tensor
        Σ (u∂)ᵀ(u∂) and WᵀW of the dressed weights, symmetric, shape ``(…, d, d)``.
    pooled_gram : Tensor
        WᵀW summed over all matrices of the stream, ``(d, d)``: a matrix with few rows slices
        directions free that only the others tell apart.
    """
    return torch.linalg.eigh(break_ties(covariance, weights_gram, pooled_gram)).eigenvectors


def next_eigenframe(covariance: Tensor, frame: Tensor) -> Tensor:
    """One step of orthogonal iteration, Q ← orthonormalise((R + δ) Q), largest Rayleigh first.

    The shift δ, a thousandth of the mean eigenvalue, slices directions without gradients as they
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


def clip_scale(norms: Sequence[Tensor], limit: float | None) -> Tensor | None:
    """Factor that brings gradients down to a norm of ``limit``; None where there is no limit.

    Parameters
    ----------
    norms : sequence of Tensor
        Of the dressed gradients, one each.
    limit : float, optional
    """
    if limit is None:
        return None
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    # Not a number only where the step is refused, or gated with gradients of zero.
    return (limit / (total + 1e-6)).clamp(max=1.0).nan_to_num(0.0)


def moments_(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    plane_partner: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Update both moments in place, m ← β₁ m + (1−β₁) ∂, v ← β₂ v + (1−β₂) |∂|².

    Parameters
    ----------
    gradient : Tensor
        Dressed gradients, shape ``(…, r, n)``.
    exp_avg, exp_avg_sq : Tensor
        Moments in the same coordinates.
    betas : tuple of float
    plane_partner : Tensor, optional
        Index of each row's partner in a rotated plane. Two real rows then share one second
        moment, half of |∂|² of their complex entry, which no phase changes. (Half, so that an
        update has the same size per real entry as elsewhere.)
    gate : Tensor, optional
        One, or zero where nothing may change; the gradient must then be zero.
    """
    mean_weight, square_weight = (gated(1 - beta, gate) for beta in betas)
    exp_avg.lerp_(gradient, mean_weight)
    if plane_partner is None:
        exp_avg_sq.mul_(1 - square_weight).addcmul_(gradient, gradient, value=1 - betas[1])
        return
    square = gradient.square()
    square = square.add_(square.index_select(-2, plane_partner)).mul_(0.5)
    exp_avg_sq.lerp_(square, square_weight)


def gated(value: float, gate: Tensor | None) -> float | Tensor:
    """A number, or zero on the device where a gate is closed."""
    return value if gate is None else gate * value


def direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | int,
    *,
    betas: tuple[float, float],
    eps: float,
    nesterov: bool,
) -> Tensor:
    """Adam's direction m̂ / (√v̂ + ε) from updated moments.

    With ``nesterov``, m̂ = β₁ m / (1 − β₁^{t+1}) + (1 − β₁) ∂ / (1 − β₁^t) (Dozat 2016).

    Parameters
    ----------
    step : int or Tensor
        Number t of this update, starting at 1; a tensor that broadcasts against the gradient
        where its slices have seen different numbers of updates.
    """
    beta1, beta2 = betas
    # √v̂ + ε = (√v + ε c) / c with c = √(1 − β₂^t); c goes into the numerator, which saves a pass.
    root = (1 - beta2**step) ** 0.5
    scale = root / (1 - beta1**step)
    if nesterov:
        mean = exp_avg * (root * beta1 / (1 - beta1 ** (step + 1)))
        fresh = scale * (1 - beta1)
        if isinstance(fresh, Tensor):
            mean.addcmul_(gradient, fresh)
        else:
            mean.add_(gradient, alpha=fresh)
    else:
        mean = exp_avg * scale
    return mean.div_(exp_avg_sq.sqrt().add_(eps * root))


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


# Odd polynomials of degrees 9, 9 and 5 whose composition is nearest to one on [0.01, 1], largest
# error 0.0301: each minimises the largest error on the range of the one before, by linear
# programming (benchmarks/polar_composition.py; for quintics: Amsel et al., arXiv 2505.16932).
COMPOSITION = (
    (13.9100579, -132.7784935, 438.521347, -561.6110044, 243.8191253),
    (4.823693, -10.7107304, 9.5069818, -3.3921442, 0.4162188),
    (2.0247417, -1.4078937, 0.391107),
)


def polar_factor_of_gram(gram: Tensor) -> Tensor:
    """P for which P X is nearly the polar factor of X, from ``G = X Xᵀ``; up to a positive scale.

    The polynomials p of `COMPOSITION` are applied one after the other, ``R ← q(R)² R`` and
    ``P ← q(R) P`` with q(σ²) = p(σ)/σ, at eleven products of the size of G. Singular values are
    taken over their Schatten 8-norm ``‖G²‖_F^{1/4}``, which G² gives for nothing and which bounds
    the largest one, within a factor of two for up to 256 of them. Those above a hundredth of it end
    within 3 % of one. Rotations go through: G ↦ O G Oᵀ gives O P Oᵀ.

    Parameters
    ----------
    gram : Tensor
        Symmetric, shape ``(…, k, k)``; best the smaller of the two.
    """
    tiny = torch.finfo(gram.dtype).tiny
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
    square = gram @ gram
    bound = torch.linalg.matrix_norm(square, keepdim=True).clamp_min(tiny)
    gram, square = gram / bound.sqrt(), square / bound
    factor = None
    for place, coefficients in enumerate(COMPOSITION):
        if place:
            square = gram @ gram
        first, second, third, *higher = coefficients
        step = (second * gram).add_(square, alpha=third)
        step.diagonal(dim1=-2, dim2=-1).add_(first)
        if higher:
            step = step + square @ (higher[0] * gram).add_(square, alpha=higher[1])
        factor = step if factor is None else step @ factor
        if place < len(COMPOSITION) - 1:
            gram = step @ step @ gram
    assert factor is not None
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
    # After many gradients of zero D is so small that its Gram would be rounding.
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=(-2, -1), keepdim=True)
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


def two_sided(
    left: Tensor | None, middle: Tensor, right: Tensor | None, multiply: Product = torch.matmul
) -> Tensor:
    """``left @ middle @ right`` of a stack of slices; None is the identity.

    Parameters
    ----------
    left : Tensor, optional
        Shape ``(L, heads, r, r)``.
    middle : Tensor
        Shape ``(L, M, heads, r, n)``.
    right : Tensor, optional
        Shape ``(L, n, n)``.
    """
    if left is not None:
        middle = multiply(left.unsqueeze(1), middle)
    if right is None:
        return middle
    return multiply(middle.flatten(1, -2), right).unflatten(1, middle.shape[1:-1])


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to one of the two nearest numbers of ``dtype``, at odds that keep the mean.

    x between neighbours a < b becomes b with probability (x − a)/(b − a). Small updates of bfloat16
    weights, which rounding to nearest would lose, then count on average.

    Parameters
    ----------
    values : Tensor
        In a wider dtype.
    dtype : torch.dtype

    Returns
    -------
    Tensor
        Of ``dtype``. What overflows or is not finite stays as rounding to nearest makes it. The
        random numbers are those of torch's global generator.
    """
    nearest = values.to(dtype)
    back = nearest.to(values.dtype)
    towards = torch.where(values > back, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.to(values.dtype) - back).abs()
    odds = (values - back).abs() / gap
    take = (torch.rand_like(values) < odds) & other.isfinite()
    return torch.where(take, other, nearest)
