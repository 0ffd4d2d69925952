"""Low-rank pairs whose coordinates follow the factors, all of one rank at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype, wide_dtype
from quotientopt.optim.bookkeeping.checks import RankError
from quotientopt.optim.bookkeeping.slices import Slice
from quotientopt.optim.low_rank.coordinates import (
    carry_covariance_,
    coefficients,
    eigenframe,
    next_coordinates,
    position_moment,
    restraint,
    spanning_coordinates,
)
from quotientopt.optim.low_rank.schedule import Due, Schedule
from quotientopt.optim.low_rank.stack import (
    FactorStack,
    Prepared,
    Remade,
    factors_of,
    partners_of,
)

COVARIANCE_BETA = 0.95
# Of orthonormal coordinates, when others wrote to a factor: the change, against their own size,
# beyond which they are made anew at once. Ten steps of training change them by a tenth.
STRAYED = 0.5


class LowRankPairs:
    """S low-rank pairs of one rank, param group, dtype and device.

    The 2S factors are sorted by their number of columns, so that those with equally many form one
    :class:`FactorStack`, whatever side they are. Entry j of everything r×r belongs to factor j,
    seen through its partner.

    Attributes
    ----------
    frame : Tensor
        w, ``(2S, r, r)``: dressed gradients are w∂, updates wᵀ(…). Zero where there is none, before
        the first step or for want of a partner of full rank.
    covariance : Tensor
        C = EMA(w∂ (w∂)ᵀ), written in the frame, ``(2S, r, r)``.
    made : Tensor
        The update of a side, and that of its partner, in which its coordinates were last made,
        ``(2S, 2)``; 0 before.
    counts : Tensor
        Updates of each side, ``(2S,)``.
    schedule : Schedule
        The same and what follows from it, on the host.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        options: Mapping[str, Any],
    ) -> None:
        self.options = options
        self.group_index = slices[0].group_index
        symmetries = list(dict.fromkeys(slice_.symmetry for slice_ in slices if slice_.symmetry))
        factors = factors_of(symmetries)
        self.symmetries = [symmetry for symmetry, _, _ in factors]
        self.sides = [side for _, side, _ in factors]
        self.blocks = [block for _, _, block in factors]
        self._partners = partners = partners_of(factors)
        own = {(id(slice_.symmetry), slice_.side): slice_ for slice_ in slices}
        self.own_slices = [own.get((id(s), side)) for s, side, _ in factors]
        parameter = self.blocks[0].parameter
        self.device, self.dtype = parameter.device, compute_dtype(parameter.dtype)
        self.rank = symmetries[0].rank
        self.partner = torch.tensor(partners, device=self.device)
        keeps_master = options["master_weights"] and parameter.dtype != self.dtype
        self.stacks: list[FactorStack] = []
        sizes = [block.size[2] for block in self.blocks]
        for size in dict.fromkeys(sizes):
            rows = slice(sizes.index(size), sizes.index(size) + sizes.count(size))
            stack = FactorStack(self.blocks[rows], rows, self.dtype, keeps_master=keeps_master)
            self.stacks.append(stack)
        shape = (len(factors), self.rank, self.rank)
        self.frame = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.covariance = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.counts = torch.zeros(len(factors), device=self.device)
        self.made = torch.zeros(len(factors), 2, device=self.device)
        self._identity = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        parameters = [block.parameter for block in self.blocks]
        self.schedule = Schedule(partners, parameters, options["refresh_every"])
        columns = [sizes[j] for j in partners]
        self._columns_of_partner = torch.tensor(columns, dtype=self.dtype, device=self.device)
        # Which sides have coordinates, and the last pattern of gradients: kept, so that the host
        # does not wait for the device in every step.
        self._framed = torch.zeros(len(factors), dtype=torch.bool, device=self.device)
        self._given: list[bool] = []
        self._look = False
        self._sample: Tensor | None = None
        self._has_gradient = torch.tensor(self._given)
        frozen = [self.own_slices[j] is None for j in partners]
        self._frozen_partner = torch.tensor(frozen, device=self.device)

    @property
    def steps(self) -> list[int]:
        """Updates of each side, on the host."""
        return self.schedule.steps

    def entries(self) -> Iterator[tuple[Slice, str, Tensor]]:
        """Every tensor of the state, under the side that it belongs to."""
        of_factor = [
            (stack, i) for stack in self.stacks for i in range(stack.rows.stop - stack.rows.start)
        ]
        for j, slice_ in enumerate(self.own_slices):
            if slice_ is None:
                continue
            stack, i = of_factor[j]
            yield slice_, "step", self.counts[j]
            yield slice_, "coordinates_made", self.made[j]
            yield slice_, "exp_avg", stack.exp_avg[i]
            yield slice_, "exp_avg_sq", stack.exp_avg_sq[i]
            yield slice_, "head_frame", self.frame[j]
            yield slice_, "head_covariance", self.covariance[j]
            stack_of_partner, i_of_partner = of_factor[self._partners[j]]
            yield slice_, "partner_coordinates", stack_of_partner.coordinates[i_of_partner]
            if stack.master is not None:
                yield slice_, "master", stack.master[i]

    def adopted(self) -> None:
        """Go on from a state that was just copied into the entries."""
        self._framed.copy_((self.frame != 0).flatten(1).any(1))
        self.schedule.steps = [int(count) for count in self.counts.tolist()]
        self.schedule.made = [(int(own), int(other)) for own, other in self.made.tolist()]
        self.schedule.framed = self._framed.tolist()

    def prepare(self, capturing: bool = False, *, look: bool = False) -> Prepared | None:
        """Coordinates of the factors as they are now and dressed gradients; changes nothing.

        Parameters
        ----------
        capturing : bool
            Whether the step is recorded.
        look : bool
            Whether to compare a sample of the factors with the last step's, on the host.

        Returns
        -------
        Prepared or None
            None where no side has a gradient.

        Raises
        ------
        RankError
            If both factors of a pair are zero and never were trained, or one is not finite.
        """
        gradients = [None if own is None else own.parameter.grad for own in self.own_slices]
        given = [gradient is not None for gradient in gradients]
        if not any(given):
            return None
        weights = [stack.weights() for stack in self.stacks]
        has_gradient = self._mask(given)
        on_host = self.device.type == "cpu"
        frame, framed, remade = self.frame, self._framed, None
        self.schedule.refresh_every = self.options["refresh_every"]
        self._look = look and on_host
        seen, before = self._sampled(weights), self._sample
        if seen is not None and before is not None and not torch.equal(seen, before):
            self.schedule.ask()
        due = self.schedule.due(given, None if capturing else lambda own: self._moved(own, weights))
        if capturing or any(due.made):
            remade = self._remake(weights, due, has_gradient, capturing)
            frame = remade.frame
            framed = (frame != 0).flatten(1).any(1)
        active = framed & has_gradient
        field = (frame * active[:, None, None]).to(self.dtype)
        dressed = []
        for stack in self.stacks:
            own = stack.gradients(gradients[stack.rows])
            if self.options["maximize"]:
                own.neg_()
            dressed.append(field[stack.rows] @ own)
        counted = active.tolist() if on_host else given
        whole = on_host and all(counted) and (remade is None or all(due.made))
        return Prepared(weights, remade, given, active, counted, dressed, whole)

    def _sampled(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The first column of every factor, as it is stored; None where nobody looks."""
        if not self._look:
            return None
        if self.blocks[0].parameter.dtype == self.dtype:
            return torch.cat([own[:, :, 0].flatten() for own in weights])
        return torch.cat([column for stack in self.stacks for column in stack.columns()])

    def _moved(self, written: list[bool], weights: Sequence[Tensor]) -> list[bool]:
        """Factors, of those written to, that are far from the coordinates in use; the host looks.

        What came back to its old values, as weights swapped for their average do, leaves the path
        as it is.
        """
        of_partner = self.frame.index_select(0, self.partner)
        squares = [
            (of_partner[stack.rows] @ own - stack.coordinates).square().sum((-2, -1))
            for stack, own in zip(self.stacks, weights, strict=True)
        ]
        near = torch.cat(squares) <= STRAYED**2 * self.rank
        near = near & self._framed.index_select(0, self.partner)
        return [own and not kept for own, kept in zip(written, near.tolist(), strict=True)]

    def _mask(self, given: list[bool]) -> Tensor:
        """Which sides have a gradient, on the device."""
        if given != self._given:
            self._has_gradient = torch.tensor(given, device=self.device)
            self._given = given
        return self._has_gradient

    def _grams(self, weights: Sequence[Tensor]) -> Tensor:
        """Gram matrices of each side's partner, in the widest precision."""
        grams = [stack.grams(own) for stack, own in zip(self.stacks, weights, strict=True)]
        return torch.cat(grams).index_select(0, self.partner)

    def _remake(
        self, weights: Sequence[Tensor], due: Due, has_gradient: Tensor, capturing: bool
    ) -> Remade:
        """Coordinates that continue those of earlier steps; anew where they lead to none.

        They start anew where the partner has full rank again. Where it has not, the side waits, and
        only if its own factor is rank-deficient too, so that both would wait, or if the partner is
        frozen, it goes on in the directions that the partner has. The host looks which it is,
        except while a step is recorded.
        """
        gram = self._grams(weights)
        old = self.frame.to(gram.dtype)
        frame, defined = next_coordinates(old, gram)
        if capturing:
            frame = torch.where(defined[:, None, None], frame, 0)
            anew = torch.zeros_like(defined)
            return Remade(due, has_gradient, frame, anew, None, turns=False)
        reached = has_gradient
        if not all(due.made):
            reached = torch.tensor(due.made, device=self.device)
        anew = defined & ~self._framed
        if not bool((defined | ~reached).all()):
            broken = reached & ~gram.isfinite().flatten(-2).all(-1)
            if bool(broken.any()):
                self._refuse(
                    broken, "is not finite; nothing was updated. Give it the values of a checkpoint"
                )
            fresh = next_coordinates(torch.zeros_like(gram), gram)
            frame = torch.where(defined[:, None, None], frame, fresh.frame)
            anew = anew | ~defined
            defined = defined | fresh.defined
            waits = ~defined & reached
            blocked = waits & (~defined.index_select(0, self.partner) | self._frozen_partner)
            if bool(blocked.any()):
                spanned = spanning_coordinates(
                    torch.where(blocked[:, None, None], gram, self._identity.to(gram.dtype))
                )
                frame = torch.where(blocked[:, None, None], spanned.frame, frame)
                defined = torch.where(blocked, spanned.defined, defined)
                lost = blocked & ~defined & ~defined.index_select(0, self.partner)
                # A pair that was trained and is zero now has gradients of zero, and waits.
                lost = lost & (self.counts + self.counts.index_select(0, self.partner) == 0)
                if bool(lost.any()):
                    self._refuse(
                        lost,
                        "is zero, as is its partner, so that no coordinates are defined; "
                        "initialise it, or use lora_frame=None",
                    )
            frame = torch.where(defined[:, None, None], frame, 0)
        anew = anew & defined & reached
        frame = torch.where(reached[:, None, None], frame, old)
        framed = torch.where(reached, defined, self._framed).tolist()
        return Remade(due, reached, frame, anew, framed, any(due.turned) or bool(anew.any()))

    def _refuse(self, own_slices: Tensor, problem: str) -> None:
        """Refuse the first of the sides that are marked, whose partner has the problem."""
        factor = int(self.partner[int(own_slices.nonzero()[0])])
        raise RankError(
            f"symmetry {self.symmetries[factor].name!r}: the {self.sides[factor]} factor {problem}"
        )

    def step(self, prepared: Prepared, group: Mapping[str, Any], gate: Tensor | None) -> None:
        """Update moments and parameters; first carry the state into new coordinates, if any."""
        mask = prepared.active.to(self.dtype)
        dressed, overlap = prepared.dressed, None
        if gate is not None:
            mask = mask * gate
        if prepared.remade is not None:
            overlap, dressed = self._carry(prepared, prepared.remade, mask, gate)
        self.counts.add_(mask)
        self.schedule.count(prepared.counted)
        changes = mask[:, None, None]
        own = coefficients(
            overlap,
            # A side without any step yet has moments of zero; any positive count will do.
            self.counts.clamp_min(1),
            changes,
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"],
        )
        lr = group["lr"]
        lr = lr.reshape(()).to(self.dtype) if isinstance(lr, Tensor) else lr
        partner = (self.frame * changes).index_select(0, self.partner)
        restrained = restraint(self.frame, partner, self._columns_of_partner, lr)
        own = own._replace(scale=own.scale * restrained)
        for stack, factors, z in zip(self.stacks, prepared.weights, dressed, strict=True):
            rows, given = stack.rows, prepared.given[stack.rows]
            stack.update_(
                factors, z, self.frame[rows], own.of(rows), changes[rows], given, lr, group
            )
        self.schedule.mark()
        self._sample = self._sampled(prepared.weights)

    def _carry(
        self, prepared: Prepared, remade: Remade, mask: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Take over coordinates; R of the new ones with the old, and gradients dressed by them."""
        reached = remade.reached if gate is None else remade.reached & (gate > 0)
        taken = reached & prepared.active
        changes = taken[:, None, None]
        frame = remade.frame.to(self.dtype)
        whole = prepared.whole and gate is None
        overlap = self._follow(frame, prepared.weights, None if whole else changes)
        self.frame.copy_(torch.where(reached[:, None, None], frame, self.frame))
        self._framed.copy_(torch.where(reached, taken, self._framed))
        elapsed = torch.ones_like(mask)
        if remade.framed is not None:
            elapsed = torch.tensor(remade.due.elapsed, device=self.device, dtype=self.dtype)
            self._note_made(remade, reached)
        dressed = prepared.dressed
        sample = torch.cat([z @ z.mT for z in dressed])
        beta = COVARIANCE_BETA**elapsed
        carry_covariance_(self.covariance, overlap, sample, beta, mask * taken)
        if remade.turns:
            turned = remade.anew | torch.tensor(remade.due.turned, device=self.device)
            turn = self._turn(changes & turned[:, None, None])
            overlap = turn @ overlap
            dressed = [turn[s.rows] @ z for s, z in zip(self.stacks, dressed, strict=True)]
        return overlap, dressed

    def _note_made(self, remade: Remade, reached: Tensor) -> None:
        """Keep in which updates the coordinates were made."""
        self.schedule.take(remade.due, remade.framed or [])
        made = torch.tensor(self.schedule.made, device=self.device, dtype=self.made.dtype)
        self.made.copy_(torch.where(reached[:, None], made, self.made))

    def _follow(self, frame: Tensor, weights: Sequence[Tensor], changes: Tensor | None) -> Tensor:
        """Move coordinates along with the factors; R = new · oldᵀ of each side's partner."""
        of_factors = frame.index_select(0, self.partner)
        gates = None if changes is None else changes.index_select(0, self.partner)
        overlaps = [
            stack.follow_(own, of_factors[stack.rows], None if gates is None else gates[stack.rows])
            for stack, own in zip(self.stacks, weights, strict=True)
        ]
        overlap = torch.cat(overlaps).index_select(0, self.partner)
        return overlap if changes is None else torch.where(changes, overlap, self._identity)

    def _turn(self, changes: Tensor) -> Tensor:
        """Turn frames, coordinates and covariances to the eigenframe; returns O."""
        ties = torch.cat([position_moment(stack.coordinates) for stack in self.stacks])
        turn = eigenframe(self.covariance, ties.index_select(0, self.partner))
        turn = torch.where(changes, turn, self._identity)
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
        changes = (defined & self._framed)[:, None, None]
        frame = frame.to(self.dtype)
        overlap = self._follow(frame, weights, changes)
        self.frame.copy_(torch.where(changes, frame, self.frame))
        self.covariance.copy_(overlap @ self.covariance @ overlap.mT)
        carried = self._turn(changes) @ overlap
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
        self.schedule.mark()
