"""Queries and keys: pairs that do not show row by row, behind a rotation, a norm or grouping.

The rows that are left over beside values and outputs are read as queries, keys or both in the ways
that attention modules lay them out; the largest group of each reading is kept.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from quotientopt.symmetries.discovery.charges import Rows, largest_groups
from quotientopt.symmetries.discovery.pairs import (
    MANY_ROWS,
    FoundPair,
    Taken,
    common_module,
    divisors,
    keys_first,
    swapped,
)
from quotientopt.symmetries.registry import inside

# Share of its terms that the charge of a length has which a norm hides but for its epsilon.
UNSEEN = 1e-4
# Of queries and keys without values: matrices in one module, and rows of a head.
MANY_CUTS, LARGE_HEAD = 8, 512


def queries_and_keys(
    values: FoundPair, cuts: Sequence[Sequence[Rows]], taken: Taken
) -> Iterator[FoundPair]:
    """Queries and keys beside a value-output pair, with as many heads as it has.

    The rows of a matrix that no pair has taken are read as queries, keys or both in the ways that
    attention modules lay them out, and the largest group of each reading is kept.
    """
    h, g = values.heads, len(values.left)
    scope = common_module([values.left[0][0].name, values.right[0].name])
    near = [cut for cut in cuts if cut[0].output and inside(cut[0].name, scope)]
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
    free_shifts = [s for s in shifts if s and known.issuperset((values + s).flatten().tolist())]
    for a, b in itertools.permutations(free_shifts, 2):
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
                    swapped(pair)
                    if single and keys_first(left, Q[:, 0], right, right_index)
                    else pair
                )
                break


def shared_rotary_keys(
    pair: FoundPair, cuts: Sequence[Sequence[Rows]], taken: Taken
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
        elif cut[0].output and inside(cut[0].name, scope):
            free = taken.free(cut[0])
            if len(free) > r:
                keys += [(cut, part.view(1, 1, r)) for part in (free[-r:], free[:r])]
    yield from _scores(queries, keys, [])


def scores_alone(
    cuts: Sequence[Sequence[Rows]],
    taken: Taken,
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
        fused = any(inside(cut[0].name, path) for cut in near for path in attentions)
        pairs = itertools.combinations((cut[0] for cut in near), 2)
        if not fused and not any(_may_share_a_scale(*pair, taken) for pair in pairs):
            continue
        found: list[FoundPair] = []
        sizes = {r for cut in near for r in divisors(len(taken.free(cut[0])))}
        for r in sorted(sizes, key=lambda r: (r not in ranks, r if r in ranks else -r)):
            if 2 <= r <= LARGE_HEAD:
                found += _scores_of_size(near, taken, r, ranks)
        yield from found


def wider_scores(
    pair: FoundPair, cuts: Sequence[Sequence[Rows]], taken: Taken
) -> Iterator[FoundPair]:
    """Queries and keys of which a pair is only the rows that no rotation turns.

    Beside values their layout tells; without them the rows that pass show first, one by one.
    """
    keys = {pair.left[0][0].key, pair.right[0].key}
    near = [cut for cut in cuts if cut[0].output and cut[0].key in keys]
    free = [len(taken.free(cut[0])) for cut in near]
    sizes = {n // (pair.heads * k) for n in free for k in (1, 2, 3) if n % (pair.heads * k) == 0}
    for r in sorted(size for size in sizes if pair.rank < size <= LARGE_HEAD):
        yield from _scores_of_size(near, taken, r, {r})


def _may_share_a_scale(one: Rows, two: Rows, taken: Taken) -> bool:
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
    near: Sequence[Sequence[Rows]], taken: Taken, r: int, ranks: Collection[int]
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
        for h in divisors(n // r) if n % r == 0 else ():
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
