"""Orthonormal coordinates of a low-rank pair's factors, and state carried from step to step.

A side is one factor X of a pair (X, Y), seen through its partner Y. With Y = L Q (rows of Q
orthonormal) its dressed gradient L^{-1} ∂_X is the gradient of XᵀY seen through Q, defined also
where X = 0. Under the group L goes to g L P and Q to Pᵀ Q with an orthogonal P, which the frame of
the last step fixes, and the eigenframe of the dressed covariance from time to time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import rows_depend, wide_dtype
from quotientopt.optim.eigenframes import TIE_BREAK, trace_normalised
from quotientopt.optim.update import corrections

# Of the squared sine of a row's angle to those before it: Grams of float32 factors in float64
# resolve sines of a millionth.
LEAST_PIVOT = 1e-12
# Of a factor in one step, against itself.
MOST_GROWTH = 10.0


class Coordinates(NamedTuple):
    """Frames of some sides, ``(N, r, r)``, and which of them are defined, ``(N,)``."""

    frame: Tensor
    defined: Tensor


def next_coordinates(reference: Tensor, gram: Tensor) -> Coordinates:
    r"""The frame w with :math:`w\,YY^T w^T = 1` that continues the one of the last step.

    With the old frame w₀ and the Cholesky factor K of :math:`w_0\,YY^T w_0^T`, it is
    :math:`w = K^{-1} w_0`, the Gram-Schmidt process on the rows of w₀Y. The product is invariant,
    so that w goes to :math:`w g^{-1}` when Y goes to gY and w₀ to :math:`w_0 g^{-1}`. Without an
    old frame w is the inverse of Y's own Cholesky factor.

    Parameters
    ----------
    reference : Tensor
        w₀, shape ``(N, r, r)``; zero where there is none.
    gram : Tensor
        YYᵀ of the partners, same shape, in the widest precision of the device.

    Returns
    -------
    Coordinates
        In the precision of ``gram``. Frames of rank-deficient partners are not defined; they stay
        what they were.
    """
    reference = reference.to(gram.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(scale > 0, scale, 1).rsqrt().diag_embed()
    missing = (reference == 0).flatten(-2).all(-1)[..., None, None]
    start = torch.where(missing, scale, reference)
    product = start @ gram @ start.mT
    factor, info = torch.linalg.cholesky_ex(product)
    dependent = (info != 0) | rows_depend(factor, product, LEAST_PIVOT**0.5)
    defined = ~dependent & factor.isfinite().flatten(-2).all(-1)
    wanted = defined[..., None, None]
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    frame = torch.linalg.solve_triangular(torch.where(wanted, factor, identity), start, upper=False)
    return Coordinates(torch.where(wanted, frame, reference), defined)


def spanning_coordinates(gram: Tensor) -> Coordinates:
    """Frames w of rank-deficient partners, from the pseudo-inverse root of YYᵀ.

    Rows are v/√λ for its eigenvectors v with eigenvalues λ > 0, and zero for the others, so that
    the rows of wY are orthonormal or zero. Where both factors of a pair are rank-deficient, some
    group elements leave both as they are, and no frame can follow those. This one takes the missing
    directions orthogonal in the coordinates the factors are stored in. If XᵀY = 0 then, as with
    PEFT's orthogonal initialisation, XᵀY after the step still does not depend on the gauge.

    Parameters
    ----------
    gram : Tensor
        Finite, shape ``(N, r, r)``, in the widest precision of the device.

    Returns
    -------
    Coordinates
        Not defined where Y is zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)
    largest = eigenvalues[..., -1:]
    positive = (eigenvalues > LEAST_PIVOT * largest) & (largest > 0)
    scales = torch.where(positive, torch.where(positive, eigenvalues, 1).rsqrt(), 0)
    return Coordinates(scales[..., None] * vectors.mT, positive.any(-1))


def carry_covariance_(
    covariance: Tensor, overlap: Tensor, sample: Tensor, beta: Tensor, gate: Tensor
) -> None:
    """C ← β R C Rᵀ + (1 − β) zzᵀ in place, or zzᵀ where C is zero, as far as the gate is open.

    Parameters
    ----------
    covariance, overlap, sample : Tensor
        C, R and zzᵀ, shape ``(N, r, r)``.
    beta : Tensor
        Shape ``(N,)``.
    gate : Tensor
        One, or zero where nothing may change (the overlap is the identity there), ``(N,)``.
    """
    covariance.copy_(overlap @ covariance @ overlap.mT)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    weight = gate * ((trace == 0).to(gate) * beta + (1 - beta))
    covariance.lerp_(sample, weight[..., None, None])


def eigenframe(covariance: Tensor, tie_break: Tensor) -> Tensor:
    """Rows are eigenvectors of the covariance, those of large eigenvalues first.

    Parameters
    ----------
    covariance : Tensor
        EMA(zzᵀ), shape ``(N, r, r)``.
    tie_break : Tensor
        An invariant of the partner that turns with the frame, same shape, of order one. It decides
        where the covariance leaves directions undecided.
    """
    pooled = trace_normalised(covariance).add_(tie_break, alpha=TIE_BREAK)
    return torch.linalg.eigh(pooled).eigenvectors.flip(-1).mT


