"""Results: verdict, refusal, drawing."""

import dataclasses
import subprocess
import sys

import pytest

from quotientopt import checks
from quotientopt.manifolds import FactorQuotient

MANIFOLD = FactorQuotient(2, 4, 3)
WRONG = {"retraction": lambda x, u: MANIFOLD.retract(x, (2 * u[0], u[1]))}


def test_a_result_is_its_verdict():
    good, bad = checks.check_retraction(MANIFOLD), checks.check_retraction(MANIFOLD, **WRONG)
    assert good
    assert not bad
    assert str(good).startswith("passed  retraction: slope 2.0")
    assert str(bad).startswith("FAILED  retraction: slope 1.0")
    assert good.window[0] < good.window[1]
    assert len(good.steps) == len(good.errors) > 50
    with pytest.raises(dataclasses.FrozenInstanceError):
        bad.passed = True


def test_residuals_and_tolerance():
    result = checks.check_projection(MANIFOLD)
    assert result.slope is None
    assert result.window is None
    assert max(result.residuals.values()) < result.tolerance < 1e-10
    strict = checks.check_projection(MANIFOLD, tolerance=1e-20)
    assert not strict
    assert strict.tolerance == 1e-20
    assert checks.check_projection(MANIFOLD, tolerance=0.1, projection=lambda x, u: u) is not None
    assert not checks.check_projection(MANIFOLD, tolerance=0.1, projection=lambda x, u: u)


def test_nan_never_passes():
    def nothing(x, u):
        return tuple(float("nan") * part for part in u)

    manifold = FactorQuotient(2, 4, 3, check=False)
    result = checks.check_projection(manifold, projection=nothing)
    assert not result
    assert "off by nan" in result.message
    assert not checks.check_retraction(manifold, retraction=nothing)


def test_plots():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    for result in (
        checks.check_retraction(MANIFOLD),
        checks.check_retraction(MANIFOLD, **WRONG),
        checks.check_projection(MANIFOLD),
        checks.check_dimension(MANIFOLD),
    ):
        axes = result.plot()
        assert axes.get_title() == result.name
        axes.figure.canvas.draw()
        _, mine = pyplot.subplots()
        assert result.plot(mine) is mine
    slopes = checks.check_retraction(MANIFOLD).plot()
    assert slopes.get_xscale() == slopes.get_yscale() == "log"
    labels = [text.get_text() for text in slopes.get_legend().get_texts()]
    assert labels == ["error", "slope 2.00", "slope 2"]
    pyplot.close("all")


def test_plots_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'matplotlib>=3.8'"):
        checks.check_projection(MANIFOLD).plot()


def test_nothing_else_is_imported():
    code = (
        "import sys, quotientopt.checks;"
        "print([m for m in ('geoopt', 'pymanopt', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
