"""From measured errors to a result with one readable line.

In reading order: the :class:`CheckResult`; how it is found (:func:`judge`) from the error
:class:`Curve` of a check and from deviations of exact identities; and slopes of error curves in
log-log plots, with the rounding noise below which they mean nothing (:func:`fit_slope`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quotientopt._system import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT = 100.0
POINTS_PER_DECADE = 8
DECADES = (1.0, 0.5)
STRAIGHT = 0.1
NOISE_FACTOR = 10.0
ROUNDING = 100.0


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check: true where it passed.

    Attributes
    ----------
    name : str
        What was checked.
    passed : bool
    message : str
        One line: what was measured, and what is wrong.
    slope, expected : float or None
        Slope of the error in a log-log plot, infinite where the error is nothing but rounding, and
        the least slope of a correct implementation. None for a check without a slope; the
        dimension check has the dimensions measured and expected here.
    window : tuple of float or None
        Smallest and largest step of the piece that the slope was fitted to.
    steps, errors : tuple of float
        The curve; for the dimension check the singular values.
    residuals : mapping of str to float
        Relative deviations from exact identities.
    tolerance : float
        What every residual must stay below.
    """

    name: str
    passed: bool
    message: str
    slope: float | None = None
    expected: float | None = None
    window: tuple[float, float] | None = None
    steps: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    residuals: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = math.nan

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.message}"

    def require(self) -> CheckResult:
        """Return the result itself.

        Raises
        ------
        AssertionError
            With :attr:`message`, if the check failed.
        """
        if not self.passed:
            raise AssertionError(self.message)
        return self

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the errors against the steps, or the residuals as bars, on logarithmic axes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise ImportError(
                    f"plots need matplotlib: {install_command('matplotlib')}"
                ) from None
            _, ax = pyplot.subplots()
        if self.steps:
            self._plot_slope(ax)
        elif self.errors:
            ax.semilogy(range(1, len(self.errors) + 1), self.errors, "o")
            ax.set_xlabel("number of the singular value")
        else:
            self._plot_residuals(ax)
        ax.set_title(self.name)
        return ax

    def _plot_slope(self, ax: Axes) -> None:
        ax.loglog(self.steps, self.errors, ".", color="black", label="error")
        if self.window is not None and self.slope is not None and self.expected is not None:
            first = self.steps.index(self.window[0])
            ends = [step for step in self.steps if self.window[0] <= step <= self.window[1]]
            start, step = self.errors[first], self.window[0]
            fitted = [start * (end / step) ** self.slope for end in ends]
            ax.loglog(ends, fitted, linewidth=3, label=f"slope {_two_places(self.slope)}")
            wanted = [start * (end / step) ** self.expected for end in self.steps]
            ax.loglog(self.steps, wanted, "--", label=f"slope {self.expected:g}")
        ax.set_xlabel("step")
        ax.legend()

    def _plot_residuals(self, ax: Axes) -> None:
        names = list(self.residuals)
        smallest = self.tolerance * 1e-8  # a residual of exactly 0 has no place on the axis
        ax.barh(names, [max(value, smallest) for value in self.residuals.values()])
        ax.axvline(self.tolerance, color="black", linestyle="--")
        ax.set_xscale("log")
        ax.set_xlabel("relative deviation")


class Curve(NamedTuple):
    """An error as a function of the step.

    Attributes
    ----------
    steps, errors : tuple of float
    floor : float
        Below it errors are rounding.
    signal : tuple of float
        Size of the term that the check is about, at each step.
    expected : float
        The least slope of a correct implementation.
    """

    steps: tuple[float, ...]
    errors: tuple[float, ...]
    floor: float
    signal: tuple[float, ...]
    expected: float


def judge(
    name: str,
    *,
    curve: Curve | None = None,
    residuals: Mapping[str, float] | None = None,
    tolerance: float = math.nan,
    slope_tolerance: float = 0.1,
    blame: str = "",
) -> CheckResult:
    """The result of a check.

    It passes if the slope is at least the expected one less `slope_tolerance`, or the error is
    nothing but rounding where the term in question is at least a hundred times larger, and if every
    residual is at most `tolerance`. NaN never passes.

    Parameters
    ----------
    name : str
    curve : Curve, optional
    residuals : mapping of str to float, optional
    tolerance, slope_tolerance : float
    blame : str
        What a failing slope means.
    """
    residuals = dict(residuals or {})
    facts, faults = [], []
    slope = window = None
    if curve is not None:
        slope, window, fault = _judge_curve(curve, slope_tolerance, blame)
        facts.append(_describe(slope, window))
        faults += [fault] if fault else []
    faults += [
        f"{key} off by {value:.1e}" for key, value in residuals.items() if not value <= tolerance
    ]
    if residuals and not faults:
        worst = max(residuals, key=lambda key: residuals[key])
        facts.append(f"largest deviation {residuals[worst]:.1e} ({worst})")
    return CheckResult(
        name=name,
        passed=not faults,
        message=f"{name}: " + "; ".join(faults or facts),
        slope=slope,
        expected=None if curve is None else curve.expected,
        window=window,
        steps=() if curve is None else curve.steps,
        errors=() if curve is None else curve.errors,
        residuals=residuals,
        tolerance=tolerance,
    )


def relative(error: float, *sizes: float) -> float:
    """``error / max(sizes)``; 0 where all vanish."""
    size = max(sizes)
    return error / size if size > 0 else error


def _judge_curve(
    curve: Curve, slope_tolerance: float, blame: str
) -> tuple[float, tuple[float, float] | None, str]:
    """Slope, window, and what is wrong."""
    fit = fit_slope(curve.steps, curve.errors, curve.floor)
    if fit is None:
        below = [s for s, e in zip(curve.signal, curve.errors, strict=True) if e <= curve.floor]
        if below and max(below) >= EXACT * curve.floor:
            return math.inf, None, ""
        return math.nan, None, "nothing measurable above rounding; use float64 or another point"
    if fit.slope < curve.expected - slope_tolerance:
        where = f"on steps {fit.window[0]:.0e} to {fit.window[1]:.0e}"
        fault = f"slope {_two_places(fit.slope)} {where}, expected at least {curve.expected:g}"
        return *fit[:2], f"{fault}: {blame}" if blame else fault
    if fit.spread > STRAIGHT:
        return *fit[
            :2
        ], f"the errors follow no straight line, slope {_two_places(fit.slope)} at best"
    return *fit[:2], ""


def _two_places(slope: float) -> str:
    """A slope for a message, without the sign that rounding leaves of a small negative one."""
    return f"{round(slope, 2) + 0.0:.2f}"


def _describe(slope: float, window: tuple[float, float] | None) -> str:
    if window is None:
        return "exact up to rounding"
    return f"slope {_two_places(slope)} on steps {window[0]:.0e} to {window[1]:.0e}"


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
