"""Factor pairs, and how those show whose rows do one by one.

Rows of equal diagonal charge are found by a sort over the whole model; heads are the classes of
linked rows whose charges between each other agree too. Charges of several query heads of one value
add up, and those of several matrices that read one. Pairs behind a rotation or a norm are for
:mod:`.queries_keys`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quotientopt.groups import GL, StructureGroup
from quotientopt.symmetries.discovery.charges import LIMIT, Rows, largest_groups
from quotientopt.symmetries.registry import inside

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


def common_module(names: Iterable[str]) -> str:
    """Path of the innermost module around all parameters of these names."""
    paths = [name.split(".")[:-1] for name in names]
    common = list(
        itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    )
    return ".".join(parts[0] for parts in common)


# Share of the sums over query heads that must have a charge, or they are too few to compare.
MOST = 0.75
# Share of the rows of a matrix that must find partners before idle ones are believed to follow, or
# single rows to be hidden units.
SOME = 0.25
# Sums that are looked at first, and rows of nearly the same charge that are compared with them.
PROBES, NEIGHBOURS = 3, 6
# Rows tried before a matrix is believed to consist of hidden units.
TRIED = 8


class Index:
    """All rows of a model by their diagonal charge."""

    def __init__(self, versions: Sequence[Rows]) -> None:
        self.versions = versions
        charges, tolerances, where = [], [], []
        for number, rows in enumerate(versions):
            if rows.precision > LIMIT:
                continue
            charge = torch.complex(rows.charge[0], rows.charge[1]).cpu()
            tolerance = (rows.precision * rows.scale).cpu()
            kept = ((charge.abs() > 10 * tolerance) & rows.exercised).nonzero().squeeze(-1)
            charges.append(charge[kept])
            tolerances.append(tolerance[kept])
            where.append(torch.stack((torch.full_like(kept, number), kept), -1))
        empty = torch.zeros(0, dtype=torch.complex128)
        charge = torch.cat(charges) if charges else empty
        order = torch.argsort(charge.real)
        self.charge = charge[order]
        self._real = self.charge.real.contiguous()
        self.tolerance = torch.cat(tolerances)[order] if charges else empty.real
        self.where = torch.cat(where)[order] if charges else torch.zeros(0, 2, dtype=torch.long)

    def equal_pairs(self) -> dict[tuple[int, int], Tensor]:
        """Rows of equal charge, by versions: ``(pairs, 2)`` row numbers."""
        found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        # Every row may come in several versions, with one bias or another.
        for step in range(1, min(9, len(self.charge))):
            close = (self.charge[step:] - self.charge[:-step]).abs() <= (
                self.tolerance[step:] + self.tolerance[:-step]
            )
            if not bool(close.any()):
                continue
            one, two = self.where[:-step][close], self.where[step:][close]
            # The earlier version first, in one matrix the earlier row.
            swap = (one[:, 0] > two[:, 0]) | ((one[:, 0] == two[:, 0]) & (one[:, 1] > two[:, 1]))
            one[swap], two[swap] = two[swap], one[swap]
            for a, b in torch.stack((one[:, 0], two[:, 0]), -1).unique(dim=0).tolist():
                if self.versions[a].key != self.versions[b].key or a == b:
                    own = (one[:, 0] == a) & (two[:, 0] == b)
                    found[a, b].append(torch.stack((one[own, 1], two[own, 1]), -1))
        return {key: torch.cat(parts) for key, parts in found.items()}

    def contains(self, values: Tensor, tolerance: Tensor) -> Tensor:
        """Whether some row has that charge, for every value."""
        found = torch.zeros(len(values), dtype=torch.bool)
        if not len(self.charge):
            return found
        start = torch.searchsorted(self._real, values.real.contiguous())
        for shift in range(-NEIGHBOURS, NEIGHBOURS):
            near = (start + shift).clamp(0, len(self.charge) - 1)
            found |= (self.charge[near] - values).abs() <= tolerance + self.tolerance[near]
        return found

    def lookup(self, values: Tensor, tolerance: Tensor) -> list[list[tuple[int, int]]]:
        """For every value the rows ``(version, row)`` of that charge."""
        widest = (tolerance + self.tolerance.max()).clamp_min(0) if len(self.charge) else tolerance
        first = torch.searchsorted(self._real, values.real - widest)
        last = torch.searchsorted(self._real, values.real + widest, right=True)
        found = []
        for i, (start, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            near = (self.charge[start:end] - values[i]).abs() <= (
                tolerance[i] + self.tolerance[start:end]
            )
            found.append([tuple(w) for w in self.where[start:end][near].tolist()])
        return found


def linked_pairs(index: Index, rank: dict[int, int]) -> Iterator[FoundPair]:
    """Pairs under GL(r) in which every row has one partner."""
    by_cut: dict[tuple[Place, Place], list[tuple[int, Rows, Rows, Tensor]]] = defaultdict(list)
    for (a, b), links in index.equal_pairs().items():
        one, two = index.versions[a], index.versions[b]
        choice = rank[id(one)] + rank[id(two)]
        by_cut[one.key, two.key].append((choice, one, two, links))
    for found in by_cut.values():
        # Versions that a bias without effect makes equal: the one with the bias.
        most = max(len(links) for *_, links in found)
        whole = [entry for entry in found if len(entry[-1]) == most]
        _, one, two, links = min(whole, key=lambda entry: entry[0])
        if two.output != one.output and one.output:
            one, two, links = two, one, links.flip(-1)
        elif one.output == two.output and not one.output:
            continue
        left, right = _completed(one, two, links)
        heads = list(_heads(one, left.unsqueeze(-1), two, right))
        if len(heads) > 1 and not one.output:
            # Hidden units that are active together in this batch look like one linear map.
            heads = [(left.view(-1, 1, 1), right.unsqueeze(-1))]
        for L, J in heads:
            if J.shape[-1] > 1 or not one.output:
                yield _in_order(one, L.squeeze(-1), two, J)


def may_be_units(pair: FoundPair) -> bool:
    """Whether single rows are enough of their matrix to speak for its layer.

    A few that this batch drives far enough are linear behind any activation.
    """
    sides = [rows for rows, _ in (*pair.left, pair.right)]
    return pair.heads >= SOME * min(int(rows.exercised.sum()) for rows in sides)


def _completed(one: Rows, two: Rows, links: Tensor) -> tuple[Tensor, Tensor]:
    """Links once per row; with those of idle rows where all others keep one distance."""
    links = links[links[:, 1].argsort()]
    first: dict[int, int] = {}
    for i, j in links.tolist():
        first.setdefault(j, i)
    left, right = torch.tensor(list(first.values())), torch.tensor(list(first))
    distances, counts = (left - right).unique(return_counts=True)
    idle = (~two.exercised).nonzero().squeeze(-1)
    if len(distances) == 1 and counts[0] >= SOME * (len(right) + len(idle)) and len(idle):
        partners = idle + distances[0]
        there = (partners >= 0) & (partners < len(one))
        silent = there & ~one.exercised[partners.clamp(0, len(one) - 1)]
        right = torch.cat((right, idle[silent]))
        left = torch.cat((left, partners[silent]))
        order = right.argsort()
        left, right = left[order], right[order]
    return left, right


def _heads(left: Rows, L: Tensor, right: Rows, J: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut linked rows into heads: the classes of rows whose charges between each other agree.

    Parameters
    ----------
    L : Tensor, shape (links, members)
        Rows of the left matrix; the charges of all members of a link add up.
    J : Tensor, shape (links,)

    Yields
    ------
    L, J : Tensor
        ``(heads, r, members)`` and ``(heads, r)``, for every size r of a head.
    """

    def same_head(a: int, others: Tensor) -> Tensor:
        D = tolerance = torch.zeros((), dtype=torch.float64)
        one = torch.tensor([a])
        for i, j in ((one, others), (others, one)):
            X = right.products(J[j], J[i]).mT
            size = right.precision * right.sizes(J[j], J[i]).mT
            for member in range(L.shape[-1]):
                Li, Lj = L[i, member], L[j, member]
                X = X - left.products(Li, Lj)
                size = size + left.precision * left.sizes(Li, Lj)
            D = D + X.abs().amax(0).flatten()
            tolerance = tolerance + size.flatten()
        return D.le(2 * tolerance).cpu()

    remaining = torch.arange(len(J))
    classes: dict[int, list[Tensor]] = defaultdict(list)
    for tried in range(len(J)):
        if not len(remaining):
            break
        if tried >= TRIED and set(classes) == {1}:
            classes[1] += list(remaining.unsqueeze(-1))
            break
        same = same_head(int(remaining[0]), remaining)
        same[0] = True
        classes[int(same.sum())].append(remaining[same])
        remaining = remaining[~same]
    for members in classes.values():
        chosen = torch.stack(members)
        yield L[chosen], J[chosen]


