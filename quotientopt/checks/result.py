"""What a numerical check found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quotientopt._extras import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
            ax.loglog(ends, fitted, linewidth=3, label=f"slope {self.slope:.2f}")
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
