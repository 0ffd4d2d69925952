"""QuotientAdam on parameters that are sharded over processes (DTensors).

Storage stays sharded, computation is owned. The unit of ownership is what frames tie together: all
heads of a pair, with biases (of fused weights both pairs), or one matrix on the residual stream.
Units are dealt to the processes by size, those of equal shape in turn, so that they stay in stacks.
A step is

1. shards of gradients go to their owners, an all-to-all for the units of each kind, shards of
   weights only where frames are made (and for units whose update reads the weights, see
   :class:`Unit`),
2. an ordinary QuotientAdam on the owners' whole tensors, where what concerns all slices is reduced
   over the processes: whether frames are due, the Grams that break ties, the norm to clip by. All
   processes take the step or all refuse it,
3. updates go back, or new weights where the weights had come, those of one kind while the next is
   computed. Decay and subtraction are done on the shards.

Parameters without frames never move: each process steps its shard. Gradients come averaged, as
``fully_shard`` and ``parallelize_module`` leave them. Nothing here depends on how a DTensor is
placed: along any dimension, on meshes of several dimensions, replicated.

Where parts lie and who owns what is in :mod:`quotientopt.optim.sharded.ownership`, how it travels
in :mod:`quotientopt.optim.sharded.exchange`, the state as torch.distributed.checkpoint takes it in
:mod:`quotientopt.optim.sharded.state`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quotientopt._linalg import compute_dtype, wide_dtype
from quotientopt.optim.bookkeeping.checks import (
    LARGEST_NORM,
    GradientError,
    StepRefusedError,
    clip_scale,
    gradients_of,
    norms_of,
    refuse_nonfinite,
    signature_of,
)
from quotientopt.optim.engine import PreparedStep, frames_are_due
from quotientopt.optim.gauge import begin, put_back
from quotientopt.optim.options import refuse_options_of_whole_models
from quotientopt.optim.sharded.exchange import ShardedPeers, departures, gather
from quotientopt.optim.sharded.ownership import (
    Placed,
    Region,
    common_group,
    deal,
    kinds_of,
    local_part,
)
from quotientopt.optim.sharded.state import collect, load, packed, restore, show
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.block import empty_like_whole

if TYPE_CHECKING:
    from quotientopt.optim.quotient_adam import QuotientAdam


class Sharded:
    """The step of a QuotientAdam some of whose parameters are DTensors.

    Parameters
    ----------
    optimizer : QuotientAdam
        Its param groups, options and symmetries are read; its state is filed here.

    Raises
    ------
    ValueError
        For options that need one process, and parameters on meshes that do not belong together.
    """

    def __init__(self, optimizer: QuotientAdam) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        refuse_options_of_whole_models(groups)
        parameters = [p for group in groups for p in group["params"]]
        known = {id(p) for p in parameters}
        tied = [b.parameter for s in optimizer.symmetries.heads for b in s.blocks]
        # Partners that are frozen, which serve as geometry.
        extra = list({id(p): p for p in tied if id(p) not in known}.values())
        self.group, self.mesh = common_group([*parameters, *extra])
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = local_part(parameters[0]).device
        gathered: list[Any] = [None] * self.size
        regions = [Region.of(p) for p in (*parameters, *extra)]
        dist.all_gather_object(gathered, regions, group=self.group)
        if len({len(found) for found in gathered}) != 1:
            raise ValueError("the processes have optimizers over different numbers of parameters")
        placed = [
            Placed(parameter, [Region(*found[i]) for found in gathered])
            for i, parameter in enumerate((*parameters, *extra))
        ]
        self.placed = placed[: len(parameters)]
        self._of = {id(own.parameter): own for own in placed}
        self.units, streams, symmetries = deal(optimizer, self._of, self.size)
        rounded = {id(p) for g in groups if g["stochastic_rounding"] for p in g["params"]}
        if any(
            own.unit is None and len(own.holders) < self.size and id(own.parameter) in rounded
            for own in self.placed
        ):
            raise ValueError(
                "stochastic_rounding would round copies of one shard differently on different "
                "processes; use master_weights=True"
            )
        self.kinds = kinds_of(self.units)
        self.peers = ShardedPeers(self.group, streams, self.device)
        self.inner = self._inner(symmetries)

    def _inner(self, symmetries: SymmetryMap) -> QuotientAdam:
        """An optimizer of what this process steps, all of it plain tensors."""
        from quotientopt.optim.quotient_adam import QuotientAdam

        local: dict[int, Tensor] = {}
        for key, own in self._of.items():
            parameter = own.parameter
            if own.unit is None:
                values = local_part(parameter)
            elif own.unit.owner == self.rank:
                values = empty_like_whole(parameter, self.device)
            else:
                continue
            own.local = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if own.unit is not None:
                local[key] = own.local
        owned = [own.parameter for key, own in self._of.items() if key in local]
        own_map = symmetries.within(owned).on(local)
        groups = [
            {
                **{k: v for k, v in group.items() if k not in ("params", "param_names")},
                "params": [q for p in group["params"] if (q := self._of[id(p)].local) is not None],
            }
            for group in self.optimizer.param_groups
        ]
        known = inspect.signature(QuotientAdam).parameters  # torch adds some of its own
        options = {k: v for k, v in self.optimizer.defaults.items() if k in known}
        inner = QuotientAdam(groups, **options, symmetries=own_map)
        here = [own for own in self._of.values() if own.local is not None]
        inner._names = {id(own.local): self.optimizer._name(own.parameter) for own in here}
        framed = [(id(own.local), own.framed) for own in here if own.framed]
        self.peers.outside = {k: s.output for k, s in framed if s.embedding or s.output}
        inner._peers = self.peers
        inner._plan()
        self.release()
        return inner

    def _owned(self) -> Iterator[Placed]:
        for unit in self.units:
            if unit.owner == self.rank:
                yield from unit.members

    def hold(self) -> None:
        """Give the whole tensors of owned units memory."""
        for own in self._owned():
            assert own.local is not None
            storage = own.local.untyped_storage()
            size = own.parameter.numel() * own.parameter.element_size()
            if storage.nbytes() != size:
                storage.resize_(size)

    def release(self) -> None:
        """Take the memory back where the next step needs no weights."""
        for own in self._owned():
            assert own.local is not None
            assert own.unit is not None
            own.local.grad = None
            if not own.unit.whole:
                own.local.untyped_storage().resize_(0)

    def step(self) -> None:
        """Take one step, or refuse it, on all processes alike."""
        given = self._given()
        if not any(given.values()):
            return
        self._follow_options()
        active = [self._of[key] for key, has in given.items() if has]
        framed = [own.steps for own in active if own.framed]
        extent = (min(framed), max(framed)) if framed else None
        self.peers.of_step = extent
        due = extent is not None and frames_are_due(extent, self.optimizer.param_groups[0])
        self.hold()
        gather(self, {id(own) for own in active}, due)
        self.peers.departures = departures(self, active, due)
        try:
            self._step_whole_tensors(due)
            self.peers.departures.finish()
        finally:
            self.peers.settle()
            self.release()
        for own in active:
            own.steps += 1
        show(self)

    def _step_whole_tensors(self, due: bool) -> None:
        if due or any(unit.whole for unit in self.units):
            self.peers.settle()  # What follows reads weights, not one gradient after the other.
        self.peers.arrived(p for own in self.inner._slices.plain for p in own)
        held = begin(self.inner._absorbed)
        try:
            prepared, problem = self._prepare()
            scale = self._agree(prepared, problem)
            assert prepared is not None
            for own in self._owned():
                assert own.local is not None
                assert own.unit is not None
                if not own.unit.whole and not due:
                    own.local.detach().zero_()  # The step then leaves the update in its place.
            self.inner._take(prepared, scale, None, held)
        finally:
            put_back(held)

    def _given(self) -> dict[int, bool]:
        """Which parameters have a gradient on any process."""
        gradients = [own.parameter.grad for own in self.placed]
        marks = [0 if g is None else 1 if g.layout == torch.strided else 2 for g in gradients]
        reduced = torch.tensor(marks, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self.group)
        found = reduced.tolist()
        for own, mark in zip(self.placed, found, strict=True):
            if mark == 2:
                raise RuntimeError(
                    f"the gradient of {self.optimizer._name(own.parameter)!r} is sparse; "
                    "QuotientAdam needs dense gradients (for an embedding: sparse=False)"
                )
        return {id(own.parameter): mark == 1 for own, mark in zip(self.placed, found, strict=True)}

    def _follow_options(self) -> None:
        """Take over the options, which schedulers change, and what is frozen."""
        for group, own in zip(self.optimizer.param_groups, self.inner.param_groups, strict=True):
            own.update({k: v for k, v in group.items() if k not in ("params", "param_names")})
        for placed in self._of.values():
            if placed.local is not None:
                placed.local.requires_grad_(placed.parameter.requires_grad)

    def _prepare(self) -> tuple[PreparedStep | None, Exception | None]:
        try:
            return self.inner._prepare(gradients_of(self.inner.param_groups)), None
        except Exception as problem:
            # Told to the others, who would wait for this process in the next collective.
            return None, problem

    def _agree(self, prepared: PreparedStep | None, problem: Exception | None) -> Tensor | None:
        """The factor to clip by; raises on all processes if one of them cannot step."""
        norms, shares = [], list[float]()
        if prepared is not None:
            # In the widest precision, whose squares do not overflow for any entry of float32.
            norms = norms_of(prepared.measured, clipped=True)
            plain = [p for own in self.inner._slices.plain for p in own if p.grad is not None]
            copies = {
                id(own.local): len(own.holders[own.regions[self.rank]])
                for own in self.placed
                if own.unit is None
            }
            shares = [1.0] * len(prepared.dressed_stacks)
            shares += [1 / copies.get(id(p), 1) for p in plain]
        dtype = wide_dtype(self.device)
        total = torch.zeros(2, dtype=dtype, device=self.device)
        if norms:
            weights = torch.tensor(shares, dtype=dtype, device=self.device)
            total[0] = (torch.stack(list(norms)).to(dtype).square() * weights).sum()
        total[1] = float(problem is not None)
        dist.all_reduce(total, group=self.group)
        square, failed = total.tolist()
        if failed:
            self._refuse(problem)
        if not square < float("inf"):
            try:
                refuse_nonfinite(norms, gradients_of(self.inner.param_groups), self.inner._name)
            except GradientError as found:
                problem = found
            self._refuse(problem)
        limit = self.optimizer.param_groups[0]["max_grad_norm"]
        dtypes = {compute_dtype(own.parameter.dtype) for own in self.placed}
        if dtypes != {torch.float64} and (limit is not None or square > LARGEST_NORM**2):
            limit = LARGEST_NORM if limit is None else min(limit, LARGEST_NORM)
        return clip_scale([total[0].sqrt()], limit)

    def _refuse(self, problem: Exception | None) -> NoReturn:
        """Raise the first problem of any process on all of them."""
        told: list[Any] = [None] * self.size
        own = None if problem is None else (isinstance(problem, StepRefusedError), str(problem))
        dist.all_gather_object(told, own, group=self.group)
        rank, found = next(
            ((i, found) for i, found in enumerate(told) if found is not None),
            (0, (True, "the gradients overflow when squared; nothing was updated")),
        )
        if problem is not None and rank == self.rank:
            raise problem
        kind = GradientError if "gradient" in found[1] else StepRefusedError
        raise (kind if found[0] else RuntimeError)(f"on process {rank}: {found[1]}")

    def refresh_frames(self) -> None:
        """Make frames afresh from the weights as they are now."""
        if not self.inner.state and not any(own.steps for own in self.placed):
            return
        self.hold()
        gather(self, set(), due=True)
        self.peers.settle()
        counts = [own.steps for own in self.placed if own.framed]
        self.peers.of_step = (min(counts), max(counts)) if counts else None
        problem: Exception | None = None
        engine, dressings = None, None
        try:
            engine = self.inner._current_engine()
            dressings = engine.fresh_dressings()
        except StepRefusedError as found:
            problem = found
        failed = torch.tensor(float(problem is not None), device=self.device)
        dist.all_reduce(failed, group=self.group)
        if failed:
            self.release()
            self._refuse(problem)
        assert engine is not None
        assert dressings is not None
        engine.refresh(dressings)
        self.release()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict; every process calls it."""
        return packed(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict, whole or sharded in any way; every process calls it."""
        load(self, state_dict)
        self.optimizer._signature = signature_of(self.optimizer.param_groups)

    def refuse_copies(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError(
            "a QuotientAdam of sharded parameters is tied to its processes and cannot be "
            "copied or pickled; save state_dict() with torch.distributed.checkpoint"
        )


def planned(optimizer: QuotientAdam, before: Sharded | None) -> Sharded:
    """The step of an optimizer's parameters as they are now; the state of an earlier one moves."""
    saved = None if before is None else collect(before)
    sharded = Sharded(optimizer)
    if saved:
        restore(sharded, saved, optimizer.param_groups)
    return sharded
