"""Numerical checks for manifolds, ours and anybody's: slopes and identities, with a verdict.

Each check returns a :class:`CheckResult`, true where it passed; ``.require()`` raises an
``AssertionError`` with one clear line where it did not, ``.plot()`` draws it.
:func:`check_manifold` runs all that a manifold's methods allow.
"""

from typing import Any

import torch

from quotientopt.checks.curves import (
    check_gradient,
    check_hessian,
    check_retraction,
    check_transport,
)
from quotientopt.checks.identities import (
    check_dimension,
    check_invariance,
    check_projection,
    check_section,
)
from quotientopt.checks.points import Point, precision
from quotientopt.checks.subject import Cost, GeooptView, PymanoptView, as_view
from quotientopt.checks.verdict import CheckResult, SlopeFit, fit_slope

__all__ = [
    "CheckResult",
    "GeooptView",
    "PymanoptView",
    "SlopeFit",
    "check_dimension",
    "check_gradient",
    "check_hessian",
    "check_invariance",
    "check_manifold",
    "check_projection",
    "check_retraction",
    "check_section",
    "check_transport",
    "fit_slope",
]


def check_manifold(
    manifold: Any,
    cost: Cost | None = None,
    x: Point | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[CheckResult, ...]:
    """Run every check for which the manifold has the methods.

    Gradient and Hessian need a `cost` or a ``canonical_projection``. What shows in a slope of 3
    (the Hessian, where ``retract_second_order`` or ``exp`` is at hand, and second-order
    retractions) is left out for points below float64, where rounding leaves no room for it.
    Sections have a check of their own, :func:`check_section`.

    Parameters
    ----------
    manifold : object
        One of ours, a geoopt or a pymanopt manifold, or anything with such methods.
    cost, x, generator, dtype
        As for :func:`check_gradient`.

    Returns
    -------
    tuple of CheckResult
        ``all(results)`` is true where all have passed.
    """
    view: Any = as_view(manifold)
    shared: dict[str, Any] = {"x": x, "generator": generator, "dtype": dtype}

    def has(*names: str) -> bool:
        return all(callable(getattr(view, name, None)) for name in names)

    third_order = (torch.finfo(dtype).eps if x is None else precision(x)) < 1e-10
    results = []
    measurable = cost is not None or has("canonical_projection")
    if measurable and has("retract", "gradient"):
        results.append(check_gradient(view, cost, **shared))
    smooth = has("retract_second_order") or has("exp")
    if measurable and third_order and smooth and has("hessian", "gradient"):
        results.append(check_hessian(view, cost, **shared))
    if has("retract"):
        results.append(check_retraction(view, **shared))
    if third_order and has("retract_second_order", "hessian", "canonical_projection"):
        results.append(check_retraction(view, order=2, **shared))
    if has("horizontal_component"):
        results.append(check_projection(view, **shared))
    if has("retract", "transport", "horizontal_component"):
        results.append(check_transport(view, **shared))
    if has("act") and (hasattr(view, "group") or has("random_element")):
        results.append(check_invariance(view, cost, **shared))
    if getattr(view, "dim", None) is not None:
        results.append(check_dimension(view, **shared))
    return tuple(results)
