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
from quotientopt.groups import O


def gram_svd(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Principal axes: ``X V = U Σ`` with the right singular vectors V of X, ``g = Vᵀ``.

    Columns come in decreasing length; in each the entry of largest modulus is positive (of several
    equal ones the first). V is read off a d×d decomposition of ``Xᵀ X``.

    Residual group: none where the singular values are distinct, O(k) where k of them coincide.
    Derivatives by autograd need the gaps between them.

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
    L = cholesky(gram(moving.mT), "token matrix X", check=check, precision=precision)
    _, _, Vt = torch.linalg.svd(L.mT)
    signs = row_signs(Vt @ moving.mT)
    return _dress(X, group.element_of_moving(signs * Vt))


def gram_polar(
    X: Tensor, *, stabilizer: O | None = None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """The representative whose leading square block is symmetric positive definite.

    The first d rows have the polar decomposition ``X₁ = (X₁ X₁ᵀ)^{1/2} g``, and the representative
    is ``X gᵀ``: smooth wherever these rows are linearly independent, whatever the singular values.
    Under the stabiliser of 1 it is the first d − 1 rows of the moving part.

    Residual group: none. Not global: the first d rows must be independent.

    Parameters, returns and errors as for :func:`gram_svd`; ``ValueError`` also if the leading block
    is singular to working precision.
    """
    group, moving = _moving_part(X, stabilizer)
    if check:
        check_finite("token matrix X", X)
    size = moving.shape[-1]
    U, values, Vt = torch.linalg.svd(moving[..., :size, :])
    if check:
        floor = size * torch.finfo(compute_dtype(X.dtype)).eps * values[..., 0]
        failed = values[..., -1] <= floor
        if bool(failed.any()):
            raise ValueError(
                f"the leading {size} rows of X are linearly dependent"
                f"{locate_first(failed)}: the polar section is undefined, use 'svd'"
            )
    return _dress(X, group.element_of_moving(U @ Vt))


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
