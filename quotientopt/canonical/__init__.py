"""Canonical forms of models: dressed weights, invariants, distances, alignment, charges, pictures.

Acts on models through their symmetries (:mod:`quotientopt.symmetries`); knows nothing of
architectures, and of optimizers only that they may have a ``move_state_``.
"""

from quotientopt.canonical.align import Alignment, align_
from quotientopt.canonical.distance import distance
from quotientopt.canonical.dress import Dressing, dress_
from quotientopt.canonical.invariants import (
    Count,
    FactoredInvariant,
    Redundancy,
    invariants,
    redundancy,
)
from quotientopt.canonical.noether import ChargeLog, ChargeRecord, noether_charges
from quotientopt.canonical.spectra import Spectrum, plot_spectra, spectra

__all__ = [
    "Alignment",
    "ChargeLog",
    "ChargeRecord",
    "Count",
    "Dressing",
    "FactoredInvariant",
    "Redundancy",
    "Spectrum",
    "align_",
    "distance",
    "dress_",
    "invariants",
    "noether_charges",
    "plot_spectra",
    "redundancy",
    "spectra",
]
