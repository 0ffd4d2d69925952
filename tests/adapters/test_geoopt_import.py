"""geoopt is imported when it is asked for, silently, and its absence is explained."""

import subprocess
import sys
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    pytest.importorskip("geoopt", reason="pip install geoopt")


def test_importing_quotientopt_imports_neither_geoopt_nor_pymanopt():
    code = (
        "import sys, quotientopt;"
        "print([name for name in ('geoopt', 'pymanopt', 'scipy') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_import_is_silent_about_geoopts_own_deprecations_and_nothing_else():
    code = (
        "import warnings; warnings.simplefilter('error');"
        "import quotientopt.geoopt;"
        "caught = warnings.catch_warnings(record=True);"
        "seen = caught.__enter__(); warnings.simplefilter('always');"
        "warnings.warn('`torch.jit.script` is deprecated', DeprecationWarning);"
        "print(len(seen))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == "1"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.jit.script(torch.nn.Identity())
    if seen:  # Control: where torch deprecates its script compiler, geoopt by itself does warn.
        plain = [sys.executable, "-W", "error::DeprecationWarning", "-c", "import geoopt"]
        assert subprocess.run(plain, capture_output=True).returncode != 0


def test_a_missing_geoopt_is_one_clear_line():
    code = (
        "import sys; sys.modules['geoopt'] = None\n"
        "try:\n    import quotientopt.geoopt\n"
        "except ImportError as error:\n    print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "quotientopt.geoopt needs geoopt: pip install 'geoopt>=0.5.1'\n"


def test_the_attribute_of_the_package_imports_geoopt_on_first_use():
    code = (
        "import sys, quotientopt as qo;"
        "assert 'geoopt' not in sys.modules;"
        "print(qo.geoopt.FactorManifold(2, 4, 3).name, 'geoopt' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert output.stdout.strip() == "Factor True"
