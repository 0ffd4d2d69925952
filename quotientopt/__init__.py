"""Riemannian optimization on the quotient manifolds of Transformer symmetries, for PyTorch.

``import quotientopt as qo``; what most people need is :class:`QuotientAdam`, which takes the place
of ``torch.optim.AdamW``, and :func:`find_symmetries`. ``qo.geoopt``, ``qo.peft`` and
``qo.pymanopt`` are imported on first use; the first and the last need those packages.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from quotientopt import checks, flow, groups, manifolds, nn, sections
from quotientopt._version import __version__
from quotientopt.canonical import (
    ChargeLog,
    align_,
    distance,
    dress_,
    invariants,
    noether_charges,
    plot_spectra,
    redundancy,
    spectra,
)
from quotientopt.nn import dress_tokens
from quotientopt.optim import QuotientAdam, QuotientSGD, invariant_grad_norm
from quotientopt.symmetries import (
    HeadSymmetry,
    ResidualStream,
    SymmetryMap,
    find_symmetries,
    fold_norms_,
)

if TYPE_CHECKING:  # on first use, see below
    from quotientopt import geoopt as geoopt
    from quotientopt import integrations as integrations
    from quotientopt import peft as peft
    from quotientopt import pymanopt as pymanopt

ADAPTERS = ("geoopt", "integrations", "peft", "pymanopt")

__all__ = [
    "ChargeLog",
    "HeadSymmetry",
    "QuotientAdam",
    "QuotientSGD",
    "ResidualStream",
    "SymmetryMap",
    "__version__",
    "align_",
    "checks",
    "distance",
    "dress_",
    "dress_tokens",
    "find_symmetries",
    "flow",
    "fold_norms_",
    "groups",
    "invariant_grad_norm",
    "invariants",
    "manifolds",
    "nn",
    "noether_charges",
    "plot_spectra",
    "redundancy",
    "sections",
    "spectra",
]


def __getattr__(name: str) -> ModuleType:
    """Adapters of optional packages, imported on first use."""
    if name in ADAPTERS:
        return import_module(f"quotientopt.{name}")
    raise AttributeError(f"module 'quotientopt' has no attribute {name!r}")
