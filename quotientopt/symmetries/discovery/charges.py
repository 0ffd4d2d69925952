"""Noether charges of the rows of a model's matrices, and the groups that they show.

The charges are ``X = W ∂Wᵀ`` for random functions of the outputs. For a pair (A, B) with group G
and any such function the mismatch ``D = ∂_B Bᵀ − A ∂_Aᵀ`` is orthogonal to the Lie algebra of G
(Noether), and for a random function almost surely to nothing larger.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
    simplest_commutant,
)
from quotientopt.symmetries.discovery.gradients import Gradient, Sums, in_rows
from quotientopt.symmetries.discovery.point import Gradients

# Charges are compared to this share of the sum of the absolute terms they are made of, or to this
# many times their measured noise, whichever is more; beyond the limit nothing can be told.
PRECISION, NOISES, LIMIT = 1e-11, 100.0, 1e-3


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one parameter: all axes but one, flattened; that one runs along the columns.

    Attributes
    ----------
    name : str
    parameter : Parameter
        Of the model; its layout in memory is that of the rows.
    column_axis : int, optional
        None for a bias, a single column.
    rows : Tensor
        ``(rows, columns)``, at the generic point.
    gradient : Gradient
        Of the whole parameter.
    sums : Sums
        Of the rows.
    start : int
        First of the parameter's rows that belong here: one bias may serve several matrices.
    """

    name: str
    parameter: nn.Parameter
    column_axis: int | None
    rows: Tensor
    gradient: Gradient
    sums: Sums
    start: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        parameter: nn.Parameter,
        column_axis: int | None,
        values: Tensor,
        gradients: Gradients,
    ) -> Part:
        """Cut a parameter into rows."""
        sums = gradients.charges[name].sums(column_axis)
        rows = in_rows(values, column_axis)
        return cls(name, parameter, column_axis, rows, gradients.of[name], sums)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """``|W_i|``, shape ``(rows,)``."""
        return torch.linalg.vector_norm(self.rows, dim=-1)

    def gradients(self, index: Tensor) -> Tensor:
        """``∂W_i`` of rows i, ``(functions, *index.shape, columns)``."""
        return self.gradient.rows(self.column_axis, index + self.start)

    def narrow(self, start: int, length: int) -> Part:
        """Some of the rows, one after the other."""
        chosen = slice(start, start + length)
        return replace(
            self,
            rows=self.rows[chosen],
            sums=self.sums.narrow(chosen),
            start=start,
        )

    def offsets(self, index: Tensor) -> Tensor:
        """Offset in memory of the first column of rows, in elements."""
        axes = [a for a in range(self.parameter.ndim) if a != self.column_axis]
        index = index + self.start
        offset = torch.zeros_like(index)
        for axis in reversed(axes):
            size = self.parameter.shape[axis]
            offset = offset + (index % size) * self.parameter.stride(axis)
            index = index // size
        return offset


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that one map puts out or takes in: of a matrix, with the bias that goes along.

    Attributes
    ----------
    parts : tuple of Part
        The matrix first.
    output : bool
        Whether the rows are what a map puts out (its columns are summed over); else what it takes.
    charge : Tensor
        Diagonal charges ``W_i · ∂W_i``, ``(functions, rows)``.
    scale : Tensor
        Sums of the absolute values of their terms, ``(rows,)``.
    exercised : Tensor
        Whether any function depends on a row, ``(rows,)``, on the CPU like all row numbers.
    precision : float
        Share of the scale that rounding leaves undecided.
    """

    parts: tuple[Part, ...]
    output: bool
    charge: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    exercised: Tensor = field(init=False)
    precision: float = field(init=False)

    def __post_init__(self) -> None:
        charge, scale, noise = (
            torch.stack(of).sum(0)
            for of in zip(
                *((p.sums.charge, p.sums.size, p.sums.noise) for p in self.parts), strict=True
            )
        )
        share = (noise / scale.clamp_min(torch.finfo(scale.dtype).tiny)).nan_to_num(0.0)
        # One row whose terms happen to be tiny must not speak for all.
        typical = scale > 1e-3 * scale.mean()
        worst = share[typical].max().item() if bool(typical.any()) else 0.0
        object.__setattr__(self, "charge", charge)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "exercised", (scale > 1e-12 * scale.amax()).cpu())
        object.__setattr__(self, "precision", max(PRECISION, NOISES * worst))

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.parts[0].name

    @property
    def key(self) -> tuple[str, int | None]:
        """The matrix and its column axis, whatever the bias."""
        return self.parts[0].name, self.parts[0].column_axis

    @property
    def columns(self) -> int:
        """Columns of all parts."""
        return sum(part.rows.shape[-1] for part in self.parts)

    def __len__(self) -> int:
        return len(self.charge[0])

    def products(self, first: Tensor, second: Tensor) -> Tensor:
        """Charges ``W_i · ∂W_j`` of rows i in `first`, ``(…, p)``, and j in `second`, ``(…, q)``.

        Returns
        -------
        Tensor
            Shape ``(functions, …, p, q)``.
        """
        total: Tensor | float = 0.0
        for part in self.parts:
            total = total + part.rows[first] @ part.gradients(second).mT
        assert isinstance(total, Tensor)
        return total

    def sizes(self, first: Tensor, second: Tensor) -> Tensor:
        """Bounds ``|W_i| |∂W_j|`` of the same products, ``(…, p, q)``."""
        total: Tensor | float = 0.0
        for part in self.parts:
            lengths, slopes = part.lengths[first], part.sums.slope[second]
            total = total + lengths.unsqueeze(-1) * slopes.unsqueeze(-2)
        assert isinstance(total, Tensor)
        return total


def rows_of(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], gradients: Gradients
) -> Iterator[list[Rows]]:
    """Every way to cut a parameter into rows; the versions of one with different biases together.

    A bias is another parameter of the same module with as many entries, or two or three times as
    many, of which a part is taken; those with a bias come first, one called like the matrix before
    others.
    """
    for name, parameter in parameters.items():
        if parameter.ndim < 2 or not parameter.numel() or name not in gradients.of:
            continue
        if not parameter.is_floating_point():
            continue
        wide = [axis for axis in range(parameter.ndim) if parameter.shape[axis] > 1]
        contracted = gradients.contracted.get(name, {parameter.ndim - 1})
        if len(wide) > 3 or len(wide) < 1:
            continue
        for axis in wide if len(wide) > 1 else [parameter.ndim - 1, 0]:
            matrix = Part.of(name, parameter, axis, values[name], gradients)
            others = set(wide) - {axis}
            if axis in contracted and not others & contracted:
                length = len(matrix.rows)
                biases = [
                    Part.of(bias, parameters[bias], None, values[bias], gradients).narrow(i, length)
                    for bias in _biases(name, length, parameters, gradients)
                    for i in range(0, parameters[bias].numel(), length)
                ]
                versions = [Rows((matrix, bias), True) for bias in biases]
                yield [*versions, Rows((matrix,), True)]
            elif others & contracted and others - contracted <= {0}:
                # What it takes in; a first axis that is not summed over counts experts or heads.
                yield [Rows((matrix,), False)]


def _biases(
    name: str, rows: int, parameters: Mapping[str, nn.Parameter], gradients: Gradients
) -> list[str]:
    """Names of what may be the bias of a matrix."""
    module, _, own = name.rpartition(".")
    found = [
        other
        for other, parameter in parameters.items()
        if other.rpartition(".")[0] == module
        and other != name
        and parameter.numel() in (rows, 2 * rows, 3 * rows)
        and parameter.ndim <= 2
        and other in gradients.of
        and gradients.charges[other].small
    ]
    # W_Q before b_Q, in_proj_weight before in_proj_bias: the longest common ending or beginning.
    return sorted(found, key=lambda other: -_alike(own, other.rpartition(".")[2]))


def _alike(one: str, two: str) -> int:
    """Length of the common beginning and of the common ending of two names."""
    length = 0
    for a, b in ((one, two), (one[::-1], two[::-1])):
        for x, y in zip(a, b, strict=False):
            if x != y:
                break
            length += 1
    return length


def mismatch(
    left: Sequence[tuple[Rows, Tensor]], right: tuple[Rows, Tensor]
) -> tuple[Tensor, Tensor]:
    """``D = ∂_B Bᵀ − A ∂_Aᵀ`` head by head, and what rounding leaves undecided of it.

    Returns
    -------
    D : Tensor
        Shape ``(functions, heads, r, r)``.
    tolerance : Tensor
        Shape ``(heads, r, r)``.
    """
    rows, index = right
    D = rows.products(index, index).mT
    tolerance = rows.precision * rows.sizes(index, index).mT
    for rows, index in left:
        D = D - rows.products(index, index)
        tolerance = tolerance + rows.precision * rows.sizes(index, index)
    # The sizes are bounds; rounding in the backward pass is that of the largest of them.
    return D, tolerance.amax(dim=(-2, -1), keepdim=True).expand_as(tolerance)


def largest_groups(
    left: Sequence[tuple[Rows, Tensor]], right: tuple[Rows, Tensor], *, rotations: bool = True
) -> list[StructureGroup]:
    """The groups known here whose algebras the mismatch of all heads is orthogonal to.

    The largest of them, or all that are as large.
    """
    if max(rows.precision for rows, _ in (*left, right)) > LIMIT:
        return []
    D, tolerance = mismatch(left, right)
    r = D.shape[-1]

    def holds(group: StructureGroup) -> bool:
        # The algebras are closed under transposition: it does not matter which way D is read.
        return bool((group.algebra_projection(D).abs() <= tolerance).all())

    if holds(GL(r)):
        return [GL(r)]
    if not rotations or r < 2:
        return []

    def vanishes(values: Tensor) -> Tensor:
        return (values.abs() <= 2 * tolerance).all(dim=1).all(dim=0)

    # Entry by entry first: there are many groups of rotations, and most readings have none.
    diagonal = D.diagonal(dim1=-2, dim2=-1)
    zero, skew = vanishes(D), vanishes(D - D.mT)
    trace = vanishes(diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2))
    candidates: list[StructureGroup] = []
    if bool(skew.all()):
        candidates.append(O(r))
    elif r > 2:
        candidates.append(StabilizerOfOnes(r))
    for rotated, layout in itertools.product(range(2, r + 1, 2), ("half", "interleaved")):
        commutant = RotaryCommutant(r, rotated, layout)
        i, j = torch.tensor(commutant.planes).T
        if bool(skew[i, j].all()):
            if bool(trace[i, j].all()) and bool(zero[rotated:, rotated:].all()):
                candidates.append(commutant)
            if bool(skew[rotated:, rotated:].all()):
                candidates.append(RotaryPhases(r, rotated, layout))
    for found in (_commutant(D, tolerance, zero, skew, trace), _phases(D, tolerance, skew)):
        if found is not None and found not in candidates:
            candidates.append(found)
    fitting = [group for group in candidates if holds(group)]
    largest = max((group.dim for group in fitting), default=0)
    return [group for group in fitting if group.dim == largest]


def _commutant(
    D: Tensor, tolerance: Tensor, zero: Tensor, skew: Tensor, trace: Tensor
) -> StructureGroup | None:
    """The commutant of rotations of planes wherever their rows lie, whatever frequencies repeat.

    The charges of rows that pass vanish. Two rows are a plane where ``[[a, b], [b, −a]]`` is left
    of their mismatch, which is all that is orthogonal to the complex numbers; planes share a
    frequency where the same holds of the blocks between them.

    Parameters
    ----------
    D : Tensor, shape (functions, heads, r, r)
    tolerance : Tensor, shape (heads, r, r)
    zero, skew, trace : Tensor, shape (r, r)
        Where D, ``D − Dᵀ`` and ``D_ii + D_jj`` vanish.
    """
    turned = ~zero.diagonal()
    partners = trace & skew & turned & turned.unsqueeze(-1)
    partners = partners & ~torch.eye(len(zero), dtype=torch.bool, device=zero.device)
    if not bool((partners.sum(-1) == turned).all()):
        return None
    return _of_planes(D, 2 * tolerance, partners)


def _phases(D: Tensor, tolerance: Tensor, skew: Tensor) -> StructureGroup | None:
    """The orthogonal part of such a commutant, which norms leave, as :func:`_commutant`.

    Only ``D − Dᵀ`` tells of it: rows that pass are all linked, and each row of a plane to one.
    """
    linked = skew & ~torch.eye(len(skew), dtype=torch.bool, device=skew.device)
    partners = linked & (linked.sum(-1) == 1) & (linked.sum(-1) == 1).unsqueeze(-1)
    if not bool(partners.any()):
        return None
    group = _of_planes(D - D.mT, 4 * tolerance, partners)
    return RotaryPhases.of(group) if isinstance(group, PlaneCommutant) else None


def _of_planes(D: Tensor, tolerance: Tensor, partners: Tensor) -> StructureGroup:
    """The commutant whose planes are pairs of partners; those share a frequency that D links."""
    i, j = torch.triu(partners).nonzero(as_tuple=True)

    def linear(k: Tensor, m: Tensor) -> Tensor:
        """Planes (i, j) and (k, m) between which D is orthogonal to all complex numbers."""
        one, two = i.unsqueeze(-1), j.unsqueeze(-1)
        real, imaginary = D[..., one, k] + D[..., two, m], D[..., two, k] - D[..., one, m]
        largest = torch.maximum(real.abs(), imaginary.abs())
        vanishing = (largest <= tolerance[..., :1, :1]).flatten(0, 1).all(0)
        return vanishing & vanishing.mT

    same, opposite = linear(i, j), linear(j, i)
    found: dict[int, list[tuple[int, int]]] = {}
    for number, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        first = next((k for k in found if same[number, k] or opposite[number, k]), number)
        turned_round = first != number and not same[number, first]
        found.setdefault(first, []).append((b, a) if turned_round else (a, b))
    return simplest_commutant(PlaneCommutant(len(partners), list(found.values())))
