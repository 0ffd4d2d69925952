"""Riemannian optimization on the quotient manifolds of Transformer symmetries, for PyTorch.

``import quotientopt as qo``; what most people need is :class:`QuotientAdam`, which takes the place
of ``torch.optim.AdamW``, and :func:`find_symmetries`. ``qo.geoopt`` and ``qo.pymanopt`` are
imported on first use and need those packages.
"""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from quotientopt import checks, groups, manifolds, sections
from quotientopt.optim import QuotientAdam, QuotientSGD, invariant_grad_norm
from quotientopt.symmetries import (
    HeadSymmetry,
    ResidualStream,
    SymmetryMap,
    find_symmetries,
    fold_norms_,
)

__version__ = version("quotientopt")

ADAPTERS = ("geoopt", "pymanopt")

__all__ = [
    "HeadSymmetry",
    "QuotientAdam",
    "QuotientSGD",
    "ResidualStream",
    "SymmetryMap",
    "__version__",
    "checks",
    "find_symmetries",
    "fold_norms_",
    "groups",
    "invariant_grad_norm",
    "manifolds",
    "sections",
]


def __getattr__(name: str) -> ModuleType:
    """Adapters of optional packages, imported on first use."""
    if name in ADAPTERS:
        return import_module(f"quotientopt.{name}")
    raise AttributeError(f"module 'quotientopt' has no attribute {name!r}")
