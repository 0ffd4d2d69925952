"""Commutants of rotations of any planes, and their orthogonal elements.

Planes may share a frequency, and their rows may lie anywhere; :func:`commutant_of` gives the
simplest group for given frequencies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from quotientopt._linalg import (
    check_square,
    locate_first,
    orthogonal_polar_factor,
    skew_part,
    standard_normal,
)
from quotientopt.groups.base import StructureGroup
from quotientopt.groups.classical import GL, O, log_spaced
from quotientopt.groups.rotary import Commutant, RotaryCommutant

Plane = tuple[int, int]


class PlaneCommutant(Commutant):
    """Matrices commuting with rotations of planes of rows, m of which may share one frequency.

    The complex rows of m planes that turn by the same angles are mixed by any complex m×m matrix;
    the rows in no plane pass and are mixed by any real one. The group is
    ``∏_k GL(m_k, C) × GL(r − 2 Σ m_k)``, with γ = X + iY as ``[[X, −Y], [Y, X]]`` on the rows
    (real parts, imaginary parts) of its planes. On the left factor it is γ^{-H}. With one plane to
    every frequency this is :class:`~quotientopt.groups.RotaryCommutant`, whose rows lie in order.

    Random elements have random unitary bases, the singular values of all planes together as
    RotaryCommutant has its moduli, and on the passing rows what it has.

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

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
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
        return self.element(parts, self._random_passing(batch_shape, cond, generator, device))

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


class RotaryPhases(StructureGroup):
    """O(r − rotary_dim) × U(1)^{rotary_dim/2}: the orthogonal elements of a rotary commutant.

    An RMS norm over a head's queries or keys fixes the lengths that (C*)^{rotary_dim/2} would
    change. What is left turns every plane by an angle and rotates the rows that pass. Of m planes
    that share a frequency (:meth:`of`) it is U(m). Random elements are uniformly distributed.

    Parameters
    ----------
    r : int
        Number of rows of both factors.
    rotary_dim : int, optional
        Number of rotated rows (the default: all of them).
    layout : {"half", "interleaved"}
        As for :class:`~quotientopt.groups.RotaryCommutant`.
    """

    def __init__(self, r: int, rotary_dim: int | None = None, layout: str = "half") -> None:
        super().__init__(r)
        self.commutant: RotaryCommutant | PlaneCommutant = RotaryCommutant(r, rotary_dim, layout)

    @classmethod
    def of(cls, commutant: RotaryCommutant | PlaneCommutant) -> RotaryPhases:
        """The orthogonal elements of any commutant."""
        group = cls(commutant.r, 0)
        group.commutant = commutant
        return group

    @property
    def dim(self) -> int:
        """m² for m planes of one frequency, and the dimension of the rotations of passing rows."""
        passing = len(self.commutant.pass_rows)
        turning = (self.commutant.dim - passing**2) // 2
        return turning + passing * (passing - 1) // 2

    def _random(
        self,
        batch_shape: Sequence[int],
        cond: float,
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        return self.commutant._random(batch_shape, 1.0, generator, device)

    def algebra_projection(self, matrix: Tensor) -> Tensor:
        """The skew part of the projection to the commutant's algebra."""
        return skew_part(self.commutant.algebra_projection(matrix))

    def check_element(self, g: Tensor) -> None:
        """Raise ``ValueError`` unless `g` is orthogonal and commutes with all rotations."""
        O(self.r).check_element(g)
        self.commutant.check_element(g)

    def _wide_inverse(self, g: Tensor) -> Tensor:
        return g.mT.clone()

    def _parameters(self) -> tuple[object, ...]:
        return (self.commutant,)

    def __repr__(self) -> str:
        if not isinstance(self.commutant, RotaryCommutant):
            return f"RotaryPhases.of({self.commutant!r})"
        return (
            f"RotaryPhases({self.r}, rotary_dim={self.commutant.rotary_dim}, "
            f"layout={self.commutant.layout!r})"
        )

    def __str__(self) -> str:
        if isinstance(self.commutant, RotaryCommutant):
            return repr(self)
        return f"orthogonal part of {self.commutant}"


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