def position_moment(coordinates: Tensor) -> Tensor:
    """F D Fᵀ with D = diag(-1 … 1) along the columns, for F of shape ``(N, r, n)``.

    The group does not see the columns of a factor, so that any fixed matrix on them serves to tell
    the rows of its coordinates apart.
    """
    places = torch.linspace(
        -1, 1, coordinates.size(-1), dtype=coordinates.dtype, device=coordinates.device
    )
    return (coordinates * places) @ coordinates.mT


def restraint(frame: Tensor, partner: Tensor, columns: Tensor, lr: float | Tensor) -> Tensor:
    r"""Factor of a side's step that keeps up with what its partner gains in the same step.

    A step of size one over Y is too large for Y + ΔY: the product changes by ΔXᵀΔY as well. With
    entries of order one in Adam's directions, ΔY is as large against Y, seen by w, as
    :math:`ρ = η \sqrt{n/r}\,\|w w_Y^T\|`, with :math:`w_Y` the frame of Y's own side; no gauge
    changes it. It is one in the step after a start at zero and falls from then on. Where learning
    rates grow by orders of magnitude between steps the factor is `MOST_GROWTH` / ρ.

    Parameters
    ----------
    frame : Tensor
        w of all sides, ``(N, r, r)``.
    partner : Tensor
        The same of their partners, zero where those do not take part.
    columns : Tensor
        n of the partners, ``(N,)``.
    lr : float or Tensor
        η.

    Returns
    -------
    Tensor
        At most one, ``(N, 1, 1)``.
    """
    growth = lr * (frame @ partner.mT).square().sum((-2, -1)).mul(columns / frame.size(-1)).sqrt()
    return (MOST_GROWTH / growth.clamp_min(MOST_GROWTH))[:, None, None]


class Coefficients(NamedTuple):
    """What Adam's update multiplies with, side by side.

    Moments become ``keep_mean @ m + (1−β₁) z`` and ``keep_square @ v + (1−β₂) z²``, with matrices
    if the moments are ``carried`` to other coordinates, else with numbers; the direction is
    ``scale (m + fresh z) / (√v + floor)``.
    """

    keep_mean: Tensor
    keep_square: Tensor
    scale: Tensor
    fresh: Tensor
    floor: Tensor
    carried: bool

    def of(self, rows: slice) -> Coefficients:
        """Those of some sides."""
        return Coefficients(
            self.keep_mean[rows],
            self.keep_square[rows],
            self.scale[rows],
            self.fresh[rows],
            self.floor[rows],
            self.carried,
        )


def coefficients(
    overlap: Tensor | None,
    counts: Tensor,
    gate: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    nesterov: bool,
) -> Coefficients:
    """Coefficients of Adam with moments carried over: β₁ R, β₂ R∘R and corrections of the bias.

    Parameters
    ----------
    overlap : Tensor or None
        R of the new coordinates with the old ones, ``(N, r, r)``; the identity where the gate is
        zero. None where coordinates stay: then ``keep_mean`` and ``keep_square`` are numbers,
        ``(N, 1, 1)``.
    counts : Tensor
        Updates with the present one, at least one, ``(N,)``. Corrections are computed from it in
        the widest precision.
    gate : Tensor
        One, or zero where nothing may change, ``(N, 1, 1)``.
    betas, eps, nesterov
        As of Adam; see :func:`quotientopt.optim.update.corrections`.
    """
    beta1, beta2 = betas
    t = counts[:, None, None].to(wide_dtype(counts.device))
    root, scale, of_gradient = corrections(t, betas, nesterov=nesterov and beta1 > 0)
    fresh = of_gradient / scale
    keep_mean, keep_square = 1 - (1 - beta1) * gate, 1 - (1 - beta2) * gate
    if overlap is not None:
        keep_mean, keep_square = overlap * keep_mean, overlap.square() * keep_square
    return Coefficients(
        keep_mean,
        keep_square,
        scale.to(gate.dtype),
        fresh.to(gate.dtype),
        # Where nothing may change a denominator of zero would make NaN.
        torch.where(gate > 0, (eps * root).to(gate.dtype), 1),
        carried=overlap is not None,
    )


def adam_(
    dressed: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    own: Coefficients,
    betas: tuple[float, float],
    *,
    nesterov: bool,
) -> Tensor:
    """Update both moments in place and return Adam's direction m̂ / (√v̂ + ε), not scaled yet.

    Parameters
    ----------
    dressed, exp_avg, exp_avg_sq : Tensor
        Shape ``(N, r, n)``; the first zero where the gate is.
    own : Coefficients
    betas, nesterov
        As in :func:`coefficients`.

    Returns
    -------
    Tensor
        Shape ``(N, r, n)``, to be multiplied by ``own.scale``.
    """
    if own.carried:
        carried = torch.bmm(own.keep_mean, exp_avg)
        torch.add(carried, dressed, alpha=1 - betas[0], out=exp_avg)
        torch.bmm(own.keep_square, exp_avg_sq, out=carried)
        exp_avg_sq.copy_(carried)
    else:
        exp_avg.lerp_(dressed, 1 - own.keep_mean)
        exp_avg_sq.mul_(own.keep_square)
    exp_avg_sq.addcmul_(dressed, dressed, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().add_(own.floor)
    mean = torch.addcmul(exp_avg, dressed, own.fresh) if nesterov else exp_avg
    return torch.div(mean, denominator, out=denominator)
