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


class FreshDressing(NamedTuple):
    """Dressing of all factors of some head frames, each ``(2S, heads, r, r)``.

    ``field`` acts on gradients, ``contragredient``, its inverse transpose, on factors, and
    ``weights_gram`` holds the Grams of the factors so dressed. ``leaning`` marks heads where one
    factor is rank-deficient and leans on its partner, ``(2S, heads)``; None if there is none.
    """

    field: Tensor
    contragredient: Tensor
    weights_gram: Tensor
    substituted: Tensor | None


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
        Otherwise the dressed factors are dressed once more: Grams of factors of condition κ leave
        a field right to ε κ² only, and the second one, close to the identity, to ε.

        Raises
        ------
        RankError
            If both factors of a head are rank-deficient, or one is not finite; names the symmetry.
        """
        grams = self.grams()
        supplemented, substituted = self._supplement(grams)
        field, contragredient = self._fields(supplemented)
        dressed = contragredient @ grams @ contragredient.mT
        # The coordinates of "orthonormal" are not those of one group element.
        one_element = self.kind != "orthonormal" and not holds_rotations_only(self.group)
        if substituted is None and one_element:
            grams = self.grams(contragredient)
            again, again_contragredient = self._fields(grams)
            field, contragredient = again @ field, again_contragredient @ contragredient
            dressed = again_contragredient @ grams @ again_contragredient.mT
        fresh = FreshDressing(field, contragredient, dressed, substituted)
        if not self.joint:
            return fresh
        return FreshDressing(
            block_diagonal(fresh.field),
            block_diagonal(fresh.contragredient),
            block_diagonal(fresh.weights_gram),
            None if substituted is None else substituted.any(-1, keepdim=True),
        )

    def _fields(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """Dressing fields of both sides, and their inverse transposes, ``(2S, heads, r, r)``."""
        dressing = head_dressing(self.kind, self.group, *grams.chunk(2))
        return (
            torch.cat([dressing.left, dressing.right]),
            torch.cat([dressing.left_contragredient, dressing.right_contragredient]),
        )

    def _supplement(self, grams: Tensor) -> tuple[Tensor, Tensor | None]:
        """The Grams, those of rank-deficient factors replaced by the inverse of the partner's.

        Both balanced and orthonormal dressing then see the pair through orthonormal coordinates
        of the partner, and the replacement moves with the group as the Gram itself does. Also
        returns which heads this was done for, on both sides.
        """
        if holds_rotations_only(self.group):
            return grams, None
        if isinstance(self.group, RotaryCommutant | PlaneCommutant):
            # Planes need only differ from zero, the rows that pass need full rank.
            grams = self.group.algebra_projection(grams)
        deficient = self._deficient(grams)
        if not bool(deficient.any()):
            return grams, None
        of_partner = deficient.roll(len(self.symmetries), 0)
        both = deficient & of_partner
        if self.kind == "svd":
            both = deficient  # singular vectors of a deficient product are not all defined
        refused = both | ~grams.isfinite().flatten(-2).all(-1)
        if bool(refused.any()):
            self._refuse(refused, grams)
        identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
        sound = torch.where(deficient[..., None, None], identity, grams)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(sound).L)
        partners = inverses.roll(len(self.symmetries), 0)
        return torch.where(deficient[..., None, None], partners, grams), deficient | of_partner

    def _deficient(self, grams: Tensor) -> Tensor:
        """Whether each factor is rank-deficient (or not finite), ``(2S, heads)``."""
        factor, info = torch.linalg.cholesky_ex(grams)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        # A pivot over its diagonal entry is the squared sine of a row's angle to those above it;
        # rounding of the stored parameters alone makes it about the square of their precision.
        least = max(4 * self.precision**2, grams.size(-1) * torch.finfo(grams.dtype).eps)
        flat = (pivots <= least * grams.diagonal(dim1=-2, dim2=-1)).any(-1)
        return (info != 0) | flat | ~grams.isfinite().flatten(-2).all(-1)

    def _refuse(self, refused: Tensor, grams: Tensor) -> None:
        entry, head = divmod(int(refused.flatten().nonzero()[0]), grams.size(1))
        symmetry = self.symmetries[entry % len(self.symmetries)]
        side = "left" if entry < len(self.symmetries) else "right"
        problem = f"both factors of head {head} are rank-deficient"
        if not grams[entry, head].isfinite().all():
            problem = f"the {side} factor of head {head} is not finite"
        elif self.kind == "svd":
            problem = f"the {side} factor of head {head} is rank-deficient"
        raise RankError(
            f"symmetry {symmetry.name!r}: {problem}, so that its head frame is undefined; "
            "initialise it at full row rank, or leave head frames out with head_frame=None"
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
            turn = turn.mT
        else:
            turn = head_eigenframe(self.group, self.covariance, weights_gram)
        self.covariance.copy_(turn @ self.covariance @ turn.mT)
        turn = turn.to(field.dtype)
        self.frame.copy_(turn @ field)
        return turn

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
