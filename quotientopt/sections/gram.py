"""Dressing fields of token matrices X ∈ R_*^{N×d} under O(d), acting by ``X ↦ X gᵀ``.

Both return the representative and the orthogonal matrix g that leads to it.
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


def gram_svd(X: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Principal axes: ``X V = U Σ`` with the right singular vectors V of X, ``g = Vᵀ``.

    Columns come in decreasing length; in each the entry of largest modulus is positive (of several
    equal ones the first). V is read off a d×d decomposition of ``Xᵀ X``.

    Residual group: none where the singular values are distinct, O(k) where k of them coincide.
    Derivatives by autograd need the gaps between them.

    Parameters
    ----------
    X : Tensor, shape (*batch, N, d)
        Token matrix of full column rank.
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
    _check_tall(X)
    L = cholesky(gram(X.mT), "token matrix X", check=check)
    _, _, Vt = torch.linalg.svd(L.mT)
    dressed = wide(X) @ Vt.mT
    signs = row_signs(dressed.mT)
    return (dressed * signs.mT).to(X.dtype), (signs * Vt).to(compute_dtype(X.dtype))


def gram_polar(X: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """The representative whose leading d×d block is symmetric positive definite.

    The first d rows have the polar decomposition ``X₁ = (X₁ X₁ᵀ)^{1/2} g``, and the representative
    is ``X gᵀ``: smooth wherever these rows are linearly independent, whatever the singular values.

    Residual group: none. Not global: the first d rows must be independent.

    Parameters, returns and errors as for :func:`gram_svd`; ``ValueError`` also if the leading block
    is singular to working precision.
    """
    _check_tall(X)
    if check:
        check_finite("token matrix X", X)
    U, values, Vt = torch.linalg.svd(wide(X)[..., : X.shape[-1], :])
    if check:
        floor = X.shape[-1] * torch.finfo(compute_dtype(X.dtype)).eps * values[..., 0]
        failed = values[..., -1] <= floor
        if bool(failed.any()):
            raise ValueError(
                f"the leading {X.shape[-1]} rows of X are linearly dependent"
                f"{locate_first(failed)}: the polar section is undefined, use 'svd'"
            )
    g = U @ Vt
    return (wide(X) @ g.mT).to(X.dtype), g.to(compute_dtype(X.dtype))


_SECTIONS = {"svd": gram_svd, "polar": gram_polar}


def gram_section(kind: str, X: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Representative and element of the section `kind`, ``"svd"`` or ``"polar"``.

    Raises
    ------
    ValueError
        If `kind` is unknown, or for the reasons of :func:`gram_svd` and :func:`gram_polar`.
    """
    if kind not in _SECTIONS:
        raise ValueError(f"section must be one of {tuple(_SECTIONS)}, got {kind!r}")
    return _SECTIONS[kind](X, check=check)


def _check_tall(X: Tensor) -> None:
    check_floating("X", X)
    if X.ndim < 2 or X.shape[-2] < X.shape[-1]:
        raise ValueError(f"X must have shape (*batch, N, d) with N >= d, got {tuple(X.shape)}")
