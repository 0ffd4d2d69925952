"""GL(r), what plain attention heads and LoRA pairs cannot see, and its positive multiples of 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_square,
    locate_first,
    random_device,
    random_orthogonal,
    wide_dtype,
)
from quotientopt.groups.base import StructureGroup, check_cond


def random_conditioned(
    batch_shape: Sequence[int],
    singular_values: Tensor,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Haar orthogonal × diagonal × Haar orthogonal, with the singular values given."""
    size = singular_values.shape[-1]
    left = random_orthogonal(batch_shape, size, generator=generator, device=device)
    right = random_orthogonal(batch_shape, size, generator=generator, device=device)
    return (left * singular_values.to(left)) @ right


class GL(StructureGroup):
    """The general linear group: all invertible r×r matrices, of dimension r².

    The symmetry of the value-output circuit of every attention head, of the query-key circuit
    without rotary positions, and of every low-rank adapter.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """r²."""
        return self.r**2

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random elements ``Q₁ diag(s) Q₂`` with Haar orthogonal Q₁, Q₂.

        The singular values s are logarithmically spaced over ``[cond^{-1/2}, cond^{1/2}]``, so
        every matrix of the batch has condition number `cond` exactly. For r = 1 that is 1 whatever
        the element: it is ±c with log c uniform over the same interval, so that factors differ.

        Raises
        ------
        ValueError
            If `cond` is below 1 or not finite.
        """
        check_cond(cond)
        device = random_device(generator, device)
        values = log_spaced(cond, self.r)
        if self.r == 1:
            values = random_factors(cond, batch_shape, generator, device).unsqueeze(-2)
        g = random_conditioned(batch_shape, values, generator, device)
        return g.to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """The identity: the Lie algebra is the space of all r×r matrices."""
        check_square("matrix", matrix, self.r)
        return matrix.clone()

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` is finite, invertible and of shape (*batch, r, r)."""
        self._check_invertible(g)


class Scale(StructureGroup):
    """The positive multiples of the identity, ``c 1`` with c > 0, of dimension one.

    For r = 1 the symmetry of a hidden unit behind a ReLU, which commutes with positive factors
    only: the unit's incoming weights times c, its outgoing ones divided by c.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random multiples c of the identity, log c uniform in ±½ log cond.

        Every element has condition number 1; over a batch the ratio of two factors is at most
        `cond`.

        Raises
        ------
        ValueError
            If `cond` is below 1 or not finite.
        """
        check_cond(cond)
        device = random_device(generator, device)
        factor = random_factors(cond, batch_shape, generator, device).unsqueeze(-1)
        g = factor * torch.eye(self.r, dtype=factor.dtype, device=factor.device)
        return g.to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """The trace's share, ``tr(M)/r 1``."""
        check_square("matrix", matrix, self.r)
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(self.r, dtype=matrix.dtype, device=matrix.device)
        return mean[..., None, None] * eye

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` is a positive multiple of the identity, to 100 ε."""
        self._check_invertible(g)
        deviation = (g - self.algebra_projection(g)).abs().amax(dim=(-2, -1))
        largest = g.abs().amax(dim=(-2, -1))
        failed = (deviation > 100 * torch.finfo(g.dtype).eps * largest) | (g[..., 0, 0] <= 0)
        if bool(failed.any()):
            raise ValueError(f"g is no positive multiple of the identity{locate_first(failed)}")


def random_factors(
    cond: float,
    batch_shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Factors ``(*batch_shape, 1)``, their logarithms uniform over ±½ log `cond`."""
    uniform = torch.rand(*batch_shape, 1, generator=generator, device=device)
    return torch.exp((uniform.to(wide_dtype(uniform.device)) - 0.5) * math.log(cond))


def log_spaced(cond: float, count: int) -> Tensor:
    """`count` values from ``cond^{-1/2}`` to ``cond^{1/2}``, equal ratios between neighbours."""
    half = math.log10(cond) / 2
    return torch.logspace(-half, half, count, dtype=torch.float64, device="cpu")
