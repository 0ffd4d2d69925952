"""Riemannian optimization on the quotient manifolds of Transformer symmetries, for PyTorch.

``import quotientopt as qo``; what most people need is :class:`QuotientAdam`, which takes the place
of ``torch.optim.AdamW``, and :func:`find_symmetries`.
"""

from importlib.metadata import version

from quotientopt import groups, manifolds, sections
from quotientopt.optim import QuotientAdam
from quotientopt.symmetries import (
    HeadSymmetry,
    ResidualStream,
    SymmetryMap,
    find_symmetries,
    fold_norms_,
)

__version__ = version("quotientopt")

__all__ = [
    "HeadSymmetry",
    "QuotientAdam",
    "ResidualStream",
    "SymmetryMap",
    "__version__",
    "find_symmetries",
    "fold_norms_",
    "groups",
    "manifolds",
    "sections",
]
