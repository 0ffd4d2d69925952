"""Low-rank pairs whose coordinates follow the factors at every step, all of one rank at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, wide_dtype
from quotientopt.optim.errors import RankError
from quotientopt.optim.leaves import SIDES, Leaf
from quotientopt.optim.low_rank import (
    Coordinates,
    carry_covariance_,
    coefficients,
    eigenframe,
    next_coordinates,
    position_moment,
    spanning_coordinates,
)
from quotientopt.optim.low_rank_stack import Stack, is_transposed
from quotientopt.symmetries import HeadSymmetry

COVARIANCE_BETA = 0.95


class Prepared(NamedTuple):
    """What a step needs to know of factors and gradients; nothing has changed yet.

    ``active`` marks the legs that take part, ``(2S,)``, ``turns`` is whether frames are turned to
    eigenframes, and ``whole`` whether all legs are known to take part.
    """

    weights: list[Tensor]
    coordinates: Coordinates
    active: Tensor
    dressed: list[Tensor]
    turns: bool
    whole: bool


class LowRankPairs:
    """S low-rank pairs of one rank, param group, dtype and device.

    The 2S factors are sorted by their number of columns, so that those with equally many form one
    :class:`Stack`, whatever side they are. Entry j of everything r×r belongs to the leg of factor
    j, seen through its partner.

    Attributes
    ----------
    frame : Tensor
        w, ``(2S, r, r)``: dressed gradients are w∂, updates wᵀ(…). Zero before the first step.
    covariance : Tensor
        C = EMA(w∂ (w∂)ᵀ), written in the frame, ``(2S, r, r)``.
    counts : Tensor
        Updates of each leg, ``(2S,)``.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        options: Mapping[str, Any],
    ) -> None:
        self.options = options
        self.group_index = leaves[0].group_index
        symmetries = list(dict.fromkeys(leaf.symmetry for leaf in leaves if leaf.symmetry))
        factors = sorted(
            (
                (symmetry, side, blocks[0])
                for symmetry in symmetries
                for side, blocks in zip(
                    SIDES, (symmetry.left_blocks, symmetry.right_blocks), strict=True
                )
            ),
            key=lambda factor: (factor[2].size[2], not is_transposed(factor[2])),
        )
        self.symmetries: list[HeadSymmetry] = [symmetry for symmetry, _, _ in factors]
        self.sides = [side for _, side, _ in factors]
        self.blocks = [block for _, _, block in factors]
        place = {(id(s), side): i for i, (s, side, _) in enumerate(factors)}
        other = dict(zip(SIDES, reversed(SIDES), strict=True))
        partners = [place[id(s), other[side]] for s, side, _ in factors]
        own = {(id(leaf.symmetry), leaf.side): leaf for leaf in leaves}
        self.legs = [own.get((id(s), side)) for s, side, _ in factors]
        parameter = self.blocks[0].parameter
        self.device, self.dtype = parameter.device, compute_dtype(parameter.dtype)
        self.rank = symmetries[0].rank
        self.partner = torch.tensor(partners, device=self.device)
        keeps_master = options["master_weights"] and parameter.dtype != self.dtype
        self.stacks: list[Stack] = []
        sizes = [block.size[2] for block in self.blocks]
        for size in dict.fromkeys(sizes):
            rows = slice(sizes.index(size), sizes.index(size) + sizes.count(size))
            stack = Stack(self.blocks[rows], rows, self.dtype, keeps_master=keeps_master)
            self.stacks.append(stack)
        shape = (len(factors), self.rank, self.rank)
        self.frame = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.covariance = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.counts = torch.zeros(len(factors), device=self.device)
        self._identity = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        self.ticks = 0
        self._all_seen = False

    def entries(self) -> Iterator[tuple[Leaf, str, Tensor]]:
        """Every tensor of the state, under the leg that it belongs to."""
        partner = self.partner.tolist()
        of_factor = [
            (stack, i) for stack in self.stacks for i in range(stack.rows.stop - stack.rows.start)
        ]
        for j, leaf in enumerate(self.legs):
            if leaf is None:
                continue
            stack, i = of_factor[j]
            yield leaf, "step", self.counts[j]
            yield leaf, "exp_avg", stack.exp_avg[i]
            yield leaf, "exp_avg_sq", stack.exp_avg_sq[i]
            yield leaf, "head_frame", self.frame[j]
            yield leaf, "head_covariance", self.covariance[j]
            stack_of_partner, i_of_partner = of_factor[partner[j]]
            yield leaf, "partner_coordinates", stack_of_partner.coordinates[i_of_partner]
            if stack.master is not None:
                yield leaf, "master", stack.master[i]

    def adopted(self) -> None:
        """Go on from a state that was just copied into the entries."""
        self.ticks = int(self.counts.max())
        self._all_seen = False

    def prepare(self, capturing: bool = False) -> Prepared | None:
        """Coordinates of the factors as they are now and dressed gradients; changes nothing.

        Returns
        -------
        Prepared or None
            None where no leg has a gradient.

        Raises
        ------
        RankError
            If both factors of a pair are zero, or one is not finite.
        """
        given = [None if leaf is None else leaf.parameter.grad for leaf in self.legs]
        missing = [gradient is None for gradient in given]
        if all(missing):
            return None
        weights = [stack.weights() for stack in self.stacks]
        tick, every = self.ticks + 1, self.options["refresh_every"]
        turns = not capturing and (tick <= every or tick % every == 0)
        gram = self._grams(weights)
        coordinates = next_coordinates(self.frame, gram)
        on_host = self.device.type == "cpu"
        if (on_host or turns) and not bool(coordinates.defined.all()):
            coordinates = self._recover(coordinates, gram, given)
            turns = True
        active = coordinates.defined
        if any(missing):
            active = active & ~torch.tensor(missing, device=self.device)
        turns = turns or (not capturing and self._has_new(active))
        field = (coordinates.frame * active[:, None, None]).to(self.dtype)
        dressed = []
        for stack in self.stacks:
            gradients = stack.gradients(given[stack.rows])
            if self.options["maximize"]:
                gradients.neg_()
            dressed.append(field[stack.rows] @ gradients)
        whole = on_host and bool(active.all())
        return Prepared(weights, coordinates, active, dressed, turns, whole)

    def _grams(self, weights: Sequence[Tensor]) -> Tensor:
        """Gram matrices of each leg's partner, in the widest precision."""
        grams = [stack.grams(own) for stack, own in zip(self.stacks, weights, strict=True)]
        return torch.cat(grams).index_select(0, self.partner)

    def _recover(
        self, found: Coordinates, gram: Tensor, given: Sequence[Tensor | None]
    ) -> Coordinates:
        """Coordinates where the last step's frames lead to none.

        They start anew where the partner has full rank again. Where it has not, the leg waits, and
        only if its own factor is rank-deficient too, so that both would wait, it goes on in the
        directions that the partner has.
        """
        if not bool(gram.isfinite().all()):
            self._refuse(~gram.isfinite().flatten(-2).all(-1), "is not finite")
        fresh = next_coordinates(torch.zeros_like(gram), gram)
        frame = torch.where(found.defined[:, None, None], found.frame, fresh.frame)
        defined = found.defined | fresh.defined
        stuck = ~defined & ~defined.index_select(0, self.partner)
        if not bool(stuck.any()):
            return Coordinates(frame, defined)
        spanned = spanning_coordinates(gram)
        frame = torch.where(stuck[:, None, None], spanned.frame, frame)
        defined = torch.where(stuck, spanned.defined, defined)
        lost = stuck & ~defined & ~defined.index_select(0, self.partner)
        lost &= torch.tensor([gradient is not None for gradient in given], device=self.device)
        if bool(lost.any()):
            self._refuse(lost, "is zero, as is its partner")
        return Coordinates(frame, defined)

    def _has_new(self, active: Tensor) -> bool:
        """Whether a leg takes its first step: its frame is not an eigenframe yet."""
        if self._all_seen:
            return False
        seen = self.counts > 0
        trained = torch.tensor([leaf is not None for leaf in self.legs], device=self.device)
        self._all_seen = bool((seen | ~trained).all())
        return bool((active & ~seen).any())

    def _refuse(self, legs: Tensor, problem: str) -> None:
        """Refuse the first of the legs that are marked, whose partner has the problem."""
        factor = int(self.partner[int(legs.nonzero()[0])])
        raise RankError(
            f"symmetry {self.symmetries[factor].name!r}: the {self.sides[factor]} factor "
            f"{problem}, so that no coordinates are defined; initialise it, or use lora_frame=None"
        )

    def step(self, prepared: Prepared, group: Mapping[str, Any], gate: Tensor | None) -> None:
        """Carry the state into the new coordinates, update moments and parameters."""
        weights, coordinates, active, dressed, turns, whole = prepared
        mask = active.to(self.dtype)
        if gate is not None:
            mask = mask * gate
        changes = mask[:, None, None]
        frame = coordinates.frame.to(self.dtype)
        overlap = self._follow(frame, weights, None if whole and gate is None else changes)
        self.frame.copy_(torch.where(changes > 0, frame, self.frame))
        sample = torch.cat([z @ z.mT for z in dressed])
        carry_covariance_(self.covariance, overlap, sample, COVARIANCE_BETA, mask)
        if turns:
            turn = self._turn(changes)
            overlap = turn @ overlap
            dressed = [turn[s.rows] @ z for s, z in zip(self.stacks, dressed, strict=True)]
        self.counts.add_(mask)
        self.ticks += 1
        own = coefficients(
            overlap,
            # A leg without any step yet has moments of zero; any positive count will do.
            self.counts.clamp_min(1),
            changes,
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"],
        )
        for stack, factors, z in zip(self.stacks, weights, dressed, strict=True):
            rows = stack.rows
            stack.update_(factors, z, self.frame[rows], own.of(rows), changes[rows], group)

    def _follow(self, frame: Tensor, weights: Sequence[Tensor], changes: Tensor | None) -> Tensor:
        """Move coordinates along with the factors; R = new · oldᵀ of each leg's partner."""
        of_factors = frame.index_select(0, self.partner)
        gates = None if changes is None else changes.index_select(0, self.partner)
        overlaps = [
            stack.follow_(own, of_factors[stack.rows], None if gates is None else gates[stack.rows])
            for stack, own in zip(self.stacks, weights, strict=True)
        ]
        overlap = torch.cat(overlaps).index_select(0, self.partner)
        return overlap if changes is None else torch.where(changes > 0, overlap, self._identity)

    def _turn(self, changes: Tensor) -> Tensor:
        """Turn frames, coordinates and covariances to the eigenframe; returns O."""
        ties = torch.cat([position_moment(stack.coordinates) for stack in self.stacks])
        turn = eigenframe(self.covariance, ties.index_select(0, self.partner))
        turn = torch.where(changes > 0, turn, self._identity)
        self.covariance.copy_(turn @ self.covariance @ turn.mT)
        self.frame.copy_(turn @ self.frame)
        of_factors = turn.index_select(0, self.partner)
        for stack in self.stacks:
            stack.turn_(of_factors[stack.rows])
        return turn

    def refresh(self) -> None:
        """Turn to eigenframes between steps; the moments move along."""
        turn = self._turn((self.counts > 0)[:, None, None])
        for stack in self.stacks:
            own = turn[stack.rows]
            stack.exp_avg.copy_(own @ stack.exp_avg)
            stack.exp_avg_sq.copy_(own.square() @ stack.exp_avg_sq)

    def move_(self, element: Mapping[str, Tensor]) -> None:
        """Move frames along with the parameters: ``w ↦ w g^{-1}`` (left), ``w ↦ w gᵀ`` (right)."""
        for j, (symmetry, side) in enumerate(zip(self.symmetries, self.sides, strict=True)):
            if symmetry.name in element:
                g = element[symmetry.name][0]
                g = g.to(self.device, torch.promote_types(g.dtype, wide_dtype(self.device)))
                moved = symmetry.group.inverse(g) if side == "left" else g.mT
                self.frame[j].copy_(self.frame[j].to(g.dtype) @ moved)


def stack_pairs(
    leaves: Sequence[Leaf], param_groups: Sequence[Mapping[str, Any]]
) -> list[LowRankPairs]:
    """Pairs of equal rank, param group, dtype and device together; each by itself on request."""
    grouped: dict[tuple[Any, ...], list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        parameter, options = leaf.parameter, param_groups[leaf.group_index]
        symmetry = leaf.symmetry
        key = (
            leaf.group_index,
            leaf.shape[2],
            parameter.dtype,
            parameter.device,
            id(symmetry) if options["foreach"] is False else None,
        )
        grouped[key].append(leaf)
    return [
        LowRankPairs(members, param_groups[members[0].group_index]) for members in grouped.values()
    ]
