"""Numerical checks for manifolds, ours and anybody's: slopes and identities, with a verdict.

Each check returns a :class:`CheckResult`, true where it passed; ``.require()`` raises an
``AssertionError`` with one clear line where it did not, ``.plot()`` draws it.
"""

from quotientopt.checks.dimension import check_dimension
from quotientopt.checks.everything import check_manifold
from quotientopt.checks.invariance import check_invariance
from quotientopt.checks.projection import check_projection, check_transport
from quotientopt.checks.result import CheckResult
from quotientopt.checks.retraction import check_retraction
from quotientopt.checks.section import check_section
from quotientopt.checks.slopes import SlopeFit, fit_slope
from quotientopt.checks.taylor import check_gradient, check_hessian
from quotientopt.checks.views import GeooptView, PymanoptView

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
