"""Points and tangent vectors of two arrays, with the arithmetic that pymanopt's solvers use."""

from typing import Any, NamedTuple


class _Fields(NamedTuple):
    A: Any
    B: Any


class FactorPair(_Fields):
    """A pair ``(A, B)`` of NumPy arrays or torch tensors that adds and scales like one vector.

    A tuple: it unpacks, and the manifolds of :mod:`quotientopt.manifolds` take it where its members
    are tensors. Scalars are used as Python numbers, so that a NumPy scalar does not widen the
    dtype.
    """

    __slots__ = ()

    # Without these a NumPy scalar on the left would treat the pair as a sequence to broadcast over.
    __array_priority__ = 1000
    __array_ufunc__ = None

    def __add__(self, other: Any) -> "FactorPair":
        A, B = other
        return FactorPair(self.A + A, self.B + B)

    def __sub__(self, other: Any) -> "FactorPair":
        A, B = other
        return FactorPair(self.A - A, self.B - B)

    def __mul__(self, scalar: Any) -> "FactorPair":
        scalar = float(scalar)
        return FactorPair(scalar * self.A, scalar * self.B)

    def __rmul__(self, scalar: Any) -> "FactorPair":
        return self * scalar

    def __truediv__(self, scalar: Any) -> "FactorPair":
        scalar = float(scalar)
        return FactorPair(self.A / scalar, self.B / scalar)

    def __neg__(self) -> "FactorPair":
        return FactorPair(-self.A, -self.B)