def _in_order(left: Rows, L: Tensor, right: Rows, J: Tensor) -> FoundPair:
    """A pair under GL(r) of one member per head, the queries (where it has any) on the left."""
    pair = FoundPair(((left, L),), (right, J), GL(J.shape[-1]))
    if not pair.scores:
        return pair
    return swapped(pair) if keys_first(left, L, right, J) else pair


def grouped_values(index: Index, inputs: Sequence[Rows]) -> Iterator[FoundPair]:
    """Value-output pairs in which several query heads share the value: their charges add up."""
    for left in inputs:
        n = len(left)
        if n > MANY_ROWS or left.precision > LIMIT:
            continue
        charge = torch.complex(left.charge[0], left.charge[1]).cpu()
        tolerance = (left.precision * left.scale).cpu()
        # Members of a sum lie `step` rows apart. One sum alone is the scale of a matrix, which is
        # part of larger groups.
        ways = [(members, step) for members in divisors(n)[1:-1] for step in divisors(n // members)]
        if not ways:
            continue
        # Three sums of each first, all of them in one look; idle ones say nothing.
        probes = torch.tensor(
            [[k // s * m * s + k % s, m, s] for m, s in ways for k in _probes(n // m)]
        ).view(-1, 3)
        sums = torch.stack([charge[i : i + m * s : s].sum() for i, m, s in probes.tolist()])
        allowed = torch.stack([tolerance[i : i + m * s : s].sum() for i, m, s in probes.tolist()])
        idle = sums.abs() <= 10 * allowed
        promising = (idle | index.contains(sums, allowed)).view(-1, PROBES).all(-1)
        for members, step in itertools.compress(ways, promising.tolist()):
            L = torch.arange(n).view(-1, members, step).mT.reshape(-1, members)
            sums, allowed = charge[L].sum(-1), tolerance[L].sum(-1)
            if int((sums.abs() > 10 * allowed).sum()) < MOST * len(L):
                continue
            found = _grouped_pair(index, left, L, index.lookup(sums, allowed))
            if found is not None:
                yield found
                break


def _probes(count: int) -> list[int]:
    """Numbers of the sums that are looked at first."""
    return [0, count // 2, count - 1]


def _grouped_pair(
    index: Index, left: Rows, L: Tensor, matches: list[list[tuple[int, int]]]
) -> FoundPair | None:
    versions = [version for version, _ in itertools.chain.from_iterable(matches)]
    for version in dict.fromkeys(versions):
        right = index.versions[version]
        partner = {i: row for i, m in enumerate(matches) for v, row in m if v == version}
        if not right.output or len(partner) < len(L):
            continue
        rows = torch.tensor([partner[i] for i in range(len(L))])
        order = rows.argsort()
        heads = list(_heads(left, L[order], right, rows[order]))
        if len(heads) != 1:
            continue
        (members, J), r = heads[0], heads[0][1].shape[-1]
        if J.numel() == 1:
            continue
        return FoundPair(
            tuple((left, members[..., m]) for m in range(members.shape[-1])), (right, J), GL(r)
        )
    return None


def several_readers(versions: Sequence[Rows], linked: set[Place]) -> Iterator[FoundPair]:
    """Linear chains whose middle is read by several matrices: their charges add up."""
    writers = [v for v in versions if v.output and v.key not in linked and len(v) > 1]
    readers = [v for v in versions if not v.output and v.key not in linked]
    for right in writers:
        module = right.name.rpartition(".")[0].rpartition(".")[0]
        near = [v for v in readers if len(v) == len(right) and inside(v.name, module)]
        every = torch.arange(len(right)).unsqueeze(0)
        for count in range(2, min(len(near), 4) + 1):
            for chosen in itertools.combinations(near, count):
                left = tuple((rows, every) for rows in chosen)
                # Row by row first: most choices fail there, and the whole is (r × r) large.
                gap = right.charge - torch.stack([rows.charge for rows in chosen]).sum(0)
                allowed = sum(rows.precision * rows.scale for rows in (*chosen, right))
                if bool((gap.abs() > allowed).any()):
                    continue
                if largest_groups(left, (right, every), rotations=False):
                    yield FoundPair(left, (right, every), GL(len(right)))
