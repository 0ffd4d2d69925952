"""Orbits of factor pairs: invariants, distance, alignment and sections for each structure group."""

from quotientopt.groups import GL, O, RotaryCommutant, StructureGroup
from quotientopt.manifolds.orbits.base import Orbits
from quotientopt.manifolds.orbits.joint_gram import JointGramOrbits
from quotientopt.manifolds.orbits.planes import PlaneOrbits
from quotientopt.manifolds.orbits.products import ProductOrbits


def orbits_of(group: StructureGroup) -> Orbits:
    """The orbits of a group that :func:`~quotientopt.manifolds.vertical.vertical_component` knows.

    Raises
    ------
    TypeError
        For another group.
    """
    if isinstance(group, GL):
        return ProductOrbits(group)
    if isinstance(group, RotaryCommutant):
        return PlaneOrbits(group)
    if type(group) is O:
        return JointGramOrbits(group)
    raise TypeError(f"orbits of factor pairs under {group!r} are not known")


__all__ = ["JointGramOrbits", "Orbits", "PlaneOrbits", "ProductOrbits", "orbits_of"]
