"""What a step of low-rank pairs finds out before it changes anything."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Remade(NamedTuple):
    """Coordinates made from the factors as they are now.

    ``frame`` and ``defined`` are those of :class:`quotientopt.optim.low_rank.Coordinates`.
    ``full_rank`` marks the legs whose partner has full rank, ``known`` says so on the host if it
    looked, and ``anew`` is whether frames are not continued.
    """

    frame: Tensor
    defined: Tensor
    full_rank: Tensor
    known: list[bool] | None
    anew: bool


class Prepared(NamedTuple):
    """What a step needs to know of factors and gradients; nothing has changed yet.

    ``remade`` is None where the coordinates of earlier steps serve on. ``active`` marks the legs
    that take part, ``(2S,)``, and ``counted`` those that are taken to, as far as the host knows
    without waiting for the device; ``turns`` is whether frames are turned to eigenframes, ``whole``
    whether all legs are known to take part, and ``interval`` that between coordinates.
    """

    weights: list[Tensor]
    remade: Remade | None
    given: list[bool]
    has_gradient: Tensor
    active: Tensor
    counted: list[bool]
    dressed: list[Tensor]
    turns: bool
    whole: bool
    interval: int
