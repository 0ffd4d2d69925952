"""The orthogonal group O(r): the symmetry of QK-normalised heads and of the residual stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_finite,
    check_square,
    locate_first,
    random_device,
    random_orthogonal,
    skew_part,
    wide,
)
from quotientopt.groups.base import StructureGroup, check_cond


class O(StructureGroup):  # noqa: E742 -- the group's own name
    """The orthogonal group: r×r matrices with ``gᵀ g = I``, of dimension r(r − 1)/2.

    On factor pairs it acts as every subgroup of GL(r) does, and since ``g^{-T} = g`` both factors
    turn alike. :class:`quotientopt.manifolds.GramQuotient` uses it from the right, ``X ↦ X gᵀ``.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """r(r − 1)/2."""
        return self.r * (self.r - 1) // 2

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Haar-distributed elements, by QR of a Gaussian matrix with the signs of R's diagonal.

        Every orthogonal matrix has condition number 1: `cond` is there so that all groups are
        sampled alike, it is checked and has no other effect.
        """
        check_cond(cond)
        g = random_orthogonal(
            batch_shape, self.r, generator=generator, device=random_device(generator, device)
        )
        return g.to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """The skew part ``(M − Mᵀ)/2``."""
        check_square("matrix", matrix, self.r)
        return skew_part(matrix)

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless ``gᵀ g = I`` to ``100 r ε`` in the precision of `g`."""
        check_square("g", g, self.r)
        check_finite("g", g)
        identity = torch.eye(self.r, dtype=wide(g).dtype, device=g.device)
        deviation = (wide(g).mT @ wide(g) - identity).abs().amax(dim=(-2, -1))
        failed = deviation > 100 * self.r * torch.finfo(g.dtype).eps
        if bool(failed.any()):
            raise ValueError(
                f"g is not orthogonal{locate_first(failed)}: "
                f"gᵀg differs from the identity by {deviation.max().item():.1e}"
            )

    def moving_part(self, X: Tensor) -> Tensor:
        """What the action ``X ↦ X gᵀ`` moves, (*batch, N, d): all of X."""
        return X

    def from_moving_part(self, Y: Tensor) -> Tensor:
        """The matrix with the moving part `Y` and no other."""
        return Y

    def element_of_moving(self, h: Tensor) -> Tensor:
        """The group element that acts on the moving part as `h` does."""
        return h

    def _wide_inverse(self, g: Tensor) -> Tensor:
        return g.mT
