"""Factor pairs from charges: the largest group that leaves the mismatch of two factors alone.

For a pair (A, B) with group G and any function of the outputs the mismatch
``D = ∂_B Bᵀ − A ∂_Aᵀ`` of the charges is orthogonal to the Lie algebra of G (Noether), and for a
random function almost surely to nothing larger. Which rows to look at, :mod:`.linked_rows` finds
where they show one by one, and :mod:`.queries_keys` where a rotation or a norm stands in between.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
from quotientopt.symmetries.discovery.charges import LIMIT, Rows

Place = tuple[str, int | None]

# Sums over query heads, and queries and keys without values, are looked for in matrices of at most
# so many rows.
MANY_ROWS = 20_000


@dataclass(frozen=True, eq=False)
class FoundPair:
    """A pair as its charges show it.

    Attributes
    ----------
    left : tuple of (Rows, Tensor)
        Members of the left factor: rows and their index ``(heads, r)``. Several query heads of one
        key are several members, as are several matrices that read one.
    right : (Rows, Tensor)
    group : StructureGroup
    others : tuple of StructureGroup
        Groups with algebras as large that fit too; a finite element tells them apart.
    """

    left: tuple[tuple[Rows, Tensor], ...]
    right: tuple[Rows, Tensor]
    group: StructureGroup
    others: tuple[StructureGroup, ...] = ()

    @property
    def heads(self) -> int:
        """Heads of the right factor."""
        return self.right[1].shape[0]

    @property
    def rank(self) -> int:
        """Rows of a head."""
        return self.right[1].shape[1]

    @property
    def scores(self) -> bool:
        """Whether both factors put out what is multiplied with each other: queries and keys."""
        return self.left[0][0].output

    def units(self) -> FoundPair:
        """The same rows one by one: what of a linear map is left where its middle is a ReLU's."""
        ((rows, L),), (other, J) = self.left, self.right
        return FoundPair(((rows, L.reshape(-1, 1)),), (other, J.reshape(-1, 1)), GL(1))

    def places(self) -> Iterator[tuple[Place, Tensor]]:
        """The matrices and the rows of them that take part."""
        for rows, index in (*self.left, self.right):
            yield rows.key, index.flatten()


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


class Taken:
    """Rows that belong to a pair already."""

    def __init__(self) -> None:
        self._rows: dict[Place, set[int]] = defaultdict(set)

    def add(self, pair: FoundPair) -> bool:
        """Take the rows of a pair, unless one of them is taken."""
        if any(self._rows[key] & set(rows.tolist()) for key, rows in pair.places()):
            return False
        for key, rows in pair.places():
            self._rows[key] |= set(rows.tolist())
        return True

    def on_another_axis(self, rows: Rows) -> bool:
        """Whether the same matrix belongs to a pair by its other axis."""
        name, axis = rows.key
        return any(own == name and at != axis and taken for (own, at), taken in self._rows.items())

    def free(self, rows: Rows) -> Tensor:
        """Numbers of the rows that are not taken."""
        taken = self._rows[rows.key]
        return torch.tensor([i for i in range(len(rows)) if i not in taken], dtype=torch.long)


def swapped(pair: FoundPair) -> FoundPair:
    ((left, L),) = pair.left
    right, J = pair.right
    order = L[:, 0].argsort()
    return replace(pair, left=((right, J[order]),), right=(left, L[order]))


def keys_first(left: Rows, L: Tensor, right: Rows, J: Tensor) -> bool:
    """Whether the left factor holds the keys: their bias has no effect, or they are called so.

    Without rotations it cannot matter, the group acts on both alike; it is a matter of names.
    """
    silent = [silent_bias(left, L), silent_bias(right, J)]
    if silent[0] != silent[1]:
        return silent[0]
    if left.name == right.name:
        return bool(L.min() > J.min())
    ends = [_letters(left.name, right.name), _letters(right.name, left.name)]
    return "k" in ends[0] and "k" not in ends[1]


def _letters(name: str, other: str) -> str:
    """What of a name tells it from another."""
    pieces, others = name.lower().split("."), other.lower().split(".")
    differing = [a for a, b in itertools.zip_longest(pieces, others) if a != b and a]
    return "".join(differing)


def silent_bias(rows: Rows, index: Tensor) -> bool:
    """Whether the bias of these rows has no effect, as that of unrotated keys has none."""
    if len(rows.parts) < 2:
        return False
    matrix, bias = rows.parts[:2]
    largest = matrix.sums.slope[index].amax()
    return bool((bias.gradients(index).abs() <= 1e-9 * largest).all())


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def within(name: str, path: str) -> bool:
    """Whether a parameter or module of that name is, or lies in, the module at `path`."""
    return not path or name == path or name.startswith(f"{path}.")


def common_module(names: Iterable[str]) -> str:
    """Path of the innermost module around all parameters of these names."""
    paths = [name.split(".")[:-1] for name in names]
    common = list(
        itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    )
    return ".".join(parts[0] for parts in common)
