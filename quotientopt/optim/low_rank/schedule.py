"""When coordinates of low-rank pairs are made: each step at first, then from time to time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from quotientopt.optim.bookkeeping.checks import marks_of
from quotientopt.optim.update import interval_of


class Due(NamedTuple):
    """Sides that get new coordinates in a step, and of those the ones turned to eigenframes.

    ``elapsed`` counts each side's updates since its last coordinates, or one.
    """

    made: list[bool]
    turned: list[bool]
    elapsed: list[int]


class Schedule:
    """Numbers of steps of the sides of some pairs, and when their coordinates were made.

    Pairs do not depend on each other, so that it makes no difference which are stacked together.

    Parameters
    ----------
    partners : sequence of int
        Place of the partner of each side.
    factors : sequence of Tensor
        The parameter of each side's own factor.
    refresh_every : int

    Attributes
    ----------
    steps : list of int
        Updates of each side. On an accelerator sides that wait there are counted too.
    made : list of (int, int)
        The update of a side, and that of its partner, in which its coordinates were last made; 0
        before.
    framed : list of bool
        Whether a side has coordinates.
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
        self._asked = False

    def due(
        self, given: Sequence[bool], moved: Callable[[list[bool]], list[bool]] | None = None
    ) -> Due:
        """What a step with these gradients has to make; a pair's sides get coordinates together.

        Parameters
        ----------
        given : sequence of bool
            Which sides have a gradient.
        moved : callable, optional
            Tells of factors that were written to which have other values; else all of them.
        """
        written, steps, partners = self.written(), self.steps, self.partners
        if moved is not None and any(written):
            written = moved(written)
        # Most sides are at the same point.
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
        """Whether a side is due by its numbers, turned if it is, and its updates since."""
        every, tick = self.refresh_every, 1 + max(own, other)
        since = 1 + max(own - made[0], other - made[1])
        # A side that waits is looked after as often as its partner.
        age = 1 + (own if framed else other)
        # A tenth of the steps so far (for ``refresh_every=10``), then ``refresh_every``: what a
        # factor that grows from zero has gained since is a tenth of it at most.
        due = tick % interval_of(tick, every, every) == 0 or since >= interval_of(age, every, every)
        return due, tick <= every or tick % every == 0, max(1, 1 + own - made[0])

    def take(self, due: Due, framed: Sequence[bool]) -> None:
        """Note that coordinates were made, and which sides have some now."""
        for j, partner in enumerate(self.partners):
            if due.made[j]:
                self.made[j] = (1 + self.steps[j], 1 + self.steps[partner])
                self.framed[j] = framed[j]

    def count(self, counted: Sequence[bool]) -> None:
        """Note a step of some sides."""
        self.steps = [step + own for step, own in zip(self.steps, counted, strict=True)]

    def mark(self) -> None:
        """Note that the factors are now as the optimizer knows them."""
        self._marks = marks_of(self._factors)
        self._asked = False

    def ask(self) -> None:
        """Take all factors for written to, until the next mark: torch does not count all writes."""
        self._asked = True

    def written(self) -> list[bool]:
        """Factors that were written to by others since the last mark, as far as torch tells."""
        if self._marks is None or self._asked:
            return [self._asked] * len(self.partners)
        return [a != b for a, b in zip(self._marks, marks_of(self._factors), strict=True)]
