"""From measured errors to a result with one readable line."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from quotientopt.checks.result import CheckResult
from quotientopt.checks.slopes import STRAIGHT, fit_slope

EXACT = 100.0


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
        fault = f"slope {fit.slope:.2f} {where}, expected at least {curve.expected:g}"
        return *fit[:2], f"{fault}: {blame}" if blame else fault
    if fit.spread > STRAIGHT:
        return *fit[:2], f"the errors follow no straight line, slope {fit.slope:.2f} at best"
    return *fit[:2], ""


def _describe(slope: float, window: tuple[float, float] | None) -> str:
    if window is None:
        return "exact up to rounding"
    return f"slope {slope:.2f} on steps {window[0]:.0e} to {window[1]:.0e}"
