"""Dressing fields: what reduces the structure group of a head to rotations.

A field u sends a covector ∂ of one side to dressed coordinates ``u ∂``. Under the group it goes to
``u g^{-1}`` (left side) or ``u gᵀ`` (right side), so that ``u ∂`` is invariant and ``uᵀ · (function
of u ∂)`` is a tangent vector (François & Ravera, arXiv 2602.18948). First the field of one pair
from its Gram matrices, then :class:`DressedHeads`, those of many heads at once, of which some may
be rank-deficient. What rotations are left, eigenframes fix: :mod:`quotientopt.optim.eigenframes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import rows_depend
from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StructureGroup,
)
from quotientopt.optim.bookkeeping.checks import RankError
from quotientopt.optim.gauge import seen_blocks
from quotientopt.sections.factor import balancing_pair, svd_element, triangular_element
from quotientopt.sections.rotary import plane_element
from quotientopt.symmetries import Block, HeadSymmetry

# Of the smallest singular value of AᵀB to the largest, in units of rounding: below it a frame would
# be made of rounding.
LEAST_RATIO = 1e4


def holds_rotations_only(group: StructureGroup) -> bool:
    """Whether all elements are rotations, which no section reduces and every eigenframe follows."""
    return isinstance(group, O | RotaryPhases)


class HeadDressing(NamedTuple):
    """Dressing fields of the two sides and their inverse transposes, each ``(…, r, r)``.

    ``left ∂_A`` and ``right ∂_B`` are the dressed gradients; ``left_contragredient A`` and
    ``right_contragredient B`` are the dressed factors.
    """

    left: Tensor
    left_contragredient: Tensor
    right: Tensor
    right_contragredient: Tensor


def head_dressing(
    kind: str, group: StructureGroup, left_gram: Tensor, right_gram: Tensor
) -> HeadDressing:
    """Dressing fields that reduce ``group`` to a compact group, from the Grams AAᵀ and BBᵀ.

    ``"balanced"`` and ``"svd"`` use one group element g with equal diagonal Grams of
    ``(g^{-T} A, g B)``: ∂_A ↦ g ∂_A, ∂_B ↦ g^{-T} ∂_B. ``"orthonormal"`` sees each side through
    orthonormal coordinates of its partner: ∂_A ↦ L_B^{-1} ∂_A, ∂_B ↦ L_A^{-1} ∂_B with Cholesky
    factors L, so that step sizes are absolute in AᵀB.

    Parameters
    ----------
    kind : {"balanced", "orthonormal", "svd"}
    group : GL, RotaryCommutant, PlaneCommutant, O or RotaryPhases
        Rotations need no reduction: identity fields. The rotated planes of a RotaryCommutant are
        scaled, plane by plane. Those of a PlaneCommutant have the complex sections of each
        frequency; ``"orthonormal"`` the symmetric root in place of the Cholesky factor.
    left_gram, right_gram : Tensor
        Shape ``(…, r, r)``, positive definite.

    Raises
    ------
    TypeError
        If frames for this group are not known.
    """
    if holds_rotations_only(group):
        identity = torch.eye(group.r, dtype=left_gram.dtype, device=left_gram.device)
        identity = identity.expand_as(left_gram)
        return HeadDressing(identity, identity, identity, identity)
    if isinstance(group, GL) or (isinstance(group, Scale) and group.r == 1):
        # The sections of single rows have positive elements.
        return _linear_dressing(kind, left_gram, right_gram)
    if isinstance(group, PlaneCommutant):
        return _complex_dressing(kind, group, left_gram, right_gram)
    if not isinstance(group, RotaryCommutant):
        raise TypeError(f"no head frames for the group {group}")
    scales = _plane_dressing(kind, group, left_gram, right_gram)
    if not len(group.pass_rows):
        return HeadDressing(*(scale.diag_embed() for scale in scales))
    rows = torch.as_tensor(group.pass_rows, device=left_gram.device)
    passing = _linear_dressing(
        kind, left_gram[..., rows[:, None], rows], right_gram[..., rows[:, None], rows]
    )
    fields = []
    for scale, block in zip(scales, passing, strict=True):
        field = scale.diag_embed()
        field[..., rows[:, None], rows] = block
        fields.append(field)
    return HeadDressing(*fields)


def _linear_dressing(kind: str, left_gram: Tensor, right_gram: Tensor) -> HeadDressing:
    if kind in ("balanced", "svd"):
        of_kind = balancing_pair if kind == "balanced" else partial(svd_element, check=False)
        g, contragredient = of_kind(left_gram, right_gram)
        return HeadDressing(g, contragredient, contragredient, g)
    left, left_contragredient = triangular_element(left_gram, right_gram, check=False)
    right, right_contragredient = triangular_element(right_gram, left_gram, check=False)
    return HeadDressing(left, left_contragredient, right, right_contragredient)


def _complex_dressing(
    kind: str, group: PlaneCommutant, left_gram: Tensor, right_gram: Tensor
) -> HeadDressing:
    if kind in ("balanced", "svd"):
        g, contragredient = plane_element(kind, group, left_gram, right_gram, check=False)
        return HeadDressing(g, contragredient, contragredient, g)
    left, left_contragredient = plane_element(kind, group, left_gram, right_gram, check=False)
    right, right_contragredient = plane_element(kind, group, right_gram, left_gram, check=False)
    return HeadDressing(left, left_contragredient, right, right_contragredient)


def _plane_dressing(
    kind: str, group: RotaryCommutant, left_gram: Tensor, right_gram: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonals of the fields on the rotated planes (ones on the rows that pass)."""
    partner = plane_partners(group, left_gram.device)
    left, right = (
        (diagonal + diagonal[..., partner]).sqrt()
        for diagonal in (
            left_gram.diagonal(dim1=-2, dim2=-1),
            right_gram.diagonal(dim1=-2, dim2=-1),
        )
    )
    if kind == "orthonormal":
        fields = (right.reciprocal(), right, left.reciprocal(), left)
    else:
        scale = (left / right).sqrt()
        fields = (scale, scale.reciprocal(), scale.reciprocal(), scale)
    rotated = partner != torch.arange(group.r, device=partner.device)
    first, second, third, fourth = (torch.where(rotated, field, 1.0) for field in fields)
    return first, second, third, fourth


