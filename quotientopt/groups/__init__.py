"""Structure groups: what acts on the factors of a Transformer without changing its function."""

from quotientopt.groups.base import StructureGroup
from quotientopt.groups.general_linear import GL, Scale
from quotientopt.groups.orthogonal import O
from quotientopt.groups.planes import PlaneCommutant, commutant_of, simplest_commutant
from quotientopt.groups.rotary import RotaryCommutant, RotaryPhases
from quotientopt.groups.stabilizer import StabilizerOfOnes

__all__ = [
    "GL",
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
