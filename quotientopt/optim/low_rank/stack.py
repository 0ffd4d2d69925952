"""Stacked factors of low-rank pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import wide_dtype
from quotientopt.optim.bookkeeping.slices import SIDES
from quotientopt.optim.low_rank.coordinates import Coefficients, adam_
from quotientopt.optim.low_rank.schedule import Due
from quotientopt.optim.polar import row_polar_factor
from quotientopt.optim.update import round_stochastically
from quotientopt.symmetries import Block, HeadSymmetry


class Remade(NamedTuple):
    """Coordinates of the sides that are due, made from the factors as they are now.

    ``frame`` is zero where the partner leads to none, and that of earlier steps where a side is not
    due; ``reached`` marks the sides that are. Those of ``anew`` have frames that do not continue
    earlier ones, which makes them eigenframes before they are used.
    """

    due: Due
    reached: Tensor
    frame: Tensor
    anew: Tensor
    framed: list[bool] | None
    turns: bool


class Prepared(NamedTuple):
    """What a step needs to know of factors and gradients; nothing has changed yet.

    ``remade`` is None where the coordinates of earlier steps serve on. ``active`` marks the sides
    that take part, ``(2S,)``, and ``counted`` those that are taken to, as far as the host knows
    without waiting for the device; ``whole`` is whether all sides are known to take part and
    to get new coordinates, if any do.
    """

    weights: list[Tensor]
    remade: Remade | None
    given: list[bool]
    active: Tensor
    counted: list[bool]
    dressed: list[Tensor]
    whole: bool

    @property
    def turns(self) -> bool:
        """Whether frames are turned to eigenframes."""
        return self.remade is not None and self.remade.turns


# Elements of one chunk of an update on a CPU, whose arrays then fit into a second-level cache.
CHUNK = 65536


class PairFactor(NamedTuple):
    """One factor of a low-rank pair: its symmetry, the side it is on, and where it lies."""

    symmetry: HeadSymmetry
    side: str
    block: Block


def factors_of(symmetries: Sequence[HeadSymmetry]) -> list[PairFactor]:
    """The factors of pairs, those of equally many columns, laid out alike, in a row."""
    factors = [
        PairFactor(symmetry, side, blocks[0])
        for symmetry in symmetries
        for side, blocks in zip(SIDES, (symmetry.left_blocks, symmetry.right_blocks), strict=True)
    ]
    return sorted(factors, key=lambda own: (own.block.size[2], not is_transposed(own.block)))


def partners_of(factors: Sequence[PairFactor]) -> list[int]:
    """The place of every factor's partner."""
    place = {(id(own.symmetry), own.side): i for i, own in enumerate(factors)}
    other = dict(zip(SIDES, reversed(SIDES), strict=True))
    return [place[id(own.symmetry), other[own.side]] for own in factors]


def is_transposed(block: Block) -> bool:
    """Whether the factor is the transpose of its parameter."""
    return block.column_axis == 0


