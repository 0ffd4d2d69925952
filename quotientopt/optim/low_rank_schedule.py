"""When low-rank pairs get new coordinates: known on the host, from numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Due(NamedTuple):
    """Legs that get new coordinates in a step, and of those the ones turned to eigenframes.

    ``elapsed`` counts each leg's updates since its last coordinates, or one.
    """

    made: list[bool]
    turned: list[bool]
    elapsed: list[int]


class Schedule:
    """Numbers of steps of the legs of some pairs, and when their coordinates were made.

    Pairs do not depend on each other, so that it makes no difference which are stacked together.

    Parameters
    ----------
    partners : sequence of int
        Place of the partner of each leg.
    factors : sequence of Tensor
        The parameter of each leg's own factor.
    refresh_every : int

    Attributes
    ----------
    steps : list of int
        Updates of each leg. On an accelerator legs that wait there are counted too.
    made : list of (int, int)
        The update of a leg, and that of its partner, in which its coordinates were last made; 0
        before.
    framed : list of bool
        Whether a leg has coordinates.
    """

    def __init__(
        self, partners: Sequence[int], factors: Sequence[Tensor], refresh_every: int
    ) -> None:
        self.partners = list(partners)
        self.refresh_every = refresh_every
        self.steps = [0] * len(partners)
        self.made = [(0, 0)] * len(partners)
        self.framed = [False] * len(partners)
        self._factors = list(factors)
        self._marks: list[tuple[int, int]] | None = None

    def due(self, given: Sequence[bool]) -> Due:
        """What a step with these gradients has to make; a pair's legs get coordinates together."""
        written, steps, partners = self._written(), self.steps, self.partners
        # Most legs are at the same point.
        known: dict[tuple[int, int, tuple[int, int], bool], tuple[bool, bool, int]] = {}
        found = []
        for j, partner in enumerate(partners):
            state = steps[j], steps[partner], self.made[j], self.framed[j]
            if state not in known:
                known[state] = self._due(*state)
            found.append(known[state])
        wanted = [
            has and (own[0] or written[partner])
            for has, own, partner in zip(given, found, partners, strict=True)
        ]
        made = [
            has and (wanted[j] or wanted[partner])
            for j, (has, partner) in enumerate(zip(given, partners, strict=True))
        ]
        turned = [a and own[1] for a, own in zip(made, found, strict=True)]
        return Due(made, turned, [own[2] for own in found])

    def _due(
        self, own: int, other: int, made: tuple[int, int], framed: bool
    ) -> tuple[bool, bool, int]:
        """Whether a leg is due by its numbers, turned if it is, and its updates since."""
        every, tick = self.refresh_every, 1 + max(own, other)
        since = 1 + max(own - made[0], other - made[1])
        # A leg that waits is looked after as often as its partner.
        age = 1 + (own if framed else other)
        due = tick % interval_of(tick, every) == 0 or since >= interval_of(age, every)
        return due, tick <= every or tick % every == 0, max(1, 1 + own - made[0])

    def take(self, due: Due, framed: Sequence[bool]) -> None:
        """Note that coordinates were made, and which legs have some now."""
        for j, partner in enumerate(self.partners):
            if due.made[j]:
                self.made[j] = (1 + self.steps[j], 1 + self.steps[partner])
                self.framed[j] = framed[j]

    def count(self, counted: Sequence[bool]) -> None:
        """Note a step of some legs."""
        self.steps = [step + own for step, own in zip(self.steps, counted, strict=True)]

    def mark(self) -> None:
        """Note that the factors are now as the optimizer knows them."""
        self._marks = self._current_marks()

    def _written(self) -> list[bool]:
        """Factors that were written to by others since the last mark, as far as torch tells."""
        if self._marks is None:
            return [False] * len(self.partners)
        return [a != b for a, b in zip(self._marks, self._current_marks(), strict=True)]

    def _current_marks(self) -> list[tuple[int, int]]:
        return [(factor.data_ptr(), factor._version) for factor in self._factors]


def interval_of(tick: int, refresh_every: int) -> int:
    """Steps between coordinates at a step: each one at first, when the factors change quickly.

    A tenth of the steps so far (for ``refresh_every=10``), then ``refresh_every``: what a factor
    that grows from zero has gained since is a tenth of it at most.
    """
    return min(max(tick // refresh_every, 1), refresh_every)
