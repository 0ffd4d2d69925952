"""Vertical vectors as r×r matrices times rows."""

from typing import NamedTuple

from torch import Tensor

from quotientopt._linalg import Pair, subtract_product


class VerticalVector(NamedTuple):
    """``(C_A R_A, C_B R_B)`` with r×r coefficients C and rows R, multiplied out when needed."""

    coefficients_A: Tensor  # noqa: N815 -- A is the factor's name
    coefficients_B: Tensor  # noqa: N815 -- B is the factor's name
    rows_A: Tensor  # noqa: N815
    rows_B: Tensor  # noqa: N815

    def dense(self) -> Pair:
        """The pair of products."""
        return self.coefficients_A @ self.rows_A, self.coefficients_B @ self.rows_B

    def subtracted_from(self, u: Pair) -> Pair:
        """u less the vector, in one pass over each factor."""
        return (
            subtract_product(u[0], self.coefficients_A, self.rows_A),
            subtract_product(u[1], self.coefficients_B, self.rows_B),
        )