class FactorStack:
    """N factors ``(r, n)``, entries ``rows`` of all factors of :class:`LowRankPairs`.

    Transposed ones come first.

    Attributes
    ----------
    exp_avg, exp_avg_sq : Tensor
        Moments of the sides of these factors, in the coordinates of their partners, ``(N, r, n)``.
    coordinates : Tensor
        Orthonormal coordinates wY of these factors, in which their partners are seen, of the last
        step, ``(N, r, n)``.
    master : Tensor or None
        The factors in the precision of the computation, where they are stored in a narrower one.
    """

    def __init__(
        self, blocks: Sequence[Block], rows: slice, dtype: torch.dtype, *, keeps_master: bool
    ) -> None:
        self.blocks = tuple(blocks)
        self.parameters = [block.parameter for block in blocks]
        self.transposed = [is_transposed(block) for block in blocks]
        self.rows = rows
        self.dtype = dtype
        self.device = self.parameters[0].device
        _, rank, columns = blocks[0].size
        shape = (len(blocks), rank, columns)
        self.exp_avg, self.exp_avg_sq, self.coordinates = (
            torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(3)
        )
        size = len(blocks)
        if self.device.type == "cpu":
            size = max(1, CHUNK // (rank * columns))
        starts = range(0, len(blocks), size)
        self.chunks = [slice(start, min(start + size, len(blocks))) for start in starts]
        self._views: list[Tensor] = []
        self._columns: list[Tensor] = []
        self._pointers: list[int] = []
        self.master: Tensor | None = None
        if keeps_master:
            self.master = self.weights()

    def views(self) -> list[Tensor]:
        """Views ``(r, n)`` of the parameters."""
        pointers = [parameter.data_ptr() for parameter in self.parameters]
        if pointers != self._pointers:
            self._views = [block.view().squeeze(0) for block in self.blocks]
            self._columns = [view[:, 0] for view in self._views]
            self._pointers = pointers
        return self._views

    def columns(self) -> list[Tensor]:
        """The first column of every factor."""
        self.views()
        return self._columns

    def weights(self) -> Tensor:
        """The factors in the precision of the computation; masters where there are any."""
        stored = self._stacked(self.views())
        weights = stored.to(self.dtype)
        if self.master is None:
            return weights
        # Parameters that were written to in the meantime win over their master.
        return torch.where(self.master.to(stored.dtype) == stored, self.master, weights)

    def _stacked(self, views: list[Tensor]) -> Tensor:
        """Those of the left factors by themselves: torch stacks contiguous tensors faster."""
        middle = sum(self.transposed)
        stacked = torch.empty(self.exp_avg.shape, dtype=views[0].dtype, device=self.device)
        for part in (slice(middle), slice(middle, None)):
            if views[part]:
                torch.stack(views[part], out=stacked[part])
        return stacked

    def grams(self, weights: Tensor) -> Tensor:
        """Gram matrices in the widest precision, ``(N, r, r)``."""
        wide = wide_dtype(self.device)
        parts = (weights[rows].to(wide) for rows in self.chunks)
        return torch.cat([part @ part.mT for part in parts])

    def gradients(self, given: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the parameters, laid out like the factors; zero where there is none."""
        turned = []
        for parameter, gradient, transposed in zip(
            self.parameters, given, self.transposed, strict=True
        ):
            if gradient is None:
                gradient = parameter.detach().new_zeros(()).expand_as(parameter)
            turned.append(gradient.mT if transposed else gradient)
        return self._stacked(turned).to(self.dtype)

    def follow_(self, weights: Tensor, frame: Tensor, gate: Tensor | None) -> Tensor:
        """Move the coordinates to wY of the factors as they are now.

        Parameters
        ----------
        weights : Tensor
            Y, ``(N, r, n)``.
        frame : Tensor
            w, ``(N, r, r)``.
        gate : Tensor, optional
            False where the coordinates stay, ``(N, 1, 1)``. None: they all move.

        Returns
        -------
        Tensor
            (new coordinates) (old coordinates)ᵀ where the gate is open, ``(N, r, r)``.
        """
        overlaps = []
        for rows in self.chunks:
            old = self.coordinates[rows]
            new = torch.bmm(frame[rows], weights[rows])
            overlaps.append(torch.bmm(new, old.mT))
            old.copy_(new if gate is None else torch.where(gate[rows], new, old))
        return torch.cat(overlaps)

    def turn_(self, turn: Tensor) -> None:
        """Turn the coordinates, F ↦ O F."""
        for rows in self.chunks:
            self.coordinates[rows] = torch.bmm(turn[rows], self.coordinates[rows])

    def update_(
        self,
        weights: Tensor,
        dressed: Tensor,
        frame: Tensor,
        own: Coefficients,
        gate: Tensor,
        given: Sequence[bool],
        lr: float | Tensor,
        group: Mapping[str, Any],
    ) -> None:
        """One step of Adam in the coordinates of the partners.

        Parameters
        ----------
        weights : Tensor
            As from :meth:`weights`; changed.
        dressed : Tensor
            Dressed gradients, zero where the gate is, ``(N, r, n)``.
        frame : Tensor
            w of the sides of these factors, ``(N, r, r)``.
        own : Coefficients
            Of these sides.
        gate : Tensor
            One, or zero where nothing may change, ``(N, 1, 1)``.
        given : sequence of bool
            Which factors have a gradient; the others are not written to.
        lr : float or Tensor
            Of no dimensions, in the dtype of the computation.
        group : mapping
            Hyperparameters.
        """
        decay = 1 - lr * group["weight_decay"] * gate
        back = (frame * (lr * gate * own.scale)).mT
        for rows in self.chunks:
            update = adam_(
                dressed[rows],
                self.exp_avg[rows],
                self.exp_avg_sq[rows],
                own.of(rows),
                group["betas"],
                nesterov=group["nesterov"],
            )
            turn = back[rows]
            if group["lora_polar"]:
                turn = turn @ row_polar_factor(update)
            weights[rows].mul_(decay[rows]).baddbmm_(turn, update, alpha=-1)
        self._write(weights, given, group["stochastic_rounding"])

    def _write(self, weights: Tensor, given: Sequence[bool], stochastic: bool) -> None:
        """Round once to the parameters' dtype."""
        views = self.views()
        if self.master is not None:
            self.master.copy_(weights)
        elif stochastic and views[0].dtype != self.dtype:
            weights = round_stochastically(weights, views[0].dtype)
        written = list(compress(zip(views, weights.unbind(), strict=True), given))
        if written:
            targets, sources = zip(*written, strict=True)
            torch._foreach_copy_(targets, sources)
