"""Slopes of error curves in log-log plots, and the rounding noise below which they mean nothing."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POINTS_PER_DECADE = 8
DECADES = (1.0, 0.5)
STRAIGHT = 0.1
NOISE_FACTOR = 10.0


class SlopeFit(NamedTuple):
    """A straight piece of an error curve.

    Attributes
    ----------
    slope : float
    window : tuple of float
        Its first and its last step.
    spread : float
        Largest distance of an error from the line, as a difference of natural logarithms.
    """

    slope: float
    window: tuple[float, float]
    spread: float


def step_sizes(eps: float) -> Tensor:
    """Logarithmically spaced steps from ``eps^{0.6}`` to 1, eight per decade."""
    decades = -0.6 * math.log10(eps)
    return torch.logspace(
        -decades, 0, math.ceil(decades * POINTS_PER_DECADE) + 1, dtype=torch.float64
    )


def rounding_noise(function: Callable[[float], float], eps: float) -> float:
    """Size of the rounding errors of a smooth function of a step near 0.

    The largest second difference over nine equispaced steps that are so small that the function's
    own curvature vanishes in it (the difference table of Moré & Wild, *Estimating computational
    noise*, 2011), and at least the rounding of the value itself.
    """
    spacing = eps**0.6
    values = [function(k * spacing) for k in range(9)]
    seconds = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return max(*seconds, eps * abs(values[0]))


def fit_slope(
    steps: Sequence[float] | Tensor, errors: Sequence[float] | Tensor, floor: float = 0.0
) -> SlopeFit | None:
    """Slope of the errors as the step goes to zero.

    A window of one decade (of half a decade where there is no more) is moved over the errors that
    are finite and above `floor`. In each the slope is the median over all pairs of points (Theil
    and Sen), so that single outliers do not count. Of the windows that are straight to ten per cent
    the one of the smallest steps is taken: a small wrong term shows there, where the terms of
    higher order have died out. Where no window is straight, the straightest is.

    Parameters
    ----------
    steps : sequence of float
        Increasing and positive, equispaced in the logarithm, eight per decade.
    errors : sequence of float
    floor : float
        Below it errors are rounding.

    Returns
    -------
    SlopeFit or None
        None if there is no window with five points above the floor.
    """
    abscissae = torch.as_tensor(steps, dtype=torch.float64)
    values = torch.as_tensor(errors, dtype=torch.float64)
    usable = torch.isfinite(values) & (values > max(floor, 0.0))
    for decades in DECADES:
        width = round(decades * POINTS_PER_DECADE) + 1
        fits = [
            _theil_sen(abscissae[piece], values[piece])
            for piece in (slice(start, start + width) for start in range(len(values) - width + 1))
            if bool(usable[piece].all())
        ]
        if fits:
            straight = [fit for fit in fits if fit.spread <= STRAIGHT]
            return straight[0] if straight else min(fits, key=lambda fit: fit.spread)
    return None


def _theil_sen(steps: Tensor, errors: Tensor) -> SlopeFit:
    log_steps, log_errors = steps.log(), errors.log()
    first, second = torch.triu_indices(len(log_steps), len(log_steps), offset=1)
    slopes = (log_errors[second] - log_errors[first]) / (log_steps[second] - log_steps[first])
    slope = slopes.median()
    offsets = log_errors - slope * log_steps
    spread = (offsets - offsets.median()).abs().max()
    return SlopeFit(slope.item(), (steps[0].item(), steps[-1].item()), spread.item())
