"""Dressing fields of factor pairs under O(r), acting by ``(A, B) ↦ (g A, g B)``."""

from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import check_finite, compute_dtype, wide
from quotientopt.sections.convention import check_gap_options, warn_of_gap
from quotientopt.sections.factor import check_factors
from quotientopt.sections.gram import dress_matrix


def orthogonal_section(
    kind: str,
    A: Tensor,
    B: Tensor,
    *,
    check: bool = True,
    return_gap: bool = False,
    warn_below: float | None = None,
) -> Any:
    """Canonical representative of (A, B) under O(r), and the element that leads to it.

    Both factors turn alike, so the pair is the token matrix ``X = [A B]ᵀ``. ``"svd"`` makes the
    rows of [A B] orthogonal, in decreasing length, the entry of largest modulus of each positive
    (:func:`~quotientopt.sections.gram_svd`); ``"polar"`` makes its leading r×r block symmetric
    positive definite (:func:`~quotientopt.sections.gram_polar`).

    Parameters
    ----------
    kind : {"svd", "polar", "triangular"}
    A, B, check, return_gap, warn_below
        As for :func:`quotientopt.sections.section`; for ``"polar"`` the leading block has full
        rank.

    Returns
    -------
    representative : tuple of Tensor
        ``(g A, g B)`` in the dtypes of A and B.
    g : Tensor, shape (*batch, r, r)
        The group element, in at least float32.

    Raises
    ------
    ValueError, TypeError
        If `kind` is unknown, or for the reasons of the sections of token matrices.
    """
    check_factors(A, B)
    joint = torch.cat((wide(A), wide(B)), dim=-1)
    check_gap_options(kind, return_gap, warn_below)
    if kind not in ("svd", "polar", "triangular"):
        raise ValueError(f"section must be 'svd', 'polar' or 'triangular', got {kind!r}")
    if check:
        check_finite("[A B]", joint)
    stored = torch.promote_types(A.dtype, B.dtype)
    found = dress_matrix(kind, joint.mT, stored, check=check)
    warn_of_gap(found.gap, warn_below)
    dressed_A, dressed_B = found.matrix.mT.split((A.shape[-1], B.shape[-1]), dim=-1)
    dtype = compute_dtype(stored)
    result = (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), found.element.to(dtype)
    return (*result, found.gap.to(dtype)) if return_gap else result
