"""Dressing fields of rotary heads under their commutant: complex planes and passing rows.

Planes of distinct frequencies are complex rows one by one. Those that share a frequency are mixed
by complex m×m matrices, with the sections of :mod:`quotientopt.sections.factor` with ᴴ for ᵀ: of
their complex rows a and b, with Gram matrices ``a aᴴ = L_a L_aᴴ`` and ``b bᴴ = L_b L_bᴴ``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
from quotientopt.groups import PlaneCommutant, RotaryCommutant
from quotientopt.sections.convention import check_gap_options, warn_of_gap
from quotientopt.sections.factor import (
    DressedPair,
    check_factors,
    check_kind,
    dress,
    element,
    svd_dressing,
)


def rotary_balanced_element(
    group: RotaryCommutant, SA: Tensor, SB: Tensor, *, check: bool = True
) -> Pair:
    """Element of a rotary commutant that balances both factors.

    On a plane with complex rows a and b it is the positive number ``s = (|a| / |b|)^{1/2}``, after
    which both rows have the length ``(|a| |b|)^{1/2}``; on the passing rows it is
    :func:`~quotientopt.sections.balanced_element` of their diagonal block.

    Residual group: U(1) for each plane, O(r − rotary_dim) on the passing rows.

    Parameters
    ----------
    group : RotaryCommutant
        Tells the planes from the passing rows.
    SA, SB : Tensor, shape (*batch, r, r)
        Gram matrices of the rows of A and of B.
    check : bool
        Whether to look for vanishing planes and rank deficiency, which waits for the device.

    Returns
    -------
    g, g_inverse_transpose : Tensor, shape (*batch, r, r)
        Group elements for B and A, in the dtype of the Gram matrices, at least float32.

    Raises
    ------
    ValueError
        If a plane of a factor vanishes, a passing block is rank-deficient, an entry is not finite,
        or shapes do not fit.
    TypeError
        If `group` is no :class:`~quotientopt.groups.RotaryCommutant` or a dtype not floating-point.
    """
    return rotary_element("balanced", group, SA, SB, check=check)


def rotary_element(
    kind: str,
    group: RotaryCommutant | PlaneCommutant,
    SA: Tensor,
    SB: Tensor,
    *,
    check: bool = True,
) -> Pair:
    """Element of the section `kind` in a rotary commutant, from Gram matrices.

    Each plane is a pair of complex rows a and b that the group multiplies by one complex number.
    ``"svd"`` and ``"balanced"`` scale both to the length ``(|a| |b|)^{1/2}``; ``"orthonormal"`` and
    ``"triangular"`` scale b to length 1, and a may vanish. The passing rows are dressed by the
    section of the same name of :mod:`quotientopt.sections`.

    Residual group: U(1) for each plane, and on the passing rows that of the section. For planes
    that share a frequency see :func:`plane_element`.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
    group : RotaryCommutant or PlaneCommutant
    SA, SB, check
        As for :func:`rotary_balanced_element`, returns and errors too.
    """
    check_kind(kind)
    if isinstance(group, PlaneCommutant):
        return plane_element(kind, group, SA, SB, check=check)
    if not isinstance(group, RotaryCommutant):
        raise TypeError(f"group must be a RotaryCommutant, got {group!r}")
    SA, SB, dtype = _checked(group, SA, SB)
    g, g_inverse_transpose = torch.zeros_like(SB), torch.zeros_like(SA)
    if group.planes:
        rows = torch.tensor(group.planes, dtype=torch.long, device=SA.device)
        squares = _squared_plane_norms(SB, rows, "right factor B", check)
        scale = squares.rsqrt()
        if kind in ("svd", "balanced"):
            squared_a = _squared_plane_norms(SA, rows, "left factor A", check)
            scale = (squared_a / squares).pow(0.25)
        g[..., rows, rows] = scale.unsqueeze(-1)
        g_inverse_transpose[..., rows, rows] = scale.reciprocal().unsqueeze(-1)
    if group.pass_rows:
        block = slice(group.rotary_dim, group.r)
        g[..., block, block], g_inverse_transpose[..., block, block] = element(
            kind, SA[..., block, block], SB[..., block, block], check=check
        )
    return g.to(dtype), g_inverse_transpose.to(dtype)


def rotary_svd_dressing(
    group: RotaryCommutant | PlaneCommutant,
    A: Tensor,
    B: Tensor,
    stored: torch.dtype,
    *,
    check: bool = True,
) -> DressedPair:
    """The section ``"svd"`` of pairs of any rank under a rotary commutant.

    Parameters
    ----------
    group : RotaryCommutant or PlaneCommutant
        Planes that share a frequency need full rank.
    A, B, stored, check
        As for :func:`quotientopt.sections.factor.svd_dressing`.
    """
    if isinstance(group, PlaneCommutant):
        return plane_svd_dressing(group, A, B, stored, check=check)
    A, B = wide(A), wide(B)
    a, b = group.complex_rows(A), group.complex_rows(B)
    lengths = [(x.real.square() + x.imag.square()).sum(dim=-1) for x in (a, b)]
    if check and not bool(torch.isfinite(lengths[0] + lengths[1]).all()):
        failed = ~torch.isfinite(lengths[0] + lengths[1]).all(dim=-1)
        raise ValueError(f"a rotary plane has non-finite entries{locate_first(failed)}")
    there = [length > 0 for length in lengths]
    left, right = (
        torch.where(here, length, 1) for here, length in zip(there, lengths, strict=True)
    )
    # Both of the length (|a| |b|)^{1/2}; where one vanishes the other of length 1.
    power = torch.where(there[0] & there[1], 0.25, 0.5)
    scale = (left / right).pow(power)
    phase = torch.ones_like(scale, dtype=b.dtype)
    if group.planes:
        # Both turn by one phase, so that a tells it as well where b vanishes.
        in_a, in_b = (first_largest(x).squeeze(-1) for x in (a, b))
        phase = _to_positive(torch.where(there[1], in_b, in_a))
    block = contragredient = None
    gap = torch.full(A.shape[:-2], torch.inf, dtype=A.dtype, device=A.device)
    if group.pass_rows:
        rows = slice(group.rotary_dim, group.r)
        passing = svd_dressing(A[..., rows, :], B[..., rows, :], stored, check=check)
        block, contragredient, gap = passing.g, passing.contragredient, passing.gap
    g = group.element(phase * scale, block)
    other = group.element(phase / scale, contragredient)
    return DressedPair(other @ A, g @ B, g, other, gap)


def rotary_section(
    kind: str,
    group: RotaryCommutant | PlaneCommutant,
    A: Tensor,
    B: Tensor,
    *,
    check: bool = True,
    return_gap: bool = False,
    warn_below: float | None = None,
) -> Any:
    """Canonical representative of (A, B) under a rotary commutant, and the element leading to it.

    For ``"svd"`` the phases are fixed as well: in the dressed complex row b of each plane the entry
    of largest modulus is real and positive (of several equal ones the first), and the passing rows
    are as :func:`quotientopt.sections.section` says. It takes pairs of any rank: where one complex
    row of a plane vanishes the other gets the length 1, and a tells the phase where b vanishes.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
    group : RotaryCommutant or PlaneCommutant
    A, B, check, return_gap, warn_below
        As for :func:`quotientopt.sections.section`, returns and errors too; the gap is that of the
        passing rows, planes are not ordered but for those that share a frequency, whose gap counts.
    """
    check_factors(A, B)
    check_gap_options(kind, return_gap, warn_below)
    stored = torch.promote_types(A.dtype, B.dtype)
    dtype = compute_dtype(stored)
    if kind == "svd":
        found = rotary_svd_dressing(group, A, B, stored, check=check)
        warn_of_gap(found.gap, warn_below)
        result = (found.A.to(A.dtype), found.B.to(B.dtype)), found.g.to(dtype)
        return (*result, found.gap.to(dtype)) if return_gap else result
    element_of = partial(rotary_element, kind, group)
    (dressed_A, dressed_B), g, _ = dress(element_of, A, B, check=check)
    return (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), g.to(dtype)


def _squared_plane_norms(S: Tensor, rows: Tensor, name: str, check: bool) -> Tensor:
    squared = S.diagonal(dim1=-2, dim2=-1)[..., rows].sum(dim=-1)
    if check:
        failed = ~(torch.isfinite(squared) & (squared > 0)).all(dim=-1)
        if bool(failed.any()):
            raise ValueError(
                f"{name} has a vanishing or non-finite rotary plane{locate_first(failed)}: "
                "it has no such representative"
            )
    return squared


def _checked(
    group: RotaryCommutant | PlaneCommutant, SA: Tensor, SB: Tensor
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gram matrices of r rows in the widest dtype, and the dtype of the elements."""
    check_square("Gram matrix SA", SA, group.r)
    check_square("Gram matrix SB", SB, group.r)
    check_batches(SA=SA, SB=SB)
    dtype = compute_dtype(torch.promote_types(SA.dtype, SB.dtype))
    return wide(SA), wide(SB), dtype


def _to_positive(numbers: Tensor) -> Tensor:
    """The phases that make complex numbers positive; 1 for zero."""
    modulus = numbers.abs()
    phase = numbers.conj() / torch.where(modulus > 0, modulus, 1)
    return torch.where(modulus > 0, phase, 1)


# ---- planes that share a frequency ---------------------------------------------------------------


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
    SA, SB, dtype = _checked(group, SA, SB)
    (left, block_A), (right, block_B) = group.parts(SA), group.parts(SB)
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
) -> DressedPair:
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
        phase = _to_positive(first_largest(b))
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
    return DressedPair(other @ A, g @ B, g, other, gap)
