"""Low-rank pairs whose coordinates follow the factors, all of one rank at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, wide_dtype
from quotientopt.optim.errors import RankError
from quotientopt.optim.leaves import SIDES, Leaf
from quotientopt.optim.low_rank import (
    carry_covariance_,
    coefficients,
    eigenframe,
    interval_of,
    next_coordinates,
    position_moment,
    spanning_coordinates,
)
from quotientopt.optim.low_rank_prepared import Prepared, Remade
from quotientopt.optim.low_rank_stack import Stack, is_transposed
from quotientopt.symmetries import HeadSymmetry

COVARIANCE_BETA = 0.95


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
    full_rank : Tensor
        One where a leg's partner had full rank when coordinates were last made, else zero,
        ``(2S,)``.
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
        self.full_rank = torch.zeros(len(factors), device=self.device)
        self._identity = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        self.steps = [0] * len(factors)
        # Which legs have taken a step for certain, which have coordinates, and the last pattern of
        # gradients: kept, so that the host does not wait for the device in every step.
        self._seen = [False] * len(factors)
        self._framed = [False] * len(factors)
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
            yield leaf, "partner_full_rank", self.full_rank[j]
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
        self._framed = [rank > 0 for rank in self.full_rank.tolist()]

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
        has_gradient = self._mask(given)
        ticks, every = self._ticks(given), self.options["refresh_every"]
        turns = not capturing and any(tick <= every or tick % every == 0 for tick in ticks)
        on_host = self.device.type == "cpu"
        remade = None
        frame, defined = self.frame, self.full_rank > 0
        if turns or capturing or self._is_due(given, ticks):
            looks = not capturing and (on_host or turns or self._leans)
            remade = self._remake(weights, has_gradient, looks)
            frame, defined = remade.frame, remade.defined
        active = defined & has_gradient
        if remade is not None and not capturing:
            turns = turns or remade.anew or self._has_new(active, given)
        field = (frame * active[:, None, None]).to(self.dtype)
        dressed = []
        for stack in self.stacks:
            own = stack.gradients(gradients[stack.rows])
            if self.options["maximize"]:
                own.neg_()
            dressed.append(field[stack.rows] @ own)
        counted = active.tolist() if on_host else given
        whole = on_host and all(counted)
        interval = interval_of(max(ticks), every)
        return Prepared(
            weights,
            remade,
            given,
            has_gradient,
            active,
            counted,
            dressed,
            turns,
            whole,
            interval,
        )

    def _ticks(self, given: Sequence[bool]) -> set[int]:
        """Numbers of this step for the pairs with a gradient: the leg with more steps counts."""
        steps, partners = self.steps, self._partners
        return {1 + max(steps[j], steps[partners[j]]) for j, has in enumerate(given) if has}

    def _is_due(self, given: Sequence[bool], ticks: set[int]) -> bool:
        """Whether coordinates must be made: it is time, or a leg has none."""
        every = self.options["refresh_every"]
        return any(tick % interval_of(tick, every) == 0 for tick in ticks) or not all(
            framed for framed, has_gradient in zip(self._framed, given, strict=True) if has_gradient
        )

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

    def _remake(self, weights: Sequence[Tensor], has_gradient: Tensor, looks: bool) -> Remade:
        """Coordinates that continue those of earlier steps; anew where they lead to none.

        They start anew where the partner has full rank again. Where it has not, the leg waits, and
        only if its own factor is rank-deficient too, so that both would wait, or if the partner is
        frozen, it goes on in the directions that the partner has. That takes a look by the host.
        """
        gram = self._grams(weights)
        frame, defined = next_coordinates(self.frame, gram)
        if not looks:
            return Remade(frame, defined, defined, None, False)
        if bool((defined | ~has_gradient).all()):
            return Remade(frame, defined, defined, defined.tolist(), False)
        broken = has_gradient & ~gram.isfinite().flatten(-2).all(-1)
        if bool(broken.any()):
            self._refuse(broken, "is not finite")
        fresh = next_coordinates(torch.zeros_like(gram), gram)
        frame = torch.where(defined[:, None, None], frame, fresh.frame)
        defined = full_rank = defined | fresh.defined
        waits = ~defined & has_gradient
        stuck = waits & (~defined.index_select(0, self.partner) | self._frozen_partner)
        if bool(stuck.any()):
            self._leans = bool((stuck & self._frozen_partner).any())
            spanned = spanning_coordinates(
                torch.where(stuck[:, None, None], gram, self._identity.to(gram.dtype))
            )
            frame = torch.where(stuck[:, None, None], spanned.frame, frame)
            defined = torch.where(stuck, spanned.defined, defined)
            lost = stuck & ~defined & ~defined.index_select(0, self.partner)
            if bool(lost.any()):
                self._refuse(lost, "is zero, as is its partner")
        return Remade(frame, defined, full_rank, full_rank.tolist(), True)

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
        """Update moments and parameters; first carry the state into new coordinates, if any."""
        mask = prepared.active.to(self.dtype)
        dressed, overlap = prepared.dressed, None
        if gate is not None:
            mask = mask * gate
        changes = mask[:, None, None]
        if prepared.remade is not None:
            overlap, dressed = self._carry(prepared, prepared.remade, changes, gate)
        self.counts.add_(mask)
        self.steps = [step + own for step, own in zip(self.steps, prepared.counted, strict=True)]
        own = coefficients(
            overlap,
            # A leg without any step yet has moments of zero; any positive count will do.
            self.counts.clamp_min(1),
            changes,
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"],
        )
        for stack, factors, z in zip(self.stacks, prepared.weights, dressed, strict=True):
            rows = stack.rows
            stack.update_(factors, z, self.frame[rows], own.of(rows), changes[rows], group)

    def _carry(
        self, prepared: Prepared, remade: Remade, changes: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Take over coordinates; R of the new ones with the old, and gradients dressed by them."""
        reached = prepared.has_gradient if gate is None else prepared.has_gradient & (gate > 0)
        self.full_rank.copy_(torch.where(reached, remade.full_rank, self.full_rank))
        if remade.known is not None:
            own = zip(self._framed, remade.known, prepared.given, strict=True)
            self._framed = [known if given else old for old, known, given in own]
        frame = remade.frame.to(self.dtype)
        ungated = prepared.whole and gate is None
        overlap = self._follow(frame, prepared.weights, None if ungated else changes)
        dressed = prepared.dressed
        sample = torch.cat([z @ z.mT for z in dressed])
        beta = COVARIANCE_BETA**prepared.interval
        carry_covariance_(self.covariance, overlap, sample, beta, changes.flatten())
        if prepared.turns:
            turn = self._turn(changes)
            overlap = turn @ overlap
            dressed = [turn[s.rows] @ z for s, z in zip(self.stacks, dressed, strict=True)]
        return overlap, dressed

    def _follow(self, frame: Tensor, weights: Sequence[Tensor], changes: Tensor | None) -> Tensor:
        """Move frames and coordinates along with the factors; R = new · oldᵀ of each leg."""
        of_factors = frame.index_select(0, self.partner)
        gates = None if changes is None else changes.index_select(0, self.partner)
        overlaps = [
            stack.follow_(own, of_factors[stack.rows], None if gates is None else gates[stack.rows])
            for stack, own in zip(self.stacks, weights, strict=True)
        ]
        overlap = torch.cat(overlaps).index_select(0, self.partner)
        if changes is None:
            self.frame.copy_(frame)
            return overlap
        self.frame.copy_(torch.where(changes > 0, frame, self.frame))
        return torch.where(changes > 0, overlap, self._identity)

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
        """Make coordinates between steps, turned to eigenframes; the state moves along."""
        weights = [stack.weights() for stack in self.stacks]
        frame, defined = next_coordinates(self.frame, self._grams(weights))
        changes = (defined & (self.counts > 0))[:, None, None].to(self.dtype)
        overlap = self._follow(frame.to(self.dtype), weights, changes)
        self.covariance.copy_(overlap @ self.covariance @ overlap.mT)
        carried = self._turn((self.counts > 0)[:, None, None]) @ overlap
        for stack in self.stacks:
            own = carried[stack.rows]
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
