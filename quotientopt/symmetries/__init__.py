"""Symmetries of Transformer models: found in their parameters, acted with, verified."""

# In reading order: block, head (views of parameters, and what acts on them); classes, registry
# (what is known of a module by its class); exactness (shared parameters); residual (the stream and
# its norms); verification; orbits, census (what is counted); map (all of a model); find; fold.

from quotientopt.symmetries import adapters as _adapters  # noqa: F401 -- registers them
from quotientopt.symmetries.block import Block, HeadBlocks
from quotientopt.symmetries.find import find_symmetries, gaps, symmetries_from, warn_of_gaps
from quotientopt.symmetries.fold import fold_norms_
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry, Translation, matrix_groups
from quotientopt.symmetries.map import SymmetryMap
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, register
from quotientopt.symmetries.residual import (
    CentredStream,
    Norm,
    Reader,
    ResidualStream,
    register_norm,
)

__all__ = [
    "Block",
    "CentredStream",
    "Contribution",
    "HeadBlocks",
    "HeadSymmetry",
    "Norm",
    "NotUnderstoodError",
    "Reader",
    "ResidualStream",
    "ScaleSymmetry",
    "SymmetryMap",
    "Translation",
    "find_symmetries",
    "fold_norms_",
    "gaps",
    "matrix_groups",
    "register",
    "register_norm",
    "symmetries_from",
    "warn_of_gaps",
]
