"""Frames that are kept: of attention heads, and one of the residual axis for the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt.groups import PlaneCommutant, RotaryCommutant
from quotientopt.optim.checks import RankError
from quotientopt.optim.dressing import (
    head_dressing,
    head_eigenframe,
    holds_rotations_only,
    plane_partners,
)
from quotientopt.optim.slices import Slice
from quotientopt.optim.translations import seen_blocks
from quotientopt.optim.update import break_ties, ema_, next_eigenframe, residual_eigenframe
from quotientopt.symmetries import Block, HeadSymmetry

# Both frames of a matrix come from its first gradient, which they would make diagonal: Adam would
# divide the other entries by their own rounding. A tenth of the weights keeps them away from zero.
ROW_TIES = 100.0

# Of the smallest singular value of AᵀB to the largest, in units of rounding: below it a frame would
# be made of rounding.
LEAST_RATIO = 1e4

# Of frames, when others wrote to a factor: the stretch beyond which they are made anew at once.
STRAYED = 2.0


class FreshDressing(NamedTuple):
    """Dressing of all factors of some head frames, each ``(2S, heads, r, r)``.

    ``field`` acts on gradients, ``contragredient``, its inverse transpose, on factors, and
    ``weights_gram`` holds the Grams of the factors so dressed. ``substituted`` marks heads where
    one factor is rank-deficient and leans on its partner, ``unframed`` those that have no frame
    because both are, ``(2S, heads)``; None if there is none.
    """

    field: Tensor
    contragredient: Tensor
    weights_gram: Tensor
    substituted: Tensor | None
    unframed: Tensor | None


class HeadFrames:
    """Frames u and covariances C of S symmetries with the same group, heads and rank.

    Both sides are kept in one stack of 2S entries, left sides first. Under a group element g a
    frame goes to ``u g^{-1}`` (left) or ``u gᵀ`` (right); the covariance C = EMA(Σ u∂ (u∂)ᵀ) is
    written in the frame and does not change.

    Attributes
    ----------
    frame, covariance : Tensor
        Shape ``(2S, heads, r, r)``; of a ``joint`` frame ``(2S, 1, heads r, heads r)``.
    joint : bool
        Whether one eigenframe turns the rows of all heads together. The dressing field is block
        diagonal then, and what it leaves of the group, rotations head by head, is among the
        rotations that the eigenframe follows.
    partner : Tensor or None
        Partner rows of rotated planes, None for groups without planes.
    """

    def __init__(
        self,
        symmetries: Sequence[HeadSymmetry],
        kind: str,
        *,
        joint: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.symmetries = tuple(symmetries)
        self._places = {id(symmetry): place for place, symmetry in enumerate(symmetries)}
        self.kind = kind
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self.group = self.symmetries[0].group
        rank, heads = self.symmetries[0].rank, self.symmetries[0].heads
        self.joint = joint and rank > 1 and self.turns
        if self.joint:
            rank, heads = rank * heads, 1
        shape = (2 * len(self.symmetries), heads, rank, rank)
        self.frame = torch.zeros(shape, dtype=dtype, device=device)
        self.covariance = torch.zeros(shape, dtype=dtype, device=device)
        partner = plane_partners(self.group, device)
        planes = bool((partner != torch.arange(len(partner), device=device)).any())
        # A frame over all rows leaves no planes as they are, nor anything of their group.
        self.partner = partner if planes and not self.joint else None
        # In float64 the Grams of ill-conditioned float32 factors keep their small directions.
        self.precision = torch.finfo(self.symmetries[0].blocks[0].parameter.dtype).eps
        self.gram_dtype = dtype if device.type == "mps" else torch.float64

    @property
    def turns(self) -> bool:
        """Whether frames are turned to eigenvectors; singular vectors leave nothing to turn."""
        return self.kind != "svd" or holds_rotations_only(self.group)

    def place(self, slice_: Slice) -> int:
        """Entry of a slice's side in the stack."""
        place = self._places[id(slice_.symmetry)]
        return place + len(self.symmetries) if slice_.side == "right" else place

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
        grams = torch.zeros(shape, dtype=self.gram_dtype, device=self.frame.device)
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
        The dressed factors are dressed once more: Grams of factors of condition κ leave
        a field right to ε κ² only, and the second one, close to the identity, to ε. Where both
        are deficient (a pruned channel: a row of zeros in each) there is no field, and the head
        keeps the coordinates it is stored in, as in AdamW, until it has one again.

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
        if one_element:
            grams = self.grams(contragredient)
            supplemented, *_ = self._supplement(grams, lacking)
            again, again_contragredient = self._fields(supplemented, unframed)
            field, contragredient = again @ field, again_contragredient @ contragredient
            dressed = again_contragredient @ grams @ again_contragredient.mT
        fresh = FreshDressing(field, contragredient, dressed, substituted, unframed)
        if not self.joint:
            return fresh
        return FreshDressing(
            block_diagonal(fresh.field),
            block_diagonal(fresh.contragredient),
            block_diagonal(fresh.weights_gram),
            None if substituted is None else substituted.any(-1, keepdim=True),
            unframed,
        )

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
        leaning = (deficient | of_partner) & ~unframed
        return grams, leaning if bool(leaning.any()) else None, unframed

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
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        # A pivot over its diagonal entry is the squared sine of a row's angle to those above it;
        # rounding of the stored parameters alone makes it about the square of their precision.
        least = max(4 * self.precision**2, grams.size(-1) * torch.finfo(grams.dtype).eps)
        flat = (pivots <= least * grams.diagonal(dim1=-2, dim2=-1)).any(-1)
        deficient = (info != 0) | flat | ~grams.isfinite().flatten(-2).all(-1)
        identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
        left, right = torch.where(deficient[..., None, None], identity, factor).chunk(2)
        values = torch.linalg.svdvals(left.mT @ right)
        least = LEAST_RATIO * torch.finfo(grams.dtype).eps
        vanishing = (values[..., -1] <= least * values[..., 0]).repeat(2, 1)
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

    def accumulate(
        self, samples: Tensor, places: Sequence[int], beta: float, gate: Tensor | None = None
    ) -> None:
        """Take Σ u∂ (u∂)ᵀ of this step into the covariance.

        Parameters
        ----------
        samples : Tensor
            Shape ``(K, heads, r, r)``, one per slice that has a gradient.
        places : sequence of int
            Entry of each slice; slices of one entry (weight and bias) are summed.
        beta : float
        gate : Tensor, optional
            Zero where nothing may change.
        """
        total = torch.zeros_like(self.covariance)
        total.index_add_(0, self._index(places), samples)
        touched = sorted(set(places))
        if len(touched) == len(total):
            ema_(self.covariance, total, beta, gate)
            return
        index = self._index(touched)
        part = self.covariance.index_select(0, index)
        ema_(part, total.index_select(0, index), beta, gate)
        self.covariance.index_copy_(0, index, part)

    def _index(self, places: Sequence[int]) -> Tensor:
        """Places on the device, copied there once: a recorded step may copy nothing."""
        key = tuple(places)
        if key not in self._indices:
            self._indices[key] = torch.tensor(places, device=self.frame.device)
        return self._indices[key]

    def strays(self, field: Tensor) -> Tensor:
        """Whether the frames in use fit the parameters no more, from a fresh ``field``.

        The field is a rotation of the frame in coordinates where the frame is one; beyond a factor
        of `STRAYED` a step along some direction is that much too long or too short. No group
        element that moves both changes it.
        """
        old, new = (self._metric(frame.to(field.dtype)) for frame in (self.frame, field))
        missing = (old == 0).flatten(-2).all(-1)[..., None, None]
        identity = torch.eye(old.size(-1), dtype=old.dtype, device=old.device)
        root, _ = torch.linalg.cholesky_ex(torch.where(missing, identity, old))
        half = torch.linalg.solve_triangular(root, new, upper=False)
        ratio = torch.linalg.solve_triangular(root, half.mT, upper=False)
        sound = ratio.isfinite().flatten(-2).all(-1)[..., None, None]
        stretch = torch.linalg.eigvalsh(torch.where(sound & ~missing, ratio, identity))
        outside = (stretch > STRAYED**2) | (stretch < STRAYED**-2)
        return outside.any() | ~(sound | missing).all()

    def _metric(self, frame: Tensor) -> Tensor:
        """uᵀu of every head, ``(2S, heads, r, r)``; no rotation of the frame changes it."""
        metric = frame.mT @ frame
        if not self.joint:
            return metric
        heads, rank = self.symmetries[0].heads, self.symmetries[0].rank
        blocks = metric[:, 0].unflatten(-1, (heads, rank)).unflatten(-3, (heads, rank))
        return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    def begin_refresh(self, field: Tensor) -> Tensor:
        """Write the covariance in the coordinates of a fresh ``field``.

        Returns
        -------
        Tensor
            The change of coordinates field · u^{-1}; the identity where there was no frame.
        """
        identity = torch.eye(self.frame.size(-1), dtype=field.dtype, device=field.device)
        missing = (self.frame == 0).flatten(-2).all(-1)[..., None, None]
        old = torch.where(missing, identity, self.frame.to(field.dtype))
        change = torch.linalg.solve_ex(old, field, left=False).result
        change = torch.where(missing, identity, change)
        self.covariance.copy_(change @ self.covariance.to(field.dtype) @ change.mT)
        return change

    def end_refresh(self, dressing: FreshDressing, change: Tensor) -> Tensor:
        """Turn the field into the eigenframe of the covariance, u = O · field; returns O.

        A frame over all rows follows the covariance by orthogonal iteration from the last frame,
        whose rows in the new field are those of ``change``, as :meth:`begin_refresh` returned it.
        """
        field = dressing.field
        if not self.turns:
            self.frame.copy_(field)
            identity = torch.eye(field.size(-1), dtype=field.dtype, device=field.device)
            return identity.expand_as(field)
        weights_gram = dressing.weights_gram.to(self.covariance)
        if dressing.substituted is not None:
            # The partner's dressed factor is orthonormal there and tells no directions apart, but
            # the other side's gradients do, and they turn alike.
            other = self.covariance.roll(len(self.symmetries), 0)
            weights_gram = torch.where(dressing.substituted[..., None, None], other, weights_gram)
        if self.joint:
            missing = (self.frame == 0).flatten(-2).all(-1)[..., None, None]
            turn = next_eigenframe(self.covariance, change.to(self.covariance))
            if bool(missing.any()):
                first = torch.linalg.eigh(break_ties(self.covariance, weights_gram, times=ROW_TIES))
                turn = torch.where(missing, first.eigenvectors.flip(-1), turn)
            if dressing.unframed is not None:
                turn = self._without(dressing.unframed, turn, weights_gram)
            turn = turn.mT
        else:
            turn = head_eigenframe(self.group, self.covariance, weights_gram)
            if dressing.unframed is not None:
                identity = torch.eye(turn.size(-1), dtype=turn.dtype, device=turn.device)
                turn = torch.where(dressing.unframed[..., None, None], identity, turn)
        self.covariance.copy_(turn @ self.covariance @ turn.mT)
        turn = turn.to(field.dtype)
        self.frame.copy_(turn @ field)
        return turn

    def _without(self, unframed: Tensor, turn: Tensor, weights_gram: Tensor) -> Tensor:
        """Eigenframes over all rows that leave those of unframed heads exactly as they are.

        A channel of zeros would otherwise be moved by the rounding of the others.
        """
        rows = unframed.repeat_interleave(turn.size(-1) // unframed.size(-1), -1)[:, None]
        either = rows[..., :, None] | rows[..., None, :]
        matrix = break_ties(self.covariance, weights_gram, times=ROW_TIES).masked_fill(either, 0)
        # Beyond all eigenvalues, and different, so that their eigenvectors are unit vectors.
        places = torch.linspace(3, 2, rows.size(-1), dtype=matrix.dtype, device=matrix.device)
        vectors = torch.linalg.eigh(matrix + torch.where(rows, places, 0).diag_embed()).eigenvectors
        vectors = vectors.flip(-1)
        own = (vectors.square() * rows[..., :, None]).sum(-2, keepdim=True) > 0.5
        exact = torch.where(rows[..., :, None] & own, vectors.round(), 0)
        apart = torch.where(rows[..., :, None] | own, exact, vectors)
        return torch.where(unframed.any(-1)[:, None, None, None], apart, turn)

    def move_(self, element: Mapping[str, Tensor]) -> None:
        """Move frames along with the parameters: ``u ↦ u g^{-1}`` (left), ``u ↦ u gᵀ`` (right)."""
        for place, symmetry in enumerate(self.symmetries):
            g = element.get(symmetry.name)
            if g is None:
                continue
            left, right = self.frame[place], self.frame[place + len(self.symmetries)]
            g = g.to(self.frame.device, torch.promote_types(g.dtype, self.gram_dtype))
            inverse, transpose = self.group.inverse(g), g.mT
            if self.joint:
                inverse, transpose = block_diagonal(inverse), block_diagonal(transpose)
            left.copy_(left.to(g.dtype) @ inverse)
            right.copy_(right.to(g.dtype) @ transpose)


def block_diagonal(blocks: Tensor) -> Tensor:
    """The matrix with these blocks on its diagonal, ``(…, h, r, r) -> (…, 1, h r, h r)``."""
    heads, rank = blocks.shape[-3:-1]
    identity = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    # Entry (h, i), (k, j) is δ_hk blocks[h, i, j].
    spread = blocks[..., :, :, None, :] * identity[:, None, :, None]
    return spread.reshape(*blocks.shape[:-3], 1, heads * rank, heads * rank)


class SharedResidualFrame:
    """One residual frame for all matrices of a stream, from their pooled covariance.

    Attributes
    ----------
    covariance, frame, change : Tensor
        R, Q and Q_oldᵀ Q_new, each ``(d, d)``.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (dimension, dimension)
        self.covariance = torch.zeros(shape, dtype=dtype, device=device)
        self.frame = torch.zeros(shape, dtype=dtype, device=device)
        self.change = torch.zeros(shape, dtype=dtype, device=device)
        self._sum = torch.zeros(shape, dtype=dtype, device=device)
        self.oriented = False

    def add(self, gram: Tensor) -> None:
        """Pool the Gram of one bucket's dressed gradients in this step."""
        self._sum.add_(gram)

    def accumulate(self, beta: float, gate: Tensor | None = None) -> None:
        """Take the pooled Gram of this step into the covariance, unless the gate is zero."""
        ema_(self.covariance, self._sum, beta, gate)
        self._sum.zero_()

    def refresh(self, weights_gram: Tensor | None) -> None:
        """Turn to the eigenvectors of the covariance: the first time with the weights' Gram."""
        if weights_gram is None:
            frame = next_eigenframe(self.covariance, self.frame)
        else:
            frame = residual_eigenframe(self.covariance, weights_gram, weights_gram)
        self.oriented = True
        self.change = self.frame.mT @ frame
        self.frame.copy_(frame)
