"""Dressing fields of heads some of whose rotary planes share a frequency: complex m×m blocks.

The sections of :mod:`quotientopt.sections.factor` with ᴴ for ᵀ: of the complex rows a and b of the
planes of one frequency, with Gram matrices ``a aᴴ = L_a L_aᴴ`` and ``b bᴴ = L_b L_bᴴ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quotientopt._linalg import (
    Pair,
    check_batches,
    check_square,
    compute_dtype,
    first_largest,
    locate_first,
    wide,
)
from quotientopt.groups import PlaneCommutant
from quotientopt.sections.factor import Dressing, check_kind, element, svd_dressing


def plane_element(
    kind: str, group: PlaneCommutant, SA: Tensor, SB: Tensor, *, check: bool = True
) -> Pair:
    """Element of the section `kind` in a plane commutant, from Gram matrices.

    Frequency by frequency, with ``L_aᴴ L_b = U Σ Vᴴ``:

    - ``"svd"``: ``g = Σ^{1/2} Vᴴ L_b^{-1}``, residual group U(1) for each row;
    - ``"balanced"``: its positive polar factor, residual group U(m);
    - ``"orthonormal"``: ``g = (b bᴴ)^{-1/2}``, residual group U(m);
    - ``"triangular"``: ``g = L_b^{-1}``, residual group U(1) under triangular elements.

    The passing rows are dressed by the section of the same name of :mod:`quotientopt.sections`.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
    group : PlaneCommutant
    SA, SB : Tensor, shape (*batch, r, r)
        Gram matrices of the rows of A and of B.
    check : bool
        Whether to look for rank deficiency, which waits for the device.

    Returns
    -------
    g, g_inverse_transpose : Tensor, shape (*batch, r, r)
        Group elements for B and A, in the dtype of the Gram matrices, at least float32.

    Raises
    ------
    ValueError
        If the rows of a frequency, or those that pass, are rank-deficient, an entry is not finite,
        or shapes do not fit.
    """
    check_kind(kind)
    check_square("Gram matrix SA", SA, group.r)
    check_square("Gram matrix SB", SB, group.r)
    check_batches(SA=SA, SB=SB)
    dtype = compute_dtype(torch.promote_types(SA.dtype, SB.dtype))
    (left, block_A), (right, block_B) = (group.parts(wide(S)) for S in (SA, SB))
    # Parts are half of the products of the complex rows.
    pairs = [_complex_element(kind, 2 * a, 2 * b, check) for a, b in zip(left, right, strict=True)]
    block = contragredient = block_B
    if group.pass_rows:
        block, contragredient = element(kind, block_A, block_B, check=check)
    g = group.element([own for own, _ in pairs], block)
    other = group.element([own for _, own in pairs], contragredient)
    return g.to(dtype), other.to(dtype)


def _complex_element(kind: str, SA: Tensor, SB: Tensor, check: bool) -> Pair:
    """``(g, g^{-H})`` from hermitian Gram matrices, ``(…, m, m)``."""
    if kind == "orthonormal":
        values, vectors = _spectrum(SB, check)
        return _hermitian(vectors, values.rsqrt()), _hermitian(vectors, values.sqrt())
    LB = _cholesky(SB, "right factor B", check)
    identity = torch.eye(LB.shape[-1], dtype=LB.dtype, device=LB.device).expand_as(LB)
    if kind == "triangular":
        return torch.linalg.solve_triangular(LB, identity, upper=False), LB.mH
    LA = _cholesky(SA, "left factor A", check)
    U, values, Vh = torch.linalg.svd(LA.mH @ LB)
    root = values.sqrt().unsqueeze(-1)
    g = torch.linalg.solve_triangular(LB, root * Vh, upper=False, left=False)
    other = torch.linalg.solve_triangular(LA, root * U.mH, upper=False, left=False)
    if kind == "svd":
        return g, other
    _, values, Vh = torch.linalg.svd(g)
    return _hermitian(Vh.mH, values), _hermitian(Vh.mH, values.reciprocal())


def _cholesky(S: Tensor, name: str, check: bool) -> Tensor:
    L, info = torch.linalg.cholesky_ex(S)
    if check:
        pivots = L.diagonal(dim1=-2, dim2=-1).real.square()
        scale = S.diagonal(dim1=-2, dim2=-1).real
        flat = pivots <= S.shape[-1] * torch.finfo(scale.dtype).eps * scale
        _refuse_deficient((info > 0) | flat.any(-1) | ~torch.isfinite(scale).all(-1), name)
    return L


def _spectrum(S: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    if check:
        _cholesky(S, "right factor B", check)
    values, vectors = torch.linalg.eigh(S)
    return values, vectors


def _refuse_deficient(failed: Tensor, name: str) -> None:
    failed = failed.any(dim=-1)
    if bool(failed.any()):
        raise ValueError(
            f"{name} is rank-deficient or not finite on the rotary planes of one "
            f"frequency{locate_first(failed)}: it has no such representative"
        )


def _hermitian(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors * values.unsqueeze(-2)) @ vectors.mH


def plane_svd_dressing(
    group: PlaneCommutant, A: Tensor, B: Tensor, stored: torch.dtype, *, check: bool = True
) -> Dressing:
    """The section ``"svd"`` under a plane commutant: phases fixed as for a rotary commutant.

    The rows of every frequency need full rank. Those of equal singular values are as the
    decomposition gives them.

    Parameters
    ----------
    group : PlaneCommutant
    A, B, stored, check
        As for :func:`quotientopt.sections.factor.svd_dressing`.
    """
    A, B = wide(A), wide(B)
    (left, passing_A), (right, passing_B) = group.complex_rows(A), group.complex_rows(B)
    gap = torch.full(A.shape[:-2], torch.inf, dtype=A.dtype, device=A.device)
    elements = []
    for a, b in zip(left, right, strict=True):
        g, other = _complex_element("svd", a @ a.mH, b @ b.mH, check)
        # Gram matrices square the condition numbers; the dressed rows take back what was lost.
        a, b = other @ a, g @ b
        again, again_other = _complex_element("svd", a @ a.mH, b @ b.mH, False)
        a, b, g, other = again_other @ a, again @ b, again @ g, again_other @ other
        largest = first_largest(b)
        phase = largest.conj() / torch.where(largest.abs() > 0, largest.abs(), 1)
        elements.append((phase * g, phase * other))
        values = torch.linalg.vector_norm(b, dim=-1).square()
        if values.shape[-1] > 1:
            gaps = -values.diff(dim=-1).amax(dim=-1) / values[..., 0]
            gap = torch.minimum(gap, gaps.amin(dim=-1))
    block = contragredient = passing_B[..., :0]
    if group.pass_rows:
        passing = svd_dressing(passing_A, passing_B, stored, check=check)
        block, contragredient = passing.g, passing.contragredient
        gap = torch.minimum(gap, passing.gap)
    g = group.element([own for own, _ in elements], block)
    other = group.element([own for _, own in elements], contragredient)
    return Dressing(other @ A, g @ B, g, other, gap)
