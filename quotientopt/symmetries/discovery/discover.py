"""Find the symmetries of a model whose classes nobody knows, from gradients of random functions."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quotientopt._system import progress
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.discovery.charges import LIMIT, Rows, rows_of
from quotientopt.symmetries.discovery.claims import (
    FoundStream,
    Names,
    analysed,
    find_stream,
    scales_of,
    scope_of,
    symmetries_of,
)
from quotientopt.symmetries.discovery.pairs import (
    SOME,
    FoundPair,
    Index,
    Taken,
    grouped_values,
    linked_pairs,
    may_be_units,
    several_readers,
)
from quotientopt.symmetries.discovery.point import Call, GenericPoint, Gradients, calls_of
from quotientopt.symmetries.discovery.proof import Prover, all_proved, jointly, proved_scale
from quotientopt.symmetries.discovery.queries_keys import (
    queries_and_keys,
    scores_alone,
    shared_rotary_keys,
    wider_scores,
)
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry
from quotientopt.symmetries.registry import inside, looks_like_attention, qualified

# Float64 copies at once: the point, two gradients where a batch has more tokens than thin factors
# of them have columns, and one that is being worked on.
COPIES = 4
# Of the memory that is free, the share that discovery may take before it goes module by module.
SHARE = 0.5
# In the names of attributes that hold the number or the size of heads.
_WORDS = ("head", "rank", "d_k")


@dataclass
class Discovery:
    """What was found, and what was not.

    Attributes
    ----------
    heads, hidden_units : list of HeadSymmetry
        Proved pairs.
    scales : list of ScaleSymmetry
    stream : FoundStream, optional
    not_exercised : list of str
        Modules whose parameters no output depended on.
    not_examined : list of str
        Parameters outside every module that fits into memory.
    """

    heads: list[HeadSymmetry] = field(default_factory=list)
    hidden_units: list[HeadSymmetry] = field(default_factory=list)
    scales: list[ScaleSymmetry] = field(default_factory=list)
    stream: FoundStream | None = None
    not_exercised: list[str] = field(default_factory=list)
    not_examined: list[str] = field(default_factory=list)


def discover(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    budget: int | None = None,
) -> Discovery:
    """Find the factor pairs of a model by their Noether charges, and prove each one.

    The model runs in evaluation mode and float64 on copies of its parameters, moved to a generic
    point: forward and backward for two random functions of its outputs, and twice more to measure
    rounding. Every claim is a fact about that batch; it is proved by acting with a random element
    of the group, and a larger group must move the outputs.

    Parameters
    ----------
    model : Module
        Not changed.
    inputs, kwargs
        Arguments of one call.
    budget : int, optional
        Bytes that may be taken, by default half of what is free. A model that needs more is
        examined module by module, each on the arguments of its first call.

    Returns
    -------
    Discovery

    Raises
    ------
    ValueError
        If the model does not run on the arguments, has no gradient or is not deterministic in
        evaluation mode, or if no module that has parameters fits into the budget.
    """
    generator = torch.Generator().manual_seed(0)
    budget = int(SHARE * _free_memory(model)) if budget is None else budget
    call = Call(tuple(inputs), dict(kwargs))
    pieces = list(_pieces(model, "", budget))
    if not pieces:
        raise ValueError(
            f"finding the symmetries of {type(model).__name__} needs {COPIES} float64 copies of "
            f"its largest part, more than the {budget / 1e9:.1f} GB that may be used; use a "
            "machine with more memory or register an adapter"
        )
    found = Discovery()
    if pieces == [""]:
        _examine(model, "", call, generator, found)
    else:
        calls = calls_of(model, pieces, lambda: _run_as_it_is(model, call))
        for path in progress(pieces, "examining modules"):
            if path in calls:
                _examine(model.get_submodule(path), path, calls[path], generator, found)
            else:
                found.not_exercised.append(path)
        examined = [
            name for name, _ in model.named_parameters() if any(inside(name, p) for p in pieces)
        ]
        found.not_examined = [n for n, _ in model.named_parameters() if n not in examined]
        found.stream = find_stream(
            found.heads, found.hidden_units, dict(model.named_parameters()), {}, {}
        )
    return found


def _examine(
    module: nn.Module, prefix: str, call: Call, generator: torch.Generator, found: Discovery
) -> None:
    """Add what is found in one module, with names and blocks as of the whole model."""
    point = GenericPoint(module, call, generator)
    reference = point.reference()
    gradients = point.gradients()
    parameters = dict(module.named_parameters())
    cuts = list(rows_of(parameters, point.parameters, gradients))
    idle = _idle(module, gradients)
    suspects = [path for path, part in module.named_modules() if looks_like_attention(part)]
    # Beside matrices that did nothing a pair may look larger than it is: one token attends to
    # itself alone, and its heads are one linear map.
    still = [f"{path}." for path in idle if any(p.ndim > 1 for p in _parameters(module, path))]
    pairs = [
        pair
        for pair in find_pairs(cuts, _numbers(module), suspects)
        if not any(inside(path, scope_of(pair)) for path in still)
    ]
    noise = max(
        (rows.precision for cut in cuts for rows in cut if rows.precision < LIMIT), default=0.0
    )
    prover = Prover(point, reference, noise, generator)
    names = Names(prefix)

    def symmetries(pair: FoundPair) -> list[HeadSymmetry]:
        members = list(symmetries_of(pair, names.of(pair, pairs), parameters, gradients))
        if pair.rank > 1 or pair.scores or not members:
            return members
        # Beside the units of a gated layer a few rows of the gate may look as linear as they are.
        most = max(symmetry.heads for symmetry in members)
        return [symmetry for symmetry in members if symmetry.heads >= SOME * most]

    candidates = [(pair, symmetries(pair)) for pair in pairs]
    scales = list(scales_of(pairs, names))
    prover.prepare([*(s for _, members in candidates for s in members), *scales])
    proved: list[HeadSymmetry] = []
    for pair, members in progress(candidates, "proving pairs"):
        good = all_proved(prover, members, pair.others)
        if members and not good and pair.rank > 1 and not pair.scores and len(pair.left) == 1:
            # A ReLU's units that were all active at once look like one linear map.
            alone = pair.units()
            good = all_proved(prover, symmetries(alone)) if may_be_units(alone) else []
        proved += good
    # Chains last: where they overlap with heads, heads are what an optimizer takes.
    heads = sorted((s for s in proved if not s.of_units), key=lambda s: "chain" in s.name)
    units = [s for s in proved if s.of_units]
    good_scales = [s for s in (proved_scale(prover, scale) for scale in scales) if s is not None]
    heads, units, good_scales = jointly(prover, heads, units, good_scales)
    if not prefix:
        stream = find_stream(heads, units, parameters, gradients.contracted, gradients.looked_up)
        if stream is not None:
            found.stream = analysed(stream, point, reference, prover.proved, generator)
    found.heads += [_prefixed(symmetry, prefix) for symmetry in heads]
    found.hidden_units += [_prefixed(symmetry, prefix) for symmetry in units]
    found.scales += [
        ScaleSymmetry(_renamed(scale.blocks, prefix), scale.name, source=scale.source)
        for scale in good_scales
    ]
    found.not_exercised += [qualified(prefix, path) for path in idle]


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
    index = Index(versions)
    linear = list(linked_pairs(index, rank))
    taken = Taken()
    values = [pair for pair in linear if not pair.scores and pair.rank > 1]
    linked = {pair.left[0][0].key for pair in linear} | {pair.right[0].key for pair in linear}
    values += grouped_values(index, [v for v in versions if not v.output and v.key not in linked])
    values += several_readers(versions, linked | {pair.right[0].key for pair in values})
    kept = [p for p in sorted(values, key=_size) if p.rank > 1 and taken.add(p)]
    # Queries and keys by the layout of the values, and as single rows show them: the larger group.
    scores = [pair for pair in linear if pair.scores]
    for pair in kept:
        scores += queries_and_keys(pair, cuts, taken)
    sizes_of_values = {(pair.heads, pair.rank) for pair in kept}
    for pair in linear:
        if pair.scores and pair.rank > 1 and (pair.heads, pair.rank) not in sizes_of_values:
            scores += wider_scores(pair, cuts, taken)
    kept += [pair for pair in sorted(scores, key=_size) if taken.add(pair)]
    for pair in [pair for pair in kept if pair.scores]:
        kept += [found for found in shared_rotary_keys(pair, cuts, taken) if taken.add(found)]
    units = [pair for pair in (*linear, *values) if pair.rank == 1 and may_be_units(pair)]
    kept += [pair for pair in sorted(units, key=_size) if taken.add(pair)]
    sizes = {*ranks, *(pair.rank for pair in kept)}
    alone = list(scores_alone(cuts, taken, sizes, attentions))
    # Of equal groups the first: a stable sort keeps the order in which sizes were tried.
    alone.sort(key=lambda pair: -pair.heads * pair.group.dim)
    return [*kept, *(pair for pair in alone if taken.add(pair))]


def _size(pair: FoundPair) -> tuple[int, int]:
    """Largest group first; of equal ones the one in more heads."""
    return -pair.heads * pair.group.dim, -pair.heads


def _numbers(module: nn.Module) -> set[int]:
    """Whole numbers that modules and their configurations hold under names that speak of heads."""
    found: set[int] = set()
    for part in module.modules():
        held = dict(vars(part))
        for value in vars(part).values():
            if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
                held |= vars(value)
        found.update(
            value
            for name, value in held.items()
            if type(value) is int and any(word in name for word in _WORDS)
        )
    return found


def _renamed(blocks: Iterable[Block], prefix: str) -> list[Block]:
    return [replace(block, name=qualified(prefix, block.name)) for block in blocks]


def _prefixed(symmetry: HeadSymmetry, prefix: str) -> HeadSymmetry:
    """The symmetry with its blocks under the names of the whole model."""
    return symmetry.renamed(lambda block: qualified(prefix, block.name)) if prefix else symmetry


def _idle(module: nn.Module, gradients: Gradients) -> list[str]:
    """Outermost modules none of whose parameters any output depends on."""
    idle = {
        name
        for name, _ in module.named_parameters()
        if name not in gradients.of or not gradients.charges[name].any
    }
    found: list[str] = []
    for path, part in module.named_modules():
        own = [qualified(path, name) for name, _ in part.named_parameters()]
        if own and all(name in idle for name in own) and not any(inside(path, p) for p in found):
            found.append(path)
    return found


def _parameters(module: nn.Module, path: str) -> Iterator[nn.Parameter]:
    return module.get_submodule(path).parameters()


def _pieces(module: nn.Module, path: str, budget: int) -> Iterator[str]:
    """Paths of the outermost modules that fit into the budget."""
    own = sum(p.numel() for p in module.parameters())
    if own == 0:
        return
    if COPIES * 8 * own <= budget:
        yield path
        return
    for name, child in module.named_children():
        yield from _pieces(child, qualified(path, name), budget)


def _run_as_it_is(model: nn.Module, call: Call) -> None:
    """Run in evaluation mode and the model's own dtype."""
    training = {part: part.training for part in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng():
            model(*call.args, **call.kwargs)
    finally:
        for part, flag in training.items():
            part.training = flag


def _free_memory(model: nn.Module) -> int:
    """Bytes that are free on the device of the parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        # Without the cache of files, which the system gives up.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 * 2**30
