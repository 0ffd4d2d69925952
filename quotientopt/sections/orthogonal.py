"""Dressing fields of factor pairs under O(r), acting by ``(A, B) ↦ (g A, g B)``."""

import torch
from torch import Tensor

from quotientopt._linalg import Pair, compute_dtype, wide
from quotientopt.sections.factor import check_factors
from quotientopt.sections.gram import gram_section


def orthogonal_section(
    kind: str, A: Tensor, B: Tensor, *, check: bool = True
) -> tuple[Pair, Tensor]:
    """Canonical representative of (A, B) under O(r), and the element that leads to it.

    Both factors turn alike, so the pair is the token matrix ``X = [A B]ᵀ``. ``"svd"`` makes the
    rows of [A B] orthogonal, in decreasing length, the entry of largest modulus of each positive
    (:func:`~quotientopt.sections.gram_svd`); ``"polar"`` makes its leading r×r block symmetric
    positive definite (:func:`~quotientopt.sections.gram_polar`).

    Parameters
    ----------
    kind : {"svd", "polar"}
    A, B, check
        As for :func:`quotientopt.sections.section`; [A B] has full row rank.

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
    dressed, g = gram_section(kind, joint.mT, check=check)
    dressed_A, dressed_B = dressed.mT.split((A.shape[-1], B.shape[-1]), dim=-1)
    dtype = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    return (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), g.to(dtype)
