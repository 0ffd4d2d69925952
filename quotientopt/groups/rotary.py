"""The commutant of rotary position embeddings, each plane of its own frequency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import check_square, locate_first, orthogonal_polar_factor, standard_normal
from quotientopt.groups.base import StructureGroup
from quotientopt.groups.classical import log_spaced, random_conditioned

_LAYOUTS = ("half", "interleaved")


class Commutant(StructureGroup):
    """Groups that commute with rotations of planes of rows, and mix the rows that pass.

    Attributes
    ----------
    planes : tuple of (int, int)
    pass_rows : tuple of int
    """

    planes: tuple[tuple[int, int], ...]
    pass_rows: tuple[int, ...]

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` has the block structure of the group and is invertible.

        Entries that must vanish or agree do so to ``100 r ε`` of the largest entry.
        """
        self._check_invertible(g)
        deviation = (g - self.algebra_projection(g)).abs().amax(dim=(-2, -1))
        failed = deviation > 100 * self.r * torch.finfo(g.dtype).eps * g.abs().amax(dim=(-2, -1))
        if bool(failed.any()):
            raise ValueError(
                f"g does not commute with the rotations{locate_first(failed)}: "
                f"it is {deviation.max().item():.1e} away from {self!r}"
            )

    def _random_passing(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        """Of the passing rows, whose singular values go downwards.

        So one plane and one passing row take opposite ends of the interval.
        """
        values = log_spaced(1 / cond, len(self.pass_rows))
        return random_conditioned(batch_shape, values, generator, device)


class RotaryCommutant(Commutant):
    """Matrices commuting with every rotary position rotation of distinct frequencies.

    The first `rotary_dim` rows are rotated plane by plane, the others pass. A matrix commuting with
    all rotations multiplies the complex row of each plane by one complex number c = a + ib, the
    block ``[[a, −b], [b, a]]`` on its two rows, and mixes the passing rows freely: the group is
    GL(r − rotary_dim) × (C*)^{rotary_dim/2}. On the left factor the plane is divided by c̄.

    Planes whose frequencies coincide (or vanish) have a larger commutant,
    :class:`~quotientopt.groups.PlaneCommutant`; this is the subgroup that is common to all
    frequencies.

    Random elements have random phases and moduli logarithmically spaced over ``[cond^{-1/2},
    cond^{1/2}]``, on the passing rows an element of GL with such singular values: the whole has
    condition number `cond` exactly (1 where there is a single plane or a single passing row and
    nothing else).

    Parameters
    ----------
    r : int
        Number of rows of both factors (the head dimension).
    rotary_dim : int, optional
        Number of rotated rows, even, at most `r` (the default: all of them).
    layout : {"half", "interleaved"}
        Which rows make a plane: ``(j, j + rotary_dim/2)``, as Hugging Face's ``rotate_half`` pairs
        them, or ``(2j, 2j + 1)``.

    Attributes
    ----------
    planes : tuple of (int, int)
        Row indices of every plane, real part first.
    pass_rows : tuple of int
        Rows without rotation.

    Raises
    ------
    ValueError
        If `rotary_dim` is odd, negative or larger than `r`, or `layout` is unknown.
    """

    def __init__(self, r: int, rotary_dim: int | None = None, layout: str = "half") -> None:
        super().__init__(r)
        rotary_dim = r if rotary_dim is None else rotary_dim
        if not isinstance(rotary_dim, int) or not 0 <= rotary_dim <= r or rotary_dim % 2:
            raise ValueError(
                f"rotary_dim must be an even integer between 0 and r = {r}, got {rotary_dim!r}"
            )
        if layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
        self.rotary_dim = rotary_dim
        self.layout = layout
        half = rotary_dim // 2
        self.planes = tuple(
            (j, j + half) if layout == "half" else (2 * j, 2 * j + 1) for j in range(half)
        )
        self.pass_rows = tuple(range(rotary_dim, r))

    @property
    def dim(self) -> int:
        """(r − rotary_dim)² + rotary_dim."""
        return len(self.pass_rows) ** 2 + self.rotary_dim

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        direction = standard_normal(
            (*batch_shape, len(self.planes), 2), generator=generator, device=device
        )
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        moduli = log_spaced(cond, len(self.planes)).to(direction)
        real, imaginary = (direction * moduli.unsqueeze(-1)).unbind(-1)
        block = self._random_passing(batch_shape, cond, generator, device)
        return self._assemble(real, imaginary, block)

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """Plane blocks to their part ``[[a, −b], [b, a]]``, passing block kept, the rest zero."""
        check_square("matrix", matrix, self.r)
        return self._assemble(*self._parts(matrix))

    def row_products(self, matrix: Tensor) -> Tensor:
        """Complex products of the planes' rows, real products of the passing rows, zero between.

        With the complex rows ``x = X_first + i X_second`` of a plane and `matrix` = ``X Yᵀ``, its
        block is the number ``h(y, x) = Σ ȳ x`` written as a 2×2 matrix: twice the orthogonal
        projection to such matrices. For a Gram matrix ``X Xᵀ`` it is the squared length of the
        complex row times the identity.
        """
        check_square("matrix", matrix, self.r)
        real, imaginary, block = self._parts(matrix)
        return self._assemble(2 * real, 2 * imaginary, block)

    def element(self, numbers: Tensor, block: Tensor | None = None) -> Tensor:
        """The matrix with complex `numbers` on the planes and a real `block` on the passing rows.

        Parameters
        ----------
        numbers : Tensor, shape (*batch, rotary_dim/2)
        block : Tensor, shape (*batch, r − rotary_dim, r − rotary_dim)
            May be left out where no row passes.
        """
        if block is None:
            block = numbers.real.new_zeros(*numbers.shape[:-1], 0, 0)
        return self._assemble(numbers.real, numbers.imag, block)

    def unitary_factor(self, matrix: Tensor) -> Tensor:
        """The element of U(1)^{rotary_dim/2} × O(r − rotary_dim) closest to `matrix`.

        The phase of the complex number of each plane (1 where that vanishes), the orthogonal polar
        factor of the passing block.
        """
        check_square("matrix", matrix, self.r)
        real, imaginary, block = self._parts(matrix)
        modulus = torch.hypot(real, imaginary)
        vanishing = modulus == 0
        modulus = torch.where(vanishing, 1.0, modulus)
        real = torch.where(vanishing, 1.0, real / modulus)
        if self.pass_rows:
            block = orthogonal_polar_factor(block)
        return self._assemble(real, imaginary / modulus, block)

    def complex_rows(self, X: Tensor) -> Tensor:
        """Complex rows of the planes, (*batch, r, n) -> (*batch, rotary_dim/2, n)."""
        first, second = self._plane_slices
        return torch.complex(X[..., first, :], X[..., second, :])

    def from_complex_rows(self, planes: Tensor, passing: Tensor) -> Tensor:
        """Real rows from the complex rows of the planes and the passing rows."""
        first, second = self._plane_slices
        rows = passing.new_zeros(*passing.shape[:-2], self.r, passing.shape[-1])
        rows[..., first, :] = planes.real
        rows[..., second, :] = planes.imag
        rows[..., self.rotary_dim :, :] = passing
        return rows

    def _wide_inverse(self, g: Tensor) -> Tensor:
        real, imaginary, block = self._parts(g)
        squared_modulus = real.square() + imaginary.square()
        vanishing = (squared_modulus == 0).any(dim=-1)
        if bool(vanishing.any()):
            raise ValueError(f"group element g is singular{locate_first(vanishing)}")
        # 1/c = c̄/|c|² on the planes.
        return self._assemble(
            real / squared_modulus, -imaginary / squared_modulus, super()._wide_inverse(block)
        )

    @property
    def _plane_slices(self) -> tuple[slice, slice]:
        """Rows of the real parts and rows of the imaginary parts of all planes."""
        if self.layout == "half":
            half = self.rotary_dim // 2
            return slice(0, half), slice(half, self.rotary_dim)
        return slice(0, self.rotary_dim, 2), slice(1, self.rotary_dim, 2)

    def _parts(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Real and imaginary numbers of the planes, ``(*batch, planes)``, and the passing block."""
        first, second = self._plane_slices

        def entries(rows: slice, columns: slice) -> Tensor:
            return matrix[..., rows, columns].diagonal(dim1=-2, dim2=-1)

        real = (entries(first, first) + entries(second, second)) / 2
        imaginary = (entries(second, first) - entries(first, second)) / 2
        return real, imaginary, matrix[..., self.rotary_dim :, self.rotary_dim :]

    def _assemble(self, real: Tensor, imaginary: Tensor, block: Tensor) -> Tensor:
        matrix = block.new_zeros(*block.shape[:-2], self.r, self.r)
        first, second = self._plane_slices
        for rows, columns, numbers in (
            (first, first, real),
            (second, second, real),
            (second, first, imaginary),
            (first, second, -imaginary),
        ):
            matrix[..., rows, columns].diagonal(dim1=-2, dim2=-1).copy_(numbers)
        matrix[..., self.rotary_dim :, self.rotary_dim :] = block
        return matrix

    def _parameters(self) -> tuple[object, ...]:
        return (self.r, self.rotary_dim, self.layout)

    def __repr__(self) -> str:
        return f"RotaryCommutant({self.r}, rotary_dim={self.rotary_dim}, layout={self.layout!r})"
