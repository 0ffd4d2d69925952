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

    ``active`` marks the legs that take part, ``(2S,)``, and ``counted`` those that are taken to,
    as far as the host knows without waiting for the device; ``turns`` is whether frames are turned
    to eigenframes, and ``whole`` whether all legs are known to take part.
    """

    weights: list[Tensor]
    coordinates: Coordinates
    active: Tensor
    counted: list[bool]
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
    steps : list of int
        The same on the host. On an accelerator legs that wait there are counted too.
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
        self._partners = partners
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
        self.steps = [0] * len(factors)
        # Which legs have taken a step for certain, and the last pattern of gradients: kept, so that
        # the host does not wait for the device in every step.
        self._seen = [False] * len(factors)
        self._given: list[bool] = []
        self._has_gradient = torch.tensor(self._given)
        frozen = [self.legs[j] is None for j in partners]
        self._frozen_partner = torch.tensor(frozen, device=self.device)
        # Whether a leg goes on in the directions of a frozen partner, in every step from then on.
        self._leans = False

    def entries(self) -> Iterator[tuple[Leaf, str, Tensor]]:
        """Every tensor of the state, under the leg that it belongs to."""
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
            stack_of_partner, i_of_partner = of_factor[self._partners[j]]
            yield leaf, "partner_coordinates", stack_of_partner.coordinates[i_of_partner]
            if stack.master is not None:
                yield leaf, "master", stack.master[i]

    def adopted(self) -> None:
        """Go on from a state that was just copied into the entries."""
        self.steps = [int(count) for count in self.counts.tolist()]
        self._seen = [step > 0 for step in self.steps]

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
        gradients = [None if leaf is None else leaf.parameter.grad for leaf in self.legs]
        given = [gradient is not None for gradient in gradients]
        if not any(given):
            return None
        weights = [stack.weights() for stack in self.stacks]
        tick, every = self._tick(given), self.options["refresh_every"]
        turns = not capturing and (tick <= every or tick % every == 0)
        gram = self._grams(weights)
        coordinates = next_coordinates(self.frame, gram)
        has_gradient = self._mask(given)
        on_host = self.device.type == "cpu"
        looks = not capturing and (on_host or turns or self._leans)
        if looks and not bool((coordinates.defined | ~has_gradient).all()):
            coordinates = self._recover(coordinates, gram, has_gradient)
            turns = True
        active = coordinates.defined & has_gradient
        turns = turns or (not capturing and self._has_new(active, given))
        field = (coordinates.frame * active[:, None, None]).to(self.dtype)
        dressed = []
        for stack in self.stacks:
            own = stack.gradients(gradients[stack.rows])
            if self.options["maximize"]:
                own.neg_()
            dressed.append(field[stack.rows] @ own)
        counted = active.tolist() if on_host else given
        whole = on_host and all(counted)
        return Prepared(weights, coordinates, active, counted, dressed, turns, whole)

    def _tick(self, given: Sequence[bool]) -> int:
        """Number of this step for the pairs with a gradient; the one with the most steps counts."""
        legs = [j for j, has_gradient in enumerate(given) if has_gradient]
        return 1 + max(self.steps[j] for leg in legs for j in (leg, self._partners[leg]))

    def _mask(self, given: list[bool]) -> Tensor:
        """Which legs have a gradient, on the device."""
        if given != self._given:
            self._has_gradient = torch.tensor(given, device=self.device)
            self._given = given
        return self._has_gradient

    def _grams(self, weights: Sequence[Tensor]) -> Tensor:
        """Gram matrices of each leg's partner, in the widest precision."""
        grams = [stack.grams(own) for stack, own in zip(self.stacks, weights, strict=True)]
        return torch.cat(grams).index_select(0, self.partner)

    def _recover(self, found: Coordinates, gram: Tensor, has_gradient: Tensor) -> Coordinates:
        """Coordinates where the last step's frames lead to none.

        They start anew where the partner has full rank again. Where it has not, the leg waits, and
        only if its own factor is rank-deficient too, so that both would wait, or if the partner is
        frozen, it goes on in the directions that the partner has.
        """
        broken = has_gradient & ~gram.isfinite().flatten(-2).all(-1)
        if bool(broken.any()):
            self._refuse(broken, "is not finite")
        fresh = next_coordinates(torch.zeros_like(gram), gram)
        frame = torch.where(found.defined[:, None, None], found.frame, fresh.frame)
        defined = found.defined | fresh.defined
        waits = ~defined & has_gradient
        stuck = waits & (~defined.index_select(0, self.partner) | self._frozen_partner)
        if not bool(stuck.any()):
            return Coordinates(frame, defined)
        self._leans = bool((stuck & self._frozen_partner).any())
        spanned = spanning_coordinates(
            torch.where(stuck[:, None, None], gram, self._identity.to(gram.dtype))
        )
        frame = torch.where(stuck[:, None, None], spanned.frame, frame)
        defined = torch.where(stuck, spanned.defined, defined)
        lost = stuck & ~defined & ~defined.index_select(0, self.partner)
        if bool(lost.any()):
            self._refuse(lost, "is zero, as is its partner")
        return Coordinates(frame, defined)

    def _has_new(self, active: Tensor, given: Sequence[bool]) -> bool:
        """Whether a leg takes its first step: its frame is not an eigenframe yet."""
        if all(seen for seen, has_gradient in zip(self._seen, given, strict=True) if has_gradient):
            return False
        seen = self.counts > 0
        self._seen = seen.tolist()
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
        weights, coordinates, active, counted, dressed, turns, whole = prepared
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
        self.steps = [step + own for step, own in zip(self.steps, counted, strict=True)]
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
