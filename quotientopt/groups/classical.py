"""GL(r) and its positive multiples of the identity, O(r) and in it the stabiliser of the ones.

GL(r) is what plain attention heads and LoRA pairs cannot see; O(r) is the symmetry of QK-normalised
heads and of the residual stream, and its stabiliser what centring leaves of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_finite,
    check_square,
    locate_first,
    random_orthogonal,
    skew_part,
    wide,
    wide_dtype,
)
from quotientopt.groups.base import StructureGroup


def random_conditioned(
    batch_shape: Sequence[int],
    singular_values: Tensor,
    generator: torch.Generator | None,
    device: torch.device | str,
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

    Random elements are ``Q₁ diag(s) Q₂`` with Haar orthogonal Q₁, Q₂ and singular values s
    logarithmically spaced over ``[cond^{-1/2}, cond^{1/2}]``, so that every matrix of a batch has
    condition number `cond` exactly. For r = 1 that is 1 whatever the element: it is ±c with log c
    uniform over the same interval, so that factors differ.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """r²."""
        return self.r**2

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        values = log_spaced(cond, self.r)
        if self.r == 1:
            values = random_factors(cond, batch_shape, generator, device).unsqueeze(-2)
        return random_conditioned(batch_shape, values, generator, device)

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

    Random elements have log c uniform in ±½ log cond: condition number 1, and over a batch the
    ratio of two factors is at most `cond`.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        factor = random_factors(cond, batch_shape, generator, device).unsqueeze(-1)
        return factor * torch.eye(self.r, dtype=factor.dtype, device=factor.device)

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
    drawn_on = device if generator is None else generator.device
    uniform = torch.rand(*batch_shape, 1, generator=generator, device=drawn_on).to(device)
    return torch.exp((uniform.to(wide_dtype(uniform.device)) - 0.5) * math.log(cond))


def log_spaced(cond: float, count: int) -> Tensor:
    """`count` values from ``cond^{-1/2}`` to ``cond^{1/2}``, equal ratios between neighbours."""
    half = math.log10(cond) / 2
    return torch.logspace(-half, half, count, dtype=torch.float64, device="cpu")


class O(StructureGroup):  # noqa: E742 -- the group's own name
    """The orthogonal group: r×r matrices with ``gᵀ g = I``, of dimension r(r − 1)/2.

    On factor pairs it acts as every subgroup of GL(r) does, and since ``g^{-T} = g`` both factors
    turn alike. :class:`quotientopt.manifolds.GramQuotient` uses it from the right, ``X ↦ X gᵀ``.
    Random elements are Haar-distributed, by QR of a Gaussian matrix with the signs of R's diagonal.

    Parameters
    ----------
    r : int
        Size of the matrices.
    """

    @property
    def dim(self) -> int:
        """r(r − 1)/2."""
        return self.r * (self.r - 1) // 2

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        return random_orthogonal(batch_shape, self.r, generator=generator, device=device)

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
        return g.mT.clone()


class StabilizerOfOnes(O):
    """Orthogonal d×d matrices with ``g 1 = 1``: a copy of O(d − 1), of dimension (d − 1)(d − 2)/2.

    LayerNorm subtracts the mean over the residual axis, the inner product with the all-ones vector
    1. Where that centring has not been folded into the matrices that write to the residual stream,
    only the rotations and reflections that fix 1 are symmetries of a model, and the inner products
    of tokens with 1 are invariants besides the Gram matrix (François & Ravera, arXiv 2602.18948).

    With the reflection H that exchanges ``1/√d`` and the first unit vector, the elements are
    ``H diag(1, h) H`` with h ∈ O(d − 1), Haar-distributed for random ones.

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

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        h = random_orthogonal(batch_shape, self.r - 1, generator=generator, device=device)
        return self.element_of_moving(h)

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
