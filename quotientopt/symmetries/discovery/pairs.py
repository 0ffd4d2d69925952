"""Factor pairs from charges: which rows can be changed against each other, and by which group.

For a pair (A, B) with group G and any function of the outputs the mismatch
``D = ∂_B Bᵀ − A ∂_Aᵀ`` of the charges is orthogonal to the Lie algebra of G (Noether), and for a
random function almost surely to nothing larger. Rows whose diagonal charges agree are found by a
sort; heads are the classes of rows whose charges between each other agree too. What a rotation or a
norm has left of GL(r) does not show in single rows: for queries and keys the layout of the values
is tried.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quotientopt.groups import (
    GL,
    O,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
)
from quotientopt.symmetries.discovery.charges import LIMIT, Rows

Place = tuple[str, int | None]

# Share of the sums over query heads that must have a charge, or they are too few to compare.
MOST = 0.75
# Share of the rows of a matrix that must find partners before idle ones are believed to follow.
SOME = 0.25
# Sums that are looked at first, and rows of nearly the same charge that are compared with them.
PROBES, NEIGHBOURS = 3, 6
# Sums over query heads are looked for in matrices of at most so many rows.
MANY_ROWS = 20_000
# Share of its terms that the charge of a length has which a norm hides but for its epsilon.
UNSEEN = 1e-4
# Of queries and keys without values: matrices in one module, and rows of a head.
MANY_CUTS, LARGE_HEAD = 8, 512
# Rows tried before a matrix is believed to consist of hidden units.
TRIED = 8


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
    fitting = [group for group in candidates if holds(group)]
    largest = max((group.dim for group in fitting), default=0)
    return [group for group in fitting if group.dim == largest]


class _Index:
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


def find_pairs(
    cuts: Sequence[Sequence[Rows]], ranks: Collection[int] = (), attentions: Collection[str] = ()
) -> list[FoundPair]:
    """All factor pairs; none shares rows with another.

    Parameters
    ----------
    cuts : sequence of sequence of Rows
        As from :func:`~quotientopt.symmetries.discovery.charges.rows_of`.
    ranks : collection of int
        Sizes that heads may have, where charges alone cannot tell.
    attentions : collection of str
        Paths of modules that look like attention, where fused matrices are cut in more ways.
    """
    versions = [rows for cut in cuts for rows in cut]
    rank = {id(rows): number for cut in cuts for number, rows in enumerate(cut)}
    index = _Index(versions)
    linear = list(_linked(index, rank))
    taken = _Taken()
    values = [pair for pair in linear if not pair.scores and pair.rank > 1]
    linked = {pair.left[0][0].key for pair in linear} | {pair.right[0].key for pair in linear}
    values += _grouped_values(index, [v for v in versions if not v.output and v.key not in linked])
    values += _several_readers(versions, linked | {pair.right[0].key for pair in values})
    kept = [p for p in sorted(values, key=_size) if p.rank > 1 and taken.add(p)]
    # Queries and keys by the layout of the values, and as single rows show them: the larger group.
    scores = [pair for pair in linear if pair.scores]
    for pair in kept:
        scores += _queries_and_keys(pair, cuts, taken)
    kept += [pair for pair in sorted(scores, key=_size) if taken.add(pair)]
    for pair in [pair for pair in kept if pair.scores]:
        kept += [found for found in _shared_rotary_keys(pair, cuts, taken) if taken.add(found)]
    units = [pair for pair in (*linear, *values) if pair.rank == 1]
    kept += [pair for pair in sorted(units, key=_size) if taken.add(pair)]
    sizes = {*ranks, *(pair.rank for pair in kept)}
    alone = list(_scores_alone(cuts, taken, sizes, attentions))
    # Of equal groups the first: a stable sort keeps the order in which sizes were tried.
    alone.sort(key=lambda pair: -pair.heads * pair.group.dim)
    return [*kept, *(pair for pair in alone if taken.add(pair))]


def _size(pair: FoundPair) -> tuple[int, int]:
    """Largest group first; of equal ones the one in more heads."""
    return -pair.heads * pair.group.dim, -pair.heads


class _Taken:
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


def _linked(index: _Index, rank: dict[int, int]) -> Iterator[FoundPair]:
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
        inside = (partners >= 0) & (partners < len(one))
        silent = inside & ~one.exercised[partners.clamp(0, len(one) - 1)]
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
    return _swapped(pair) if _keys_first(left, L, right, J) else pair


def _swapped(pair: FoundPair) -> FoundPair:
    ((left, L),) = pair.left
    right, J = pair.right
    order = L[:, 0].argsort()
    return replace(pair, left=((right, J[order]),), right=(left, L[order]))


def _keys_first(left: Rows, L: Tensor, right: Rows, J: Tensor) -> bool:
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
    slopes = torch.linalg.vector_norm(matrix.gradient[:, index], dim=-1)
    return bool((bias.gradient[:, index, 0].abs() <= 1e-9 * slopes.amax()).all())


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _grouped_values(index: _Index, inputs: Sequence[Rows]) -> Iterator[FoundPair]:
    """Value-output pairs in which several query heads share the value: their charges add up."""
    for left in inputs:
        n = len(left)
        if n > MANY_ROWS or left.precision > LIMIT:
            continue
        charge = torch.complex(left.charge[0], left.charge[1]).cpu()
        tolerance = (left.precision * left.scale).cpu()
        # Members of a sum lie `step` rows apart. One sum alone is the scale of a matrix, which is
        # part of larger groups.
        ways = [
            (members, step) for members in _divisors(n)[1:-1] for step in _divisors(n // members)
        ]
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
    index: _Index, left: Rows, L: Tensor, matches: list[list[tuple[int, int]]]
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


def _several_readers(versions: Sequence[Rows], linked: set[Place]) -> Iterator[FoundPair]:
    """Linear chains whose middle is read by several matrices: their charges add up."""
    writers = [v for v in versions if v.output and v.key not in linked and len(v) > 1]
    readers = [v for v in versions if not v.output and v.key not in linked]
    for right in writers:
        module = right.name.rpartition(".")[0].rpartition(".")[0]
        near = [v for v in readers if len(v) == len(right) and _within(v.name, module)]
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


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def common_module(names: Iterable[str]) -> str:
    """Path of the innermost module around all parameters of these names."""
    paths = [name.split(".")[:-1] for name in names]
    common = list(
        itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    )
    return ".".join(parts[0] for parts in common)


def _queries_and_keys(
    values: FoundPair, cuts: Sequence[Sequence[Rows]], taken: _Taken
) -> Iterator[FoundPair]:
    """Queries and keys beside a value-output pair, with as many heads as it has.

    The rows of a matrix that no pair has taken are read as queries, keys or both in the ways that
    attention modules lay them out, and the largest group of each reading is kept.
    """
    h, g = values.heads, len(values.left)
    scope = common_module([values.left[0][0].name, values.right[0].name])
    near = [cut for cut in cuts if cut[0].output and _within(cut[0].name, scope)]
    queries: list[tuple[Sequence[Rows], Tensor]] = []
    keys: list[tuple[Sequence[Rows], Tensor]] = []
    both: list[tuple[Sequence[Rows], Tensor, Tensor]] = []
    for cut in near:
        free = taken.free(cut[0])
        n = len(free)
        if n and n % h == 0:
            keys += [(cut, free[K]) for K in _layouts(n, h, 1)]
            if n % (h * g) == 0:
                queries += [(cut, free[Q]) for Q in _layouts(n, h, g)]
            if n % (h * (g + 1)) == 0:
                both += [(cut, free[Q], free[K]) for Q, K in _fused_layouts(n, h, g)]
        if g == 1 and cut[0].key == values.right[0].key:
            both += [(cut, Q, K) for Q, K in _beside_values(values.right[1], free)]
    yield from _scores(queries, keys, both)


def _beside_values(values: Tensor, free: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys at constant distances from the values of the same matrix, head by head."""
    if not len(free):
        return
    r = values.shape[1]
    known = set(free.tolist())
    shifts = range(-int(values.min()) // r * r, int(free.max()) + 1, r)
    inside = [s for s in shifts if s and known.issuperset((values + s).flatten().tolist())]
    for a, b in itertools.permutations(inside, 2):
        yield (values + a).unsqueeze(1), (values + b).unsqueeze(1)


def _scores(
    queries: Sequence[tuple[Sequence[Rows], Tensor]],
    keys: Sequence[tuple[Sequence[Rows], Tensor]],
    both: Sequence[tuple[Sequence[Rows], Tensor, Tensor]],
) -> Iterator[FoundPair]:
    """The readings as queries ``(h, g, r)`` and keys ``(h, 1, r)`` that some group fits."""
    candidates = [
        (one, Q, two, K)
        for (one, Q), (two, K) in itertools.product(queries, keys)
        if one is not two and Q.shape[-1] == K.shape[-1]
    ]
    candidates += [(cut, Q, cut, K) for cut, Q, K in both]
    for one, Q, two, K in candidates:
        right_index = K[:, 0]
        for left, right in itertools.product(one, two):
            members = tuple((left, Q[:, m]) for m in range(Q.shape[1]))
            if not _may_be_scores(members, (right, right_index)):
                continue
            groups = largest_groups(members, (right, right_index))
            if groups:
                pair = FoundPair(members, (right, right_index), groups[0], tuple(groups[1:]))
                single = len(members) == 1
                yield (
                    _swapped(pair)
                    if single and _keys_first(left, Q[:, 0], right, right_index)
                    else pair
                )
                break


def _shared_rotary_keys(
    pair: FoundPair, cuts: Sequence[Sequence[Rows]], taken: _Taken
) -> Iterator[FoundPair]:
    """Rotated rows of queries whose other rows are in a pair, and the one key that all read.

    As in multi-head latent attention: the key is the first or the last rows of some other matrix.
    """
    if len(pair.left) > 1:
        return
    own = pair.left[0][0]
    rows = taken.free(own)
    if not len(rows) or len(rows) % pair.heads:
        return
    r = len(rows) // pair.heads
    scope = common_module([own.name, pair.right[0].name])
    queries, keys = [], []
    for cut in cuts:
        if cut[0].key == own.key:
            queries.append((cut, rows.view(1, pair.heads, r)))
        elif cut[0].output and _within(cut[0].name, scope):
            free = taken.free(cut[0])
            if len(free) > r:
                keys += [(cut, part.view(1, 1, r)) for part in (free[-r:], free[:r])]
    yield from _scores(queries, keys, [])


def _scores_alone(
    cuts: Sequence[Sequence[Rows]],
    taken: _Taken,
    ranks: Collection[int],
    attentions: Collection[str],
) -> Iterator[FoundPair]:
    """Queries and keys whose values are in no pair, behind a gate or a norm for example.

    Every size of a head that divides their rows is tried; of readings that fit equally well, as
    those of interleaved rotations do, the one whose size is among `ranks` comes first.
    """
    scopes: dict[str, list[Sequence[Rows]]] = defaultdict(list)
    for cut in cuts:
        # What a head puts out through is no query or key of another.
        if (
            cut[0].output
            and len(cut[0]) <= MANY_ROWS
            and not taken.on_another_axis(cut[0])
            and len(taken.free(cut[0]))
        ):
            owner = cut[0].name.rpartition(".")[0]
            alone = sum(c[0].output and c[0].name.rpartition(".")[0] == owner for c in cuts) == 1
            scopes[owner.rpartition(".")[0] if alone else owner].append(cut)
    for near in scopes.values():
        if len(near) > MANY_CUTS:
            continue
        fused = any(_within(cut[0].name, path) for cut in near for path in attentions)
        pairs = itertools.combinations((cut[0] for cut in near), 2)
        if not fused and not any(_may_share_a_scale(*pair, taken) for pair in pairs):
            continue
        found: list[FoundPair] = []
        sizes = {r for cut in near for r in _divisors(len(taken.free(cut[0])))}
        for r in sorted(sizes, key=lambda r: (r not in ranks, r if r in ranks else -r)):
            if 2 <= r <= LARGE_HEAD:
                found += _scores_of_size(near, taken, r, ranks)
        yield from found


def _may_share_a_scale(one: Rows, two: Rows, taken: _Taken) -> bool:
    """Whether the free rows of two matrices may be queries and keys.

    Every group there is keeps the scale of all rows together, or a norm hides it.
    """
    charges, sizes = [], torch.zeros(())
    for rows in (one, two):
        free = taken.free(rows)
        halves = (free, free[: len(free) // 2], free[len(free) // 2 :])
        charges.append([rows.charge[:, part].sum(-1) for part in halves])
        sizes = sizes + rows.scale[free].sum()
    tolerance = max(one.precision, two.precision, UNSEEN / 10) * sizes
    return any(bool(((x - y).abs() <= tolerance).all()) for x in charges[0] for y in charges[1])


def _scores_of_size(
    near: Sequence[Sequence[Rows]], taken: _Taken, r: int, ranks: Collection[int]
) -> Iterator[FoundPair]:
    free = {id(cut): taken.free(cut[0]) for cut in near}
    # Keys: all rows of a matrix, or those of a fused [k v], one after the other or head by head.
    keys: list[tuple[Sequence[Rows], Tensor]] = []
    for cut in near:
        rows = free[id(cut)]
        n = len(rows)
        if n and n % r == 0:
            keys += [(cut, rows[K]) for K in _layouts(n, n // r, 1)]
        if n and n % (2 * r) == 0:
            halves = [rows[: n // 2], rows[n // 2 :]]
            for half, K in itertools.product(halves, _layouts(n // 2, n // (2 * r), 1)):
                keys.append((cut, half[K]))
            by_head = rows.view(-1, 2, r)
            keys += [(cut, by_head[:, :1]), (cut, by_head[:, 1:])]
    for two, K in keys:
        h = len(K)
        queries = [
            (cut, free[id(cut)][Q])
            for cut in near
            if cut is not two and len(free[id(cut)]) and len(free[id(cut)]) % (h * r) == 0
            for Q in _layouts(len(free[id(cut)]), h, len(free[id(cut)]) // (h * r))
        ]
        yield from _scores(queries, [(two, K)], [])
    # Queries and keys in one matrix, without or with values that are left over: there are many
    # ways to cut it, so that only sizes are tried that heads have elsewhere.
    for cut in near if r in ranks or not ranks else ():
        rows = free[id(cut)]
        n = len(rows)
        for h in _divisors(n // r) if n % r == 0 else ():
            g = n // (r * h) - 1
            if g >= 1:
                both = [(cut, rows[Q], rows[K]) for Q, K in _fused_layouts(n, h, g)]
                yield from _scores([], [], both)
            g = n // (r * h) - 2
            if g < 1:
                continue
            both = [(cut, rows[Q], rows[K]) for Q, K in _fused_layouts(h * (g + 1) * r, h, g)]
            whole = rows.view(h, g + 2, r)
            both.append((cut, whole[:, :g], whole[:, g : g + 1]))
            yield from _scores([], [], both)


def _may_be_scores(left: Sequence[tuple[Rows, Tensor]], right: tuple[Rows, Tensor]) -> bool:
    """Whether the traces of the charges allow a group: equal, or next to nothing under norms."""
    rows, index = right
    keys, sizes = rows.charge[:, index].sum(-1), rows.scale[index].sum(-1)
    queries = torch.zeros_like(keys)
    for rows, index in left:
        queries = queries + rows.charge[:, index].sum(-1)
        sizes = sizes + rows.scale[index].sum(-1)
    precision = max(rows.precision for rows, _ in (*left, right))
    equal = ((keys - queries).abs() <= precision * sizes).all()
    normalised = ((keys.abs() <= UNSEEN * sizes) & (queries.abs() <= UNSEEN * sizes)).all()
    if not (bool(equal) or bool(normalised)):
        return False
    return all(bool(rows.exercised[index].any(-1).all()) for rows, index in (*left, right))


def _layouts(n: int, h: int, g: int) -> Iterator[Tensor]:
    """Ways to cut n rows into h heads of g members: ``(h, g, r)`` row numbers."""
    r = n // (h * g)
    rows = torch.arange(n)
    seen: list[Tensor] = []
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)):
        sizes = [(h, g, r)[axis] for axis in axes]
        cut = rows.view(sizes).permute([axes.index(axis) for axis in range(3)])
        if not any(torch.equal(cut, other) for other in seen):
            seen.append(cut)
            yield cut


def _fused_layouts(n: int, h: int, g: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ways to cut n rows into queries ``(h, g, r)`` and keys ``(h, 1, r)``."""
    r = n // (h * (g + 1))
    rows = torch.arange(n)
    for first in ("queries", "keys"):
        cut = h * g * r if first == "queries" else h * r
        one, two = rows[:cut], rows[cut:]
        q, k = (one, two) if first == "queries" else (two, one)
        for Q, K in itertools.product(_layouts(h * g * r, h, g), _layouts(h * r, h, 1)):
            yield q[Q], k[K]
        whole = rows.view(h, g + 1, r)
        yield (whole[:, :g], whole[:, g:]) if first == "queries" else (whole[:, 1:], whole[:, :1])
