"""Dimensions of orbits: pairs under their groups, lengths, a stream under its rotations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quotientopt.groups import (
    Commutant,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    StructureGroup,
)
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry

# Singular values below this fraction of the largest count as zero.
_RANK = 1e-7


def orbit_dimension(symmetry: HeadSymmetry, free_means: Iterable[Tensor] = ()) -> int:
    """Dimension of the orbit of a symmetry's pairs under its group, over all heads.

    ``dim G`` for pairs of full rank; less the dimension of the stabiliser for others: for GL(r)
    ``(r − rank A)(r − rank B)``.

    Parameters
    ----------
    symmetry : HeadSymmetry
    free_means : iterable of Tensor
        Parameters along one column of which the model computes the same anyway: that column does
        not count, nor does a bias that may be translated.
    """
    means = {id(parameter) for parameter in free_means}
    moved = () if symmetry.translation is None else symmetry.translation.blocks[:1]

    def seen(blocks: Iterable[Block]) -> int:
        return sum(
            block.size[2] - (id(block.parameter) in means and block.size[2] > 1) for block in blocks
        )

    left = symmetry.left_blocks
    right = tuple(b for b in symmetry.right_blocks if b not in moved)
    group = symmetry.group
    A, B = (torch.cat([_wide(b.view()) for b in side], dim=-1) for side in (left, right))
    if isinstance(group, Commutant | RotaryPhases):
        return _rotary_dimension(group, A, B)
    if isinstance(group, O):
        X = group.moving_part(torch.cat((A, B), dim=-1).mT).mT
        size = X.shape[-2]
        lost = size - _ranks(X)
        return symmetry.heads * group.dim - int((lost * (lost - 1) // 2).sum())
    lost_left, lost_right = (
        symmetry.rank - _ranks(X).clamp_max(seen(blocks)) for X, blocks in ((A, left), (B, right))
    )
    return symmetry.heads * group.dim - int((lost_left * lost_right).sum())


def length_dimension(scale: ScaleSymmetry) -> int:
    """How many heads of normalised queries or keys have a length: all that do not vanish."""
    squares = sum(_wide(block.view()).square().sum(dim=(-2, -1)) for block in scale.blocks)
    return int((squares != 0).sum())  # type: ignore[union-attr]


def rotation_dimension(parameters: Iterable[tuple[Tensor, int]], centred: bool, full: int) -> int:
    """Dimension of the orbit of all matrices on a stream under its rotations.

    Parameters
    ----------
    parameters : iterable of (Tensor, int)
        With the axis that is the stream.
    centred : bool
        Whether the all-ones vector stays.
    full : int
        Dimension of the group. Less that of the stabiliser, O(d − k) where the matrices span only
        k dimensions.
    """
    entries = [(p.detach(), axis, p.numel() // p.shape[axis]) for p, axis in parameters]
    if not entries:
        return full
    size = entries[0][0].shape[entries[0][1]] - centred
    total: Tensor | None = None
    vectors, lost = 0, size
    # First what may span the stream by itself, and of that the smallest: one is enough as a rule.
    for parameter, axis, count in sorted(entries, key=lambda e: (e[2] < size, e[0].numel())):
        rows = _wide(parameter).movedim(axis, -1).reshape(count, -1)
        if centred:
            rows = rows - rows.mean(-1, keepdim=True)
        covariance = rows.mT @ rows
        total = covariance if total is None else total + covariance.to(total.device)
        vectors += count
        # Fewer vectors than dimensions span no more than their number.
        lost = size - int(_rank_of_gram(total)) if vectors >= size else size - vectors
        if lost <= 0:
            return full
    if vectors < size:
        assert total is not None
        lost = size - int(_rank_of_gram(total))
    return full - lost * (lost - 1) // 2


def _rotary_dimension(group: StructureGroup, A: Tensor, B: Tensor) -> int:
    phases = isinstance(group, RotaryPhases)
    commutant = group.commutant if isinstance(group, RotaryPhases) else group
    assert isinstance(commutant, RotaryCommutant | PlaneCommutant)
    total, size = 0, len(commutant.pass_rows)
    if isinstance(commutant, RotaryCommutant):
        a, b = (commutant.complex_rows(X).abs().sum(-1) for X in (A, B))
        total = (1 if phases else 2) * int(((a + b) > 0).sum())
        A, B = A[:, commutant.rotary_dim :], B[:, commutant.rotary_dim :]
    else:
        (left, A), (right, B) = (commutant.complex_rows(X) for X in (A, B))
        for a, b in zip(left, right, strict=True):
            m = a.shape[-2]
            if phases:
                lost = m - _ranks(torch.cat((a, b), dim=-1))
                total += int((m**2 - lost**2).sum())
            else:
                total += int((2 * (m**2 - (m - _ranks(a)) * (m - _ranks(b)))).sum())
    if not size:
        return total
    if phases:
        lost = size - _ranks(torch.cat((A, B), dim=-1))
        return total + int((size * (size - 1) // 2 - lost * (lost - 1) // 2).sum())
    return total + int((size**2 - (size - _ranks(A)) * (size - _ranks(B))).sum())


def _ranks(X: Tensor) -> Tensor:
    """Ranks of stacked matrices ``(heads, r, n)``; full where entries are not finite."""
    if X.shape[-2] == 1:
        return (X != 0).any(dim=-1).any(dim=-1).long()
    return _rank_of_gram(X @ X.mH)


def _rank_of_gram(S: Tensor) -> Tensor:
    finite = S.isfinite().all(dim=-1).all(dim=-1)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], S, eye))
    # Of a Gram matrix: the squares of singular values, exact to ε of the largest.
    floor = max(_RANK**2, S.shape[-1] * torch.finfo(S.dtype).eps)
    return (values > floor * values[..., -1:]).sum(-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64)