def plane_partners(group: StructureGroup, device: torch.device) -> Tensor:
    """Row index of each row's partner in its rotated plane; rows that pass are their own."""
    partner = torch.arange(group.r, device=device)
    if isinstance(group, RotaryCommutant | PlaneCommutant) and group.planes:
        planes = torch.as_tensor(group.planes, device=device)
        partner[planes[:, 0]] = planes[:, 1]
        partner[planes[:, 1]] = planes[:, 0]
    return partner


class FreshDressing(NamedTuple):
    """Dressing of all factors of some head frames, each ``(2S, heads, r, r)``.

    Attributes
    ----------
    field : Tensor
        Acts on gradients; of ``joint`` frames one block-diagonal matrix of all heads.
    contragredients, weights_grams : Tensor
        Its inverse transpose head by head, which acts on factors, and the Grams of the factors so
        dressed.
    substituted, unframed : Tensor, optional
        Heads where one factor is rank-deficient and seen through its partner, and those without a
        frame because both are, ``(2S, heads)``; None if there is none.
    joint : bool
    """

    field: Tensor
    contragredients: Tensor
    weights_grams: Tensor
    substituted: Tensor | None
    unframed: Tensor | None
    joint: bool

    @property
    def contragredient(self) -> Tensor:
        """The inverse transpose of ``field``."""
        return block_diagonal(self.contragredients) if self.joint else self.contragredients

    @property
    def weights_gram(self) -> Tensor:
        """Grams of the dressed factors; of ``joint`` frames without products between heads."""
        return block_diagonal(self.weights_grams) if self.joint else self.weights_grams


