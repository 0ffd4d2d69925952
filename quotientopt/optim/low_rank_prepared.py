"""What a step of low-rank pairs finds out before it changes anything."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quotientopt.optim.low_rank_schedule import Due


class Remade(NamedTuple):
    """Coordinates of the legs that are due, made from the factors as they are now.

    ``frame`` is zero where the partner leads to none, and that of earlier steps where a leg is not
    due; ``reached`` marks the legs that are. Those of ``anew`` have frames that do not continue
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

    ``remade`` is None where the coordinates of earlier steps serve on. ``active`` marks the legs
    that take part, ``(2S,)``, and ``counted`` those that are taken to, as far as the host knows
    without waiting for the device; ``whole`` is whether all legs are known to take part and
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
