"""The rotations that fix the all-ones vector: what centring leaves of the residual symmetry."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_square,
    locate_first,
    random_device,
    random_orthogonal,
    skew_part,
    wide,
)
from quotientopt.groups.base import check_cond
from quotientopt.groups.orthogonal import O


class StabilizerOfOnes(O):
    """Orthogonal d×d matrices with ``g 1 = 1``: a copy of O(d − 1), of dimension (d − 1)(d − 2)/2.

    LayerNorm subtracts the mean over the residual axis, the inner product with the all-ones vector
    1. Where that centring has not been folded into the matrices that write to the residual stream,
    only the rotations and reflections that fix 1 are symmetries of a model, and the inner products
    of tokens with 1 are invariants besides the Gram matrix (François & Ravera, arXiv 2602.18948).

    With the reflection H that exchanges ``1/√d`` and the first unit vector, the elements are
    ``H diag(1, h) H`` with h ∈ O(d − 1).

    Parameters
    ----------
    d : int
        Size of the matrices, at least 2.

    Raises
    ------
    ValueError
        If `d` is no integer above 1.
    """

    def __init__(self, d: int) -> None:
        super().__init__(d)
        if d < 2:
            raise ValueError(f"d must be at least 2 for StabilizerOfOnes, got {d}")

    @property
    def dim(self) -> int:
        """(d − 1)(d − 2)/2."""
        return (self.r - 1) * (self.r - 2) // 2

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Elements distributed uniformly (by the Haar measure); `cond` as for :meth:`O.random`."""
        check_cond(cond)
        h = random_orthogonal(
            batch_shape, self.r - 1, generator=generator, device=random_device(generator, device)
        )
        return self.element_of_moving(h).to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """``C (M − Mᵀ)/2 C`` with the centring matrix ``C = I − 11ᵀ/d``: skew and kills 1."""
        check_square("matrix", matrix, self.r)
        skew = skew_part(matrix)
        skew = skew - skew.mean(dim=-1, keepdim=True)
        return skew - skew.mean(dim=-2, keepdim=True)

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless ``gᵀ g = I`` and ``g 1 = 1`` to ``100 d ε``."""
        super().check_element(g)
        deviation = (wide(g).sum(dim=-1) - 1).abs().amax(dim=-1)
        failed = deviation > 100 * self.r * torch.finfo(g.dtype).eps
        if bool(failed.any()):
            raise ValueError(
                f"g does not fix the all-ones vector{locate_first(failed)}: "
                f"g 1 differs from 1 by {deviation.max().item():.1e}"
            )

    def moving_part(self, X: Tensor) -> Tensor:
        """Coordinates of the rows of `X` orthogonal to 1, ``(*batch, N, d) -> (*batch, N, d − 1)``.

        Under ``X ↦ X gᵀ`` with ``g = H diag(1, h) H`` they go to their product with ``hᵀ``.
        """
        return self._reflect(X)[..., 1:]

    def from_moving_part(self, Y: Tensor) -> Tensor:
        """The matrix whose rows are orthogonal to 1 and have the coordinates `Y`."""
        return self._reflect(torch.nn.functional.pad(Y, (1, 0)))

    def element_of_moving(self, h: Tensor) -> Tensor:
        """``H diag(1, h) H`` for h of shape (*batch, d − 1, d − 1)."""
        element = torch.nn.functional.pad(h, (1, 0, 1, 0))
        corner = torch.nn.functional.pad(h.new_ones(1, 1), (0, self.r - 1, 0, self.r - 1))
        return self._reflect(self._reflect(element + corner).mT).mT

    @cached_property
    def _axis(self) -> Tensor:
        """Unit normal of the mirror of H, float64 on the CPU."""
        normal = torch.full((self.r,), self.r**-0.5, dtype=torch.float64, device="cpu")
        normal[0] -= 1
        return normal / torch.linalg.vector_norm(normal)

    def _reflect(self, X: Tensor) -> Tensor:
        """``X H``; float64 ``H`` is orthogonal and symmetric to rounding."""
        normal = self._axis.to(X)
        return X - 2 * (X @ normal).unsqueeze(-1) * normal