class DressedHeads:
    """S symmetries with the same group, heads and rank, dressed by sections of their factors.

    Both sides are kept in one stack of 2S entries, left sides first.

    Attributes
    ----------
    joint : bool
        Whether the fields of all heads are one block-diagonal matrix.
    """

    def __init__(
        self,
        symmetries: Sequence[HeadSymmetry],
        kind: str,
        *,
        joint: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.symmetries = tuple(symmetries)
        self.kind = kind
        self.device = device
        self.group = self.symmetries[0].group
        # Whether frames are turned to eigenvectors; singular vectors leave nothing to turn.
        self.turns = kind != "svd" or holds_rotations_only(self.group)
        self.joint = joint and self.symmetries[0].rank > 1 and self.turns
        # In float64 the Grams of ill-conditioned float32 factors keep their small directions.
        self.precision = torch.finfo(self.symmetries[0].blocks[0].parameter.dtype).eps
        self.gram_dtype = dtype if device.type == "mps" else torch.float64

    def grams(self, contragredient: Tensor | None = None) -> Tensor:
        """Gram matrices of all factors, shape ``(2S, heads, r, r)``; dressed ones where given how.

        Without biases that may be translated, or the dressing would see by how much.
        """
        sides = [s.left_blocks for s in self.symmetries]
        sides += [seen_blocks(s) for s in self.symmetries]
        by_size: dict[tuple[int, ...], list[tuple[int, Block]]] = defaultdict(list)
        for place, blocks in enumerate(sides):
            for block in blocks:
                by_size[block.size].append((place, block))
        rank, heads = self.symmetries[0].rank, self.symmetries[0].heads
        shape = (len(sides), heads, rank, rank)
        grams = torch.zeros(shape, dtype=self.gram_dtype, device=self.device)
        for entries in by_size.values():
            stacked = torch.stack([block.view() for _, block in entries]).to(self.gram_dtype)
            places = torch.tensor([place for place, _ in entries], device=grams.device)
            if contragredient is not None:
                stacked = contragredient.index_select(0, places) @ stacked
            grams.index_add_(0, places, stacked @ stacked.mT)
        return grams

    def dressing(self) -> FreshDressing:
        """Fresh dressing fields of the parameters as they are now; changes nothing.

        Where one factor of a head is rank-deficient (zero at the start, say), its partner's
        orthonormal coordinates serve for both: its Gram is taken to be the partner's inverse.
        Where Grams are no wider than the factors, the dressed factors are dressed once more: Grams
        of condition κ² leave a field right to ε κ² only, and the second one, close to the identity,
        to ε. Where both are deficient (a pruned channel: a row of zeros in each) there is no field,
        and the head keeps the coordinates it is stored in, as in AdamW, until it has one again.

        Raises
        ------
        RankError
            If a factor is not finite; names the symmetry.
        """
        grams = self.grams()
        lacking = self._lacking(grams)
        supplemented, substituted, unframed = self._supplement(grams, lacking)
        field, contragredient = self._fields(supplemented, unframed)
        dressed = contragredient @ grams @ contragredient.mT
        # The coordinates of "orthonormal" are not those of one group element.
        one_element = self.kind != "orthonormal" and not holds_rotations_only(self.group)
        if one_element and torch.finfo(self.gram_dtype).eps >= self.precision:
            grams = self.grams(contragredient)
            supplemented, *_ = self._supplement(grams, lacking)
            again, again_contragredient = self._fields(supplemented, unframed)
            field, contragredient = again @ field, again_contragredient @ contragredient
            dressed = again_contragredient @ grams @ again_contragredient.mT
        if self.joint:
            field = block_diagonal(field)
            substituted = None if substituted is None else substituted.any(-1, keepdim=True)
        return FreshDressing(field, contragredient, dressed, substituted, unframed, self.joint)

    def _fields(self, grams: Tensor, unframed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dressing fields of both sides and their inverse transposes, each ``(2S, heads, r, r)``.

        The identity for heads that have no frame, whose Grams are of no use.
        """
        identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
        if unframed is not None:
            grams = torch.where(unframed[..., None, None], identity, grams)
        dressing = head_dressing(self.kind, self.group, *grams.chunk(2))
        field = torch.cat([dressing.left, dressing.right])
        contragredient = torch.cat([dressing.left_contragredient, dressing.right_contragredient])
        if unframed is None:
            return field, contragredient
        return (
            torch.where(unframed[..., None, None], identity, field),
            torch.where(unframed[..., None, None], identity, contragredient),
        )

    def _supplement(
        self, grams: Tensor, lacking: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The Grams, those of rank-deficient factors replaced by the inverse of the partner's.

        Both balanced and orthonormal dressing then see the pair through orthonormal coordinates
        of the partner, and the replacement moves with the group as the Gram itself does. Also
        returns which heads this was done for, and where both factors are deficient, on both sides.
        """
        if isinstance(self.group, RotaryCommutant | PlaneCommutant):
            grams = self.group.algebra_projection(grams)
        if lacking is None:
            return grams, None, None
        deficient, vanishing = lacking
        of_partner = deficient.roll(len(self.symmetries), 0)
        unframed = deficient & of_partner | vanishing
        if self.kind == "svd":
            # Singular vectors of a deficient product are not all defined.
            unframed = deficient | of_partner | vanishing
        identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
        sound = torch.where(deficient[..., None, None], identity, grams)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(sound).L)
        partners = inverses.roll(len(self.symmetries), 0)
        grams = torch.where(deficient[..., None, None], partners, grams)
        substituted = (deficient | of_partner) & ~unframed
        return grams, substituted if bool(substituted.any()) else None, unframed

    def _lacking(self, grams: Tensor) -> tuple[Tensor, Tensor] | None:
        """What :meth:`_deficient` finds, None where it finds nothing.

        Raises
        ------
        RankError
            If a factor is not finite.
        """
        if holds_rotations_only(self.group):
            return None
        if isinstance(self.group, RotaryCommutant | PlaneCommutant):
            # Planes need only differ from zero, the rows that pass need full rank.
            grams = self.group.algebra_projection(grams)
        deficient, vanishing = self._deficient(grams)
        if not bool((deficient | vanishing).any()):
            return None
        broken = ~grams.isfinite().flatten(-2).all(-1)
        if bool(broken.any()):
            self._refuse(broken)
        return deficient, vanishing

    def _deficient(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each factor is rank-deficient (or not finite), and whether its pair vanishes.

        Each ``(2S, heads)``. Rows that are tiny in both factors have full rank, but a singular
        value of AᵀB, which no group element changes, that is rounding against the largest one.
        """
        factor, info = torch.linalg.cholesky_ex(grams)
        dependent = (info != 0) | rows_depend(factor, grams, 2 * self.precision)
        deficient = dependent | ~grams.isfinite().flatten(-2).all(-1)
        identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
        left, right = torch.where(deficient[..., None, None], identity, factor).chunk(2)
        least = LEAST_RATIO * torch.finfo(grams.dtype).eps
        vanishing = (smallest_ratio(left, right) <= least).repeat(2, 1)
        return deficient, vanishing & ~deficient & ~deficient.roll(len(self.symmetries), 0)

    def _refuse(self, broken: Tensor) -> None:
        entry, head = broken.nonzero()[0].tolist()
        symmetry = self.symmetries[entry % len(self.symmetries)]
        side = "left" if entry < len(self.symmetries) else "right"
        names = " or ".join(repr(b.name) for b in getattr(symmetry, f"{side}_blocks") if b.name)
        raise RankError(
            f"symmetry {symmetry.name!r}: the {side} factor of head {head} is not finite; nothing "
            f"was updated. Give {names or 'its parameters'} the values of a checkpoint"
        )


def smallest_ratio(left: Tensor, right: Tensor) -> Tensor:
    """1 / (‖M‖_F ‖M⁻¹‖_F) for M = LᵀR of triangular L, R: singular values' smallest over largest.

    Within a factor of the size, and from two triangular solves where singular values would cost an
    iteration. Zero where M is singular.
    """
    identity = torch.eye(left.size(-1), dtype=left.dtype, device=left.device)
    inverse = torch.linalg.solve_triangular(left, identity, upper=False).mT
    inverse = torch.linalg.solve_triangular(right, inverse, upper=False)
    sizes = torch.linalg.matrix_norm(left.mT @ right) * torch.linalg.matrix_norm(inverse)
    return sizes.reciprocal().nan_to_num(0.0)


def block_diagonal(blocks: Tensor) -> Tensor:
    """The matrix with these blocks on its diagonal, ``(…, h, r, r) -> (…, 1, h r, h r)``."""
    heads, rank = blocks.shape[-3:-1]
    spread = blocks.new_zeros(*blocks.shape[:-3], heads, rank, heads, rank)
    # Entry (h, i), (k, j) is δ_hk blocks[h, i, j].
    spread.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return spread.reshape(*blocks.shape[:-3], 1, heads * rank, heads * rank)
