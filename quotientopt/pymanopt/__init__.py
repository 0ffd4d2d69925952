"""Our quotient manifolds in pymanopt's solvers: ``qo.pymanopt``.

Imported on first use, since it needs pymanopt: ``pip install pymanopt``. Inside this
package ``pymanopt`` is pymanopt itself, by absolute import.
"""

from quotientopt._system import install_command

try:
    import pymanopt as _pymanopt  # noqa: F401 -- only to say what to install
except ModuleNotFoundError as error:
    if error.name != "pymanopt":
        raise
    raise ModuleNotFoundError(
        f"quotientopt.pymanopt needs pymanopt: {install_command('pymanopt')}", name="pymanopt"
    ) from None

from quotientopt.pymanopt.manifolds import FactorManifold, FactorPair, GramManifold
from quotientopt.pymanopt.problem import problem

__all__ = ["FactorManifold", "FactorPair", "GramManifold", "problem"]
