"""Our quotient manifolds as manifolds of geoopt, for its optimizers: ``qo.geoopt``.

Imported on first use, since it needs geoopt: ``pip install geoopt``. Inside this
package ``geoopt`` is geoopt itself, by absolute import.
"""

import warnings

from quotientopt._system import install_command

try:
    with warnings.catch_warnings():
        # geoopt compiles its helpers with torch.jit.script, which torch deprecates.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        import geoopt as _geoopt  # noqa: F401 -- only to say what to install
except ModuleNotFoundError as error:
    if error.name != "geoopt":
        raise
    raise ModuleNotFoundError(
        f"quotientopt.geoopt needs geoopt: {install_command('geoopt')}", name="geoopt"
    ) from None

from quotientopt.geoopt.manifolds import FactorManifold, GramManifold, zero_momentum_

__all__ = ["FactorManifold", "GramManifold", "zero_momentum_"]
