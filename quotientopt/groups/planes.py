"""The commutant of rotated planes some of which share a frequency, wherever their rows lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_square,
    locate_first,
    random_device,
    standard_normal,
)
from quotientopt._lyapunov import orthogonal_polar_factor
from quotientopt.groups.base import StructureGroup, check_cond
from quotientopt.groups.general_linear import GL, log_spaced, random_conditioned
from quotientopt.groups.rotary import RotaryCommutant

Plane = tuple[int, int]


class PlaneCommutant(StructureGroup):
    """Matrices commuting with rotations of planes of rows, m of which may share one frequency.

    The complex rows of m planes that turn by the same angles are mixed by any complex m×m matrix;
    the rows in no plane pass and are mixed by any real one. The group is
    ``∏_k GL(m_k, C) × GL(r − 2 Σ m_k)``, with γ = X + iY as ``[[X, −Y], [Y, X]]`` on the rows
    (real parts, imaginary parts) of its planes. On the left factor it is γ^{-H}. With one plane to
    every frequency this is :class:`~quotientopt.groups.RotaryCommutant`, whose rows lie in order.

    Parameters
    ----------
    r : int
        Number of rows of both factors.
    frequencies : sequence of sequences of (int, int)
        The planes of every frequency, each by its rows, real part first. Planes that turn by
        opposite angles share a frequency if one of them is given the other way round.

    Attributes
    ----------
    frequencies : tuple of tuples of (int, int)
        As given, but for the order, and with the first plane's rows in order: those with fewer
        planes first.
    planes : tuple of (int, int)
        All planes, in that order.
    pass_rows : tuple of int
        Rows without rotation.

    Raises
    ------
    ValueError
        If a frequency has no plane, or a row is out of range or in two planes.
    """

    def __init__(self, r: int, frequencies: Sequence[Sequence[Plane]]) -> None:
        super().__init__(r)
        found = tuple(_in_one_form(planes) for planes in frequencies)
        self.frequencies = tuple(sorted(found, key=lambda planes: (len(planes), planes)))
        self.planes = tuple(plane for planes in self.frequencies for plane in planes)
        rows = [row for plane in self.planes for row in plane]
        if not all(found) or len(set(rows)) < len(rows) or not all(0 <= row < r for row in rows):
            raise ValueError(
                f"frequencies must be planes of different rows below r = {r}, got {found!r}"
            )
        self.pass_rows = tuple(row for row in range(r) if row not in set(rows))

    @property
    def dim(self) -> int:
        """2 Σ m_k² + (r − 2 Σ m_k)²."""
        complex_part = sum(2 * len(planes) ** 2 for planes in self.frequencies)
        return complex_part + len(self.pass_rows) ** 2

    @property
    def row_order(self) -> tuple[int, ...]:
        """The rows plane by plane, then those that pass: the order of :meth:`in_order`."""
        return (*(row for plane in self.planes for row in plane), *self.pass_rows)

    def in_order(self) -> PlaneCommutant:
        """The same group on rows in :attr:`row_order`.

        There the real Cholesky factor of :meth:`row_products` of a Gram matrix is the complex one,
        and thus in the group.
        """
        place = {row: k for k, row in enumerate(self.row_order)}
        return PlaneCommutant(
            self.r, [[(place[i], place[j]) for i, j in planes] for planes in self.frequencies]
        )

    def random(
        self,
        batch_shape: Sequence[int] = (),
        *,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random unitary bases, singular values logarithmically spaced over ``[cond^{-1/2}, …]``.

        Those of all planes together from ``cond^{-1/2}`` to ``cond^{1/2}``, those of the passing
        rows downwards, so that the whole has condition number `cond` exactly (1 where there is a
        single plane or a single passing row and nothing else).

        Raises
        ------
        ValueError
            If `cond` is below 1 or not finite.
        """
        check_cond(cond)
        device = random_device(generator, device)
        values = log_spaced(cond, len(self.planes))
        start, parts = 0, []
        for first, _ in self._indices(torch.device(device)):
            count, m = first.shape
            own = values[start : start + count * m].view(count, m).to(device)
            start += count * m
            bases = []
            for _ in range(2):
                normal = standard_normal(
                    (*batch_shape, count, m, m, 2), generator=generator, device=device
                )
                Q, R = torch.linalg.qr(torch.view_as_complex(normal))
                phase = R.diagonal(dim1=-2, dim2=-1).sgn()
                bases.append(Q * phase.unsqueeze(-2))
            U, V = bases
            parts.append((U * own.to(U.real.dtype).unsqueeze(-2)) @ V.mH)
        passing = log_spaced(1 / cond, len(self.pass_rows))
        block = random_conditioned(batch_shape, passing, generator, device)
        return self.element(parts, block).to(dtype or torch.get_default_dtype())

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """Complex-linear parts of the blocks of every frequency, passing block, the rest zero."""
        check_square("matrix", matrix, self.r)
        return self.element(*self.parts(matrix))

    def row_products(self, matrix: Tensor) -> Tensor:
        """Complex products of the planes' rows of one frequency, real ones of the passing rows.

        With the complex rows x of the planes and `matrix` = ``X Yᵀ`` a block is ``x yᴴ``, twice the
        projection to complex-linear matrices.
        """
        check_square("matrix", matrix, self.r)
        parts, block = self.parts(matrix)
        return self.element([2 * part for part in parts], block)

    def parts(self, matrix: Tensor) -> tuple[list[Tensor], Tensor]:
        """The complex matrices of all frequencies and the real one of the passing rows.

        Frequencies with equally many planes together: ``(*batch, frequencies, m, m)`` for every m.
        """
        found = []
        for first, second in self._indices(matrix.device):

            def entries(rows: Tensor, columns: Tensor) -> Tensor:
                return matrix[..., rows.unsqueeze(-1), columns.unsqueeze(-2)]

            real = entries(first, first) + entries(second, second)
            imaginary = entries(second, first) - entries(first, second)
            found.append(torch.complex(real / 2, imaginary / 2))
        rows = self._passing(matrix.device)
        return found, matrix[..., rows.unsqueeze(-1), rows]

    def element(self, parts: Sequence[Tensor], block: Tensor) -> Tensor:
        """The real matrix of complex `parts` and a passing `block`, as :meth:`parts` gives them."""
        matrix = block.new_zeros(*block.shape[:-2], self.r, self.r)
        for (first, second), part in zip(self._indices(block.device), parts, strict=True):
            for rows, columns, numbers in (
                (first, first, part.real),
                (second, second, part.real),
                (second, first, part.imag),
                (first, second, -part.imag),
            ):
                matrix[..., rows.unsqueeze(-1), columns.unsqueeze(-2)] = numbers
        rows = self._passing(block.device)
        matrix[..., rows.unsqueeze(-1), rows] = block
        return matrix

    def complex_rows(self, X: Tensor) -> tuple[list[Tensor], Tensor]:
        """Complex rows ``(*batch, frequencies, m, n)`` for every m, and the passing rows."""
        found = [
            torch.complex(X[..., first, :], X[..., second, :])
            for first, second in self._indices(X.device)
        ]
        return found, X[..., self._passing(X.device), :]

    def unitary_factor(self, matrix: Tensor) -> Tensor:
        """The orthogonal element of the group closest to `matrix`: polar factors of its parts."""
        check_square("matrix", matrix, self.r)
        parts, block = self.parts(matrix)
        unitary = []
        for part in parts:
            U, _, Vh = torch.linalg.svd(part)
            unitary.append(U @ Vh)
        return self.element(unitary, orthogonal_polar_factor(block) if self.pass_rows else block)

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` has the block structure of the group and is invertible.

        Entries that must vanish or agree do so to ``100 r ε`` of the largest entry.
        """
        self._check_commutes(g, "rotations")

    def _wide_inverse(self, g: Tensor) -> Tensor:
        parts, block = self.parts(g)
        inverses = []
        for part in parts:
            inverse, info = torch.linalg.inv_ex(part)
            singular = (info > 0).any(dim=-1)
            if bool(singular.any()):
                raise ValueError(f"group element g is singular{locate_first(singular)}")
            inverses.append(inverse)
        return self.element(inverses, super()._wide_inverse(block))

    def _indices(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Rows of the real and of the imaginary parts, ``(frequencies, m)`` for every m."""
        alike: dict[int, list[tuple[Plane, ...]]] = defaultdict(list)
        for planes in self.frequencies:
            alike[len(planes)].append(planes)
        index = [torch.tensor(members, device=device) for members in alike.values()]
        return [(planes[..., 0], planes[..., 1]) for planes in index]

    def _passing(self, device: torch.device) -> Tensor:
        return torch.tensor(self.pass_rows, dtype=torch.long, device=device)

    def _parameters(self) -> tuple[object, ...]:
        return (self.r, self.frequencies)

    def __repr__(self) -> str:
        return f"PlaneCommutant({self.r}, {[list(planes) for planes in self.frequencies]})"

    def __str__(self) -> str:
        sizes = [len(planes) for planes in self.frequencies]
        factors = [
            f"GL({m}, C)" + (f"^{sizes.count(m)}" if sizes.count(m) > 1 else "")
            for m in sorted(set(sizes))
        ]
        if self.pass_rows:
            factors.append(f"GL({len(self.pass_rows)})")
        return " × ".join(factors)


def _in_one_form(planes: Sequence[Plane]) -> tuple[Plane, ...]:
    """Planes by their first row; all the other way round where the first one's rows are not."""
    ordered = sorted(((int(i), int(j)) for i, j in planes), key=min)
    if ordered and ordered[0][0] > ordered[0][1]:
        ordered = [(j, i) for i, j in ordered]
    return tuple(ordered)


def commutant_of(
    r: int, planes: Sequence[Plane], frequencies: Tensor | Sequence[float]
) -> StructureGroup:
    """What commutes with rotations of `planes` by multiples of `frequencies`.

    Equal frequencies are one, opposite ones too, with the plane turned round; rows of frequency
    zero pass.

    Parameters
    ----------
    r : int
    planes : sequence of (int, int)
    frequencies : Tensor or sequence of float, shape (planes,) or (planes, axes)
        Angle per unit of every position that the model has.

    Returns
    -------
    GL, RotaryCommutant or PlaneCommutant
        The first of them that it is.
    """
    angles = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    classes: dict[tuple[float, ...], list[Plane]] = defaultdict(list)
    for (i, j), angle in zip(planes, angles.reshape(len(planes), -1).tolist(), strict=True):
        sign = next((1.0 if value > 0 else -1.0 for value in angle if value != 0), 0.0)
        if sign:
            key = tuple(sign * value for value in angle)
            classes[key].append((i, j) if sign > 0 else (j, i))
    return simplest_commutant(PlaneCommutant(r, list(classes.values())))


def simplest_commutant(group: PlaneCommutant) -> StructureGroup:
    """GL(r) for a group without planes, RotaryCommutant where that is the same group."""
    if not group.planes:
        return GL(group.r)
    rotated = 2 * len(group.planes)
    for layout in ("half", "interleaved"):
        standard = RotaryCommutant(group.r, rotated, layout)
        same = {frozenset(plane) for plane in group.planes} == set(map(frozenset, standard.planes))
        # A plane alone may be read either way round: multiples of its numbers are the same.
        if same and len(group.frequencies) == len(group.planes):
            return standard
    return group
