"""Structure groups: what acts on the factors of a Transformer without changing its function."""

from quotientopt.groups.base import StructureGroup
from quotientopt.groups.classical import GL, O, Scale, StabilizerOfOnes
from quotientopt.groups.planes import PlaneCommutant, RotaryPhases, commutant_of, simplest_commutant
from quotientopt.groups.rotary import Commutant, RotaryCommutant

__all__ = [
    "GL",
    "Commutant",
    "O",
    "PlaneCommutant",
    "RotaryCommutant",
    "RotaryPhases",
    "Scale",
    "StabilizerOfOnes",
    "StructureGroup",
    "commutant_of",
    "simplest_commutant",
]
