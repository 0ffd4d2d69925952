"""The balanced dressing field of rotary heads, from r×r Gram matrices alone."""

import torch
from torch import Tensor

from quotientopt._linalg import Pair, check_square, compute_dtype, locate_first, wide
from quotientopt.groups import RotaryCommutant
from quotientopt.sections.factor import balanced_element


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
    if not isinstance(group, RotaryCommutant):
        raise TypeError(f"group must be a RotaryCommutant, got {group!r}")
    check_square("Gram matrix SA", SA, group.r)
    check_square("Gram matrix SB", SB, group.r)
    dtype = compute_dtype(torch.promote_types(SA.dtype, SB.dtype))
    SA, SB = wide(SA), wide(SB)
    g = torch.zeros_like(SB)
    g_inverse_transpose = torch.zeros_like(SA)
    if group.planes:
        rows = torch.tensor(group.planes, dtype=torch.long, device=SA.device)
        squared_a = _squared_plane_norms(SA, rows, "left factor A", check)
        squared_b = _squared_plane_norms(SB, rows, "right factor B", check)
        scale = (squared_a / squared_b).pow(0.25).unsqueeze(-1)
        g[..., rows, rows] = scale
        g_inverse_transpose[..., rows, rows] = scale.reciprocal()
    if group.pass_rows:
        block = slice(group.rotary_dim, group.r)
        g[..., block, block], g_inverse_transpose[..., block, block] = balanced_element(
            SA[..., block, block], SB[..., block, block], check=check
        )
    return g.to(dtype), g_inverse_transpose.to(dtype)


def _squared_plane_norms(S: Tensor, rows: Tensor, name: str, check: bool) -> Tensor:
    squared = S.diagonal(dim1=-2, dim2=-1)[..., rows].sum(dim=-1)
    if check:
        failed = ~(torch.isfinite(squared) & (squared > 0)).all(dim=-1)
        if bool(failed.any()):
            raise ValueError(
                f"{name} has a vanishing or non-finite rotary plane{locate_first(failed)}: "
                "it has no balanced representative"
            )
    return squared
