"""Dressing fields of rotary heads under their commutant: complex planes and passing rows."""

from functools import partial

import torch
from torch import Tensor

from quotientopt._linalg import (
    Pair,
    check_batches,
    check_square,
    compute_dtype,
    first_largest,
    locate_first,
    row_signs,
    wide,
)
from quotientopt.groups import RotaryCommutant
from quotientopt.sections.factor import check_factors, check_kind, dress, element


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
    kind: str, group: RotaryCommutant, SA: Tensor, SB: Tensor, *, check: bool = True
) -> Pair:
    """Element of the section `kind` in a rotary commutant, from Gram matrices.

    Each plane is a pair of complex rows a and b that the group multiplies by one complex number.
    ``"svd"`` and ``"balanced"`` scale both to the length ``(|a| |b|)^{1/2}``; ``"orthonormal"`` and
    ``"triangular"`` scale b to length 1, and a may vanish. The passing rows are dressed by the
    section of the same name of :mod:`quotientopt.sections`.

    Residual group: U(1) for each plane, and on the passing rows that of the section.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
    group, SA, SB, check
        As for :func:`rotary_balanced_element`, returns and errors too.
    """
    check_kind(kind)
    if not isinstance(group, RotaryCommutant):
        raise TypeError(f"group must be a RotaryCommutant, got {group!r}")
    check_square("Gram matrix SA", SA, group.r)
    check_square("Gram matrix SB", SB, group.r)
    check_batches(SA=SA, SB=SB)
    dtype = compute_dtype(torch.promote_types(SA.dtype, SB.dtype))
    SA, SB = wide(SA), wide(SB)
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


def rotary_section(
    kind: str, group: RotaryCommutant, A: Tensor, B: Tensor, *, check: bool = True
) -> tuple[Pair, Tensor]:
    """Canonical representative of (A, B) under a rotary commutant, and the element leading to it.

    For ``"svd"`` the phases are fixed as well: in the dressed complex row b of each plane the entry
    of largest modulus is real and positive (of several equal ones the first), and in each dressed
    passing row of B the entry of largest modulus is positive. So ``"svd"`` leaves no residual group
    but O(k) where k singular values of the passing block coincide.

    Parameters
    ----------
    kind : {"svd", "balanced", "orthonormal", "triangular"}
    group : RotaryCommutant
    A, B, check
        As for :func:`quotientopt.sections.section`, returns and errors too.
    """
    check_factors(A, B)
    element_of = partial(rotary_element, kind, group)
    (dressed_A, dressed_B), g, _ = dress(element_of, A, B, check=check)
    if kind == "svd":
        turn = _turn_to_convention(group, dressed_B)
        dressed_A, dressed_B, g = turn @ dressed_A, turn @ dressed_B, turn @ g
    dtype = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    return (dressed_A.to(A.dtype), dressed_B.to(B.dtype)), g.to(dtype)


def _turn_to_convention(group: RotaryCommutant, B: Tensor) -> Tensor:
    """Phases and signs that put the largest entry of every row on the positive axis."""
    passing = B[..., group.rotary_dim :, :]
    block = torch.diag_embed(row_signs(passing).squeeze(-1)) if group.pass_rows else None
    planes = group.complex_rows(B)
    largest = first_largest(planes).squeeze(-1) if group.planes else planes[..., 0]
    phase = largest.conj() / largest.abs()
    return group.element(phase, block)


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
