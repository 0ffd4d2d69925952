"""Variants of QuotientAdam that are no options of it: patches, undone when their context ends.

They reach into the optimizer's private parts and assume what the reference trainings give: every
parameter has a gradient at every step, and one optimizer trains at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from quotientopt.groups import GL
from quotientopt.manifolds import FactorQuotient
from quotientopt.optim import buckets as bucket_module
from quotientopt.optim import engine as engine_module
from quotientopt.optim import polar as polar_module
from quotientopt.optim.bookkeeping.slices import SIDES, Slice
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.engine import Engine
from quotientopt.optim.update import Product, Sampling, interval_of
from quotientopt.symmetries import HeadSymmetry

Patch = Generator[None, None, None]
WRITING = ("output", "down")


@contextmanager
def pooled_residual_frames(class_of: Callable[[Slice], Hashable]) -> Patch:
    """One residual frame for all slices of a class: their covariances are summed for it.

    Fixed frames of embeddings stay their own.
    """
    refresh, weights_grams = Engine._refresh, Engine._weights_grams

    def pooled(buckets: Sequence[Bucket], stacks: Sequence[Tensor]) -> list[Tensor]:
        totals: dict[Hashable, Tensor] = {}
        classes = [[class_of(slice_) for slice_ in bucket.slices] for bucket in buckets]
        for own, stack in zip(classes, stacks, strict=True):
            for name, matrix in zip(own, stack, strict=True):
                totals[name] = totals[name] + matrix if name in totals else matrix
        return [torch.stack([totals[name] for name in own]) for own in classes]

    def pooled_refresh(engine: Engine, *arguments: Any) -> list[Tensor]:
        buckets = [b for b in engine.buckets if b.residual and not b.embedding]
        own = [bucket.state["residual_covariance"] for bucket in buckets]
        for bucket, covariance in zip(buckets, pooled(buckets, own), strict=True):
            bucket.state["residual_covariance"] = covariance
        try:
            return refresh(engine, *arguments)
        finally:
            for bucket, covariance in zip(buckets, own, strict=True):
                bucket.state["residual_covariance"] = covariance

    def pooled_grams(engine: Engine, *arguments: Any) -> tuple[dict[int, Tensor], Any]:
        grams, streams = weights_grams(engine, *arguments)
        buckets = [b for b in engine.buckets if id(b) in grams and not b.embedding]
        sums = pooled(buckets, [grams[id(bucket)] for bucket in buckets])
        return grams | {id(b): gram for b, gram in zip(buckets, sums, strict=True)}, streams

    with mock.patch.multiple(Engine, _refresh=pooled_refresh, _weights_grams=pooled_grams):
        yield


def layer_and_direction(slice_: Slice) -> Hashable:
    """Layer of a slice, and whether it reads the residual stream or writes to it.

    Embeddings and head belong to no layer: each is a class of its own.
    """
    parts = slice_.name.split(".")
    if parts[0] != "blocks":
        return slice_.name
    return parts[1], any(part in WRITING for part in parts)


@contextmanager
def decomposed_residual_frames() -> Patch:
    """Residual frames by an eigen-decomposition every time, not by orthogonal iteration."""
    refresh = Engine._refresh

    def from_nothing(engine: Engine, *arguments: Any) -> list[Tensor]:
        for bucket in engine.buckets:
            if not bucket.embedding:
                bucket.oriented = [False] * len(bucket.slices)
        return refresh(engine, *arguments)

    with mock.patch.object(Engine, "_refresh", from_nothing):
        yield


@contextmanager
def unrotated_second_moment() -> Patch:
    """Leave v as it is when the frames change; only m moves along."""
    transport = bucket_module.transport_

    def without_square(
        state: Mapping[str, Tensor], left: Tensor | None, right: Tensor | None
    ) -> None:
        kept = state["exp_avg_sq"].clone()
        transport(state, left, right)
        state["exp_avg_sq"].copy_(kept)

    with mock.patch.object(bucket_module, "transport_", without_square):
        yield


@contextmanager
def covariances(every: int, beta: float) -> Patch:
    """Covariances take every `every`-th gradient and decay by `beta` each time, at any age."""

    def at_any_age(most: int, group: Mapping[str, Any]) -> Sampling:
        return Sampling(every, beta)

    with mock.patch.object(engine_module, "sampling", at_any_age):
        yield


@contextmanager
def intervals(part: int | None) -> Patch:
    """Frames last a `part`-th of the steps so far; None: ``refresh_every``, at any age."""

    def due(extent: tuple[int, int], group: Mapping[str, Any]) -> bool:
        (fewest, most), longest = extent, group["refresh_every"]
        interval = longest if part is None else interval_of(most + 1, longest, part)
        return fewest == 0 or (most + 1) % interval == 0

    with mock.patch.object(engine_module, "frames_are_due", due):
        yield


@contextmanager
def together(*patches: Callable[[], AbstractContextManager[None]]) -> Patch:
    """Several patches at once."""
    with ExitStack() as entered:
        for patch in patches:
            entered.enter_context(patch())
        yield


@contextmanager
def momentum_covariances() -> Patch:
    """Covariances take the momentum β₁ m + (1 − β₁) z of the step in place of its gradient."""
    begin, accumulate = Engine._begin_refresh, Engine._accumulate
    changes: dict[int, Tensor] = {}

    def remembered(engine: Engine, dressings: Any) -> dict[int, Tensor]:
        changes.update(begin(engine, dressings))
        return dict(changes)

    def of_momentum(
        engine: Engine, active: Any, dressed: Sequence[Tensor], *arguments: Any
    ) -> None:
        momenta = []
        for (bucket, _), gradients in zip(active, dressed, strict=True):
            momentum, frames = bucket.state["exp_avg"], bucket.residual_frames()
            if frames is not None:
                momentum = momentum @ frames.mT[:, None, None]
            if bucket.heads is not None and id(bucket.heads) in changes:
                momentum = bucket.of_heads(changes[id(bucket.heads)]) @ momentum
            beta = engine.param_groups[bucket.group_index]["betas"][0]
            momenta.append(beta * momentum + (1 - beta) * gradients)
        changes.clear()
        accumulate(engine, active, momenta, *arguments)

    with mock.patch.multiple(Engine, _begin_refresh=remembered, _accumulate=of_momentum):
        yield


@contextmanager
def narrow_frames() -> Patch:
    """Covariances and residual frames are rounded to bfloat16 after every step."""
    step = Engine.step

    def rounded(engine: Engine, *arguments: Any) -> None:
        step(engine, *arguments)
        kept = [heads.covariance for heads in engine.heads]
        for bucket in engine.buckets:
            own = (bucket.state.get(f"residual_{key}") for key in ("covariance", "frame"))
            kept += [tensor for tensor in own if tensor is not None]
        for tensor in kept:
            tensor.copy_(tensor.bfloat16())

    with mock.patch.object(Engine, "step", rounded):
        yield


@contextmanager
def polar_composition(*polynomials: Sequence[float]) -> Patch:
    """The polar factor by the composition of other odd polynomials."""
    first = polar_module._in_powers_of_the_centred(polynomials[0])
    with mock.patch.multiple(polar_module, COMPOSITION=polynomials, CENTRED=first):
        yield


@contextmanager
def reused_polar_factors(every: int) -> Patch:
    """Polar factors are made at every `every`-th step and with fresh frames, else reused.

    P of D P = U Vᵀ is kept in the frames of D, on its shorter side, and the update has the size of
    D whichever P it is made with.
    """
    factors: dict[int, Tensor] = {}
    steps = place = 0
    fresh = True
    step = Engine.step

    def counted_step(engine: Engine, *arguments: Any) -> None:
        nonlocal steps, place, fresh
        steps, place = steps + 1, 0
        fresh = arguments[2] is not None or steps % every == 0
        step(engine, *arguments)

    def direction(matrix: Tensor, right: Tensor | None, multiply: Product) -> Tensor:
        nonlocal place
        tall = matrix.size(1) >= matrix.size(2)
        long = matrix if tall else matrix.mT
        if fresh:
            factors[place] = inverse_root(long.mT @ long)
        orthogonal = long @ factors[place]
        place += 1
        orthogonal = orthogonal if tall else orthogonal.mT
        size, norm = (torch.linalg.matrix_norm(X, keepdim=True) for X in (matrix, orthogonal))
        orthogonal = orthogonal * (size / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        return orthogonal if right is None else orthogonal @ right

    with (
        mock.patch.object(Engine, "step", counted_step),
        mock.patch.object(bucket_module, "polar_direction", direction),
    ):
        yield


def inverse_root(gram: Tensor) -> Tensor:
    """(XᵀX)^{-1/2}, singular values below a fiftieth of their Schatten 8-norm taken as that."""
    squares, vectors = torch.linalg.eigh(gram.double())
    values = squares.clamp_min(0).sqrt()
    bound = values.pow(8).sum(-1, keepdim=True).pow(1 / 8)
    values = values.maximum(0.02 * bound).clamp_min(torch.finfo(gram.dtype).tiny)
    return ((vectors / values.unsqueeze(-2)) @ vectors.mT).to(gram)


@contextmanager
def horizontal_updates() -> Patch:
    """Add only the horizontal component of the update of every head pair under GL(r).

    In the preconditioned metric, at the weights before the step. Both factors of a pair are
    needed, so the updates of all pairs are held back until the end of the step.
    """
    step, add = Engine.step, Bucket._add_to_parameters
    held: list[tuple[Bucket, slice, Tensor, Mapping[str, Any], Tensor | None]] = []

    def hold(
        bucket: Bucket, rows: slice, update: Tensor, group: Mapping[str, Any], gate: Tensor | None
    ) -> None:
        if bucket.heads is None:
            add(bucket, rows, update, group, gate)
        else:
            held.append((bucket, rows, update, group, gate))

    def projected_step(engine: Engine, *arguments: Any) -> None:
        step(engine, *arguments)
        factors: dict[tuple[HeadSymmetry, str], list[Tensor]] = defaultdict(list)
        for bucket, rows, update, _, _ in held:
            for slice_, own in zip(bucket.slices[rows], update, strict=True):
                if slice_.symmetry is not None and isinstance(slice_.symmetry.group, GL):
                    factors[slice_.symmetry, slice_.side] += own.view(slice_.shape).unbind()
        for symmetry in {symmetry: None for symmetry, _ in factors}:
            project_(symmetry, [factors[symmetry, side] for side in SIDES])
        for entry in held:
            add(*entry)
        held.clear()

    with (
        mock.patch.object(Engine, "step", projected_step),
        mock.patch.object(Bucket, "_add_to_parameters", hold),
    ):
        yield


def project_(symmetry: HeadSymmetry, updates: Sequence[Sequence[Tensor]]) -> None:
    """Replace the updates of the blocks of both factors by their horizontal components."""
    point = (torch.cat(symmetry.left, -1), torch.cat(symmetry.right, -1))
    vector = (torch.cat(list(updates[0]), -1), torch.cat(list(updates[1]), -1))
    manifold = FactorQuotient(symmetry.rank, *symmetry.columns, batch_shape=(symmetry.heads,))
    projected = manifold.horizontal_component(point, vector)
    for blocks, factor in zip(updates, projected, strict=True):
        pieces = factor.split([block.size(-1) for block in blocks], dim=-1)
        for block, piece in zip(blocks, pieces, strict=True):
            block.copy_(piece)


@contextmanager
def fixed_update_size(size_of: Callable[[Slice], float]) -> Patch:
    """Scale every framed matrix's update to a given root mean square, in dressed coordinates."""
    turn_back, direction = Bucket._turn_back, Bucket._direction
    slices: Sequence[Slice] = ()

    def remembered(bucket: Bucket, rows: slice, *arguments: Any, **options: Any) -> Tensor:
        nonlocal slices
        slices = bucket.slices[rows]
        return direction(bucket, rows, *arguments, **options)

    def scaled(
        bucket: Bucket,
        update: Tensor,
        left: Tensor | None,
        frame: Tensor | None,
        multiply: Product,
    ) -> Tensor:
        if not bucket.framed:
            return turn_back(bucket, update, left, frame, multiply)
        identity = None if left is None else torch.eye(left.size(-1)).to(left).expand_as(left)
        dressed = turn_back(bucket, update, identity, frame, multiply)
        present = dressed.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        wanted = update.new_tensor([size_of(slice_) for slice_ in slices])
        scale = wanted.view(-1, 1, 1, 1, 1) / present.clamp_min(torch.finfo(update.dtype).tiny)
        return (dressed if left is None else left @ dressed).mul_(scale)

    with mock.patch.multiple(Bucket, _direction=remembered, _turn_back=scaled):
        yield


def constant_size(slice_: Slice, size: float) -> float:
    """The same root mean square for every matrix."""
    return size


def spectral_size(slice_: Slice, size: float) -> float:
    """Larger where a layer maps to more dimensions, ``size · √max(1, out/in)``, as in Muon.

    Outside the layers, where Muon is not used, `size` itself.
    """
    if layer_and_direction(slice_) == slice_.name:
        return size
    rows, columns = slice_.parameter.shape
    return size * max(1.0, rows / columns) ** 0.5
