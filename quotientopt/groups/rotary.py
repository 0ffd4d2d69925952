"""The commutant of rotary position embeddings: GL(r − rotary_dim) × (C*)^{rotary_dim/2}."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_square,
    locate_first,
    random_device,
    standard_normal,
)
from quotientopt.groups.base import StructureGroup, check_cond
from quotientopt.groups.general_linear import log_spaced, random_conditioned

_LAYOUTS = ("half", "interleaved")


class RotaryCommutant(StructureGroup):
    """Matrices commuting with every rotary position rotation of distinct frequencies.

    The first `rotary_dim` rows are rotated plane by plane, the others pass. A matrix commuting with
    all rotations multiplies the complex row of each plane by one complex number c = a + ib, the
    block ``[[a, −b], [b, a]]`` on its two rows, and mixes the passing rows freely: the group is
    GL(r − rotary_dim) × (C*)^{rotary_dim/2}. On the left factor the plane is divided by c̄.

    Planes whose frequencies coincide (or vanish) have a larger commutant; this is the subgroup that
    is common to all frequencies.

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
        self.planes: tuple[tuple[int, int], ...] = tuple(
            (j, j + half) if layout == "half" else (2 * j, 2 * j + 1) for j in range(half)
        )
        self.pass_rows: tuple[int, ...] = tuple(range(rotary_dim, r))

    @property
    def dim(self) -> int:
        """(r − rotary_dim)² + rotary_dim."""
        return len(self.pass_rows) ** 2 + self.rotary_dim

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random phases, moduli logarithmically spaced over ``[cond^{-1/2}, cond^{1/2}]``.

        The passing rows get an element of GL with the same singular values as :meth:`GL.random`, so
        the whole has condition number `cond` exactly (1 where there is a single plane or a single
        passing row and nothing else).

        Raises
        ------
        ValueError
            If `cond` is below 1 or not finite.
        """
        check_cond(cond)
        device = random_device(generator, device)
        direction = standard_normal(
            (*batch_shape, len(self.planes), 2), generator=generator, device=device
        )
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        moduli = log_spaced(cond, len(self.planes)).to(direction)
        real, imaginary = (direction * moduli.unsqueeze(-1)).unbind(-1)
        # Downwards, so that one plane and one passing row take opposite ends of the interval.
        values = log_spaced(1 / cond, len(self.pass_rows))
        block = random_conditioned(batch_shape, values, generator, device)
        return self._assemble(real, imaginary, block).to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """Plane blocks to their part ``[[a, −b], [b, a]]``, passing block kept, the rest zero."""
        check_square("matrix", matrix, self.r)
        return self._assemble(*self._parts(matrix))

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` has the block structure of the group and is invertible.

        Entries that must vanish or agree do so to ``100 r ε`` of the largest entry.
        """
        self._check_invertible(g)
        deviation = (g - self.algebra_projection(g)).abs().amax(dim=(-2, -1))
        failed = deviation > 100 * self.r * torch.finfo(g.dtype).eps * g.abs().amax(dim=(-2, -1))
        if bool(failed.any()):
            raise ValueError(
                f"g does not commute with the rotary rotations{locate_first(failed)}: "
                f"it is {deviation.max().item():.1e} away from {self!r}"
            )

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

    def _plane_rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(self.planes, dtype=torch.long, device=device).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def _parts(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Real and imaginary numbers of the planes, ``(*batch, planes)``, and the passing block."""
        first, second = self._plane_rows(matrix.device)
        real = (matrix[..., first, first] + matrix[..., second, second]) / 2
        imaginary = (matrix[..., second, first] - matrix[..., first, second]) / 2
        return real, imaginary, matrix[..., self.rotary_dim :, self.rotary_dim :]

    def _assemble(self, real: Tensor, imaginary: Tensor, block: Tensor) -> Tensor:
        matrix = block.new_zeros(*block.shape[:-2], self.r, self.r)
        first, second = self._plane_rows(block.device)
        matrix[..., first, first] = real
        matrix[..., second, second] = real
        matrix[..., second, first] = imaginary
        matrix[..., first, second] = -imaginary
        matrix[..., self.rotary_dim :, self.rotary_dim :] = block
        return matrix

    def _parameters(self) -> tuple[object, ...]:
        return (self.r, self.rotary_dim, self.layout)

    def __repr__(self) -> str:
        return f"RotaryCommutant({self.r}, rotary_dim={self.rotary_dim}, layout={self.layout!r})"
