"""Dressing fields of token matrices X ∈ R_*^{N×d} under O(d) or a stabiliser, by ``X ↦ X gᵀ``.

Both return the representative and the orthogonal matrix g that leads to it. Under the stabiliser of
the all-ones vector only the part of the rows orthogonal to 1 moves; it is dressed in the
coordinates of :meth:`quotientopt.groups.StabilizerOfOnes.moving_part`.
"""

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_finite,
    check_floating,
    cholesky,
    compute_dtype,
    gram,
    locate_first,
    row_signs,
    wide,
)
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups import O
from quotientopt.sections.derivatives import default_tolerance, principal_axes


def gram_svd(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Principal axes: ``X V = U Σ`` with the right singular vectors V of X, ``g = Vᵀ``.

    Columns come in decreasing length; in each the entry of largest modulus is positive (of several
    equal ones the first). V is read off a d×d decomposition of ``Xᵀ X``.

    Residual group: none where the singular values are distinct, O(k) where k of them coincide.

    Differentiable by autograd, twice and more. The axes turn at a rate of one over the gaps between
    singular values: below a relative gap of √ε (1.5e-8 for float64, 3.5e-4 otherwise) they are held
    still in the derivative, so that it stays finite, and exact for functions that do not depend on
    the choice of axes among equal singular values. :func:`quotientopt.nn.tokens.dress_tokens` also
    takes matrices of any rank, and tells the gap.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
        Token matrix of full column rank (its moving part, under a stabiliser).
    stabilizer : O or StabilizerOfOnes, optional
        The group; O(d) by default.
    check : bool
        Whether to look for rank deficiency, which waits for the device.

    Returns
    -------
    representative : Tensor, shape (*batch, N, d)
    g : Tensor, shape (*batch, d, d)
        In at least float32.

    Raises
    ------
    ValueError
        If X is rank-deficient or not finite, or has more columns than rows.
    TypeError
        If the dtype is not floating-point.
    """
    group, moving = _moving_part(X, stabilizer)
    precision = torch.finfo(X.dtype).eps
    S = gram(moving.mT)
    L = cholesky(S, "token matrix X", check=check, precision=precision)
    _, values, Vt = torch.linalg.svd(L.mT.detach())
    _, V = principal_axes(S, values, Vt.mT, default_tolerance(X.dtype))
    Vt = V.mT
    signs = row_signs(Vt @ moving.mT)
    return _dress(X, group.element_of_moving(signs * Vt))


def gram_polar(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """The representative whose leading square block is symmetric positive definite.

    The first d rows have the polar decomposition ``X₁ = (X₁ X₁ᵀ)^{1/2} g``, and the representative
    is ``X gᵀ``: smooth wherever these rows are linearly independent, whatever the singular values.
    Under the stabiliser of 1 it is the first d − 1 rows of the moving part.

    Residual group: none. Not global: the first d rows must be independent. Differentiable by
    autograd to any order wherever it is defined.

    Parameters, returns and errors as for :func:`gram_svd`; ``ValueError`` also if the leading block
    is singular to working precision.
    """
    group, moving = _moving_part(X, stabilizer)
    if check:
        check_finite("token matrix X", X)
    size = moving.shape[-1]
    leading = moving[..., :size, :]
    if check:
        values = torch.linalg.svdvals(leading.detach())
        floor = size * torch.finfo(compute_dtype(X.dtype)).eps * values[..., 0]
        failed = values[..., -1] <= floor
        if bool(failed.any()):
            raise ValueError(
                f"the leading {size} rows of X are linearly dependent"
                f"{locate_first(failed)}: the polar section is undefined, use 'svd'"
            )
    return _dress(X, group.element_of_moving(orthogonal_polar_factor(leading)))


_SECTIONS = {"svd": gram_svd, "polar": gram_polar}


def gram_section(
    kind: str, X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Representative and element of the section `kind`, ``"svd"`` or ``"polar"``.

    Raises
    ------
    ValueError
        If `kind` is unknown, or for the reasons of :func:`gram_svd` and :func:`gram_polar`.
    """
    if kind not in _SECTIONS:
        raise ValueError(f"section must be one of {tuple(_SECTIONS)}, got {kind!r}")
    return _SECTIONS[kind](X, stabilizer=stabilizer, check=check)


def _moving_part(X: Tensor, stabilizer: O | None) -> tuple[O, Tensor]:
    check_floating("X", X)
    if X.ndim < 2:
        raise ValueError(f"X must have shape (*batch, N, d), got {tuple(X.shape)}")
    group = O(X.shape[-1]) if stabilizer is None else stabilizer
    if group.r != X.shape[-1]:
        raise ValueError(f"{group!r} does not act on X of shape {tuple(X.shape)}")
    moving = group.moving_part(wide(X))
    if moving.shape[-2] < moving.shape[-1]:
        raise ValueError(
            f"X must have shape (*batch, N, d) with N >= {moving.shape[-1]}, got {tuple(X.shape)}"
        )
    return group, moving


def _dress(X: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (wide(X) @ g.mT).to(X.dtype), g.to(compute_dtype(X.dtype))
