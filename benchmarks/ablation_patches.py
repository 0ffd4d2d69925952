"""Variants of QuotientAdam that are no options of it: patches, undone when their context ends.

They reach into the optimizer's private parts and assume what the reference trainings give: every
parameter has a gradient at every step, and one optimizer trains at a time. The last variant is no
patch: frames for the hidden axes of MLPs, as symmetries that the model does not have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from quotientopt.groups import GL, O
from quotientopt.manifolds import FactorQuotient
from quotientopt.optim import buckets as bucket_module
from quotientopt.optim import engine as engine_module
from quotientopt.optim import polar as polar_module
from quotientopt.optim.buckets import Bucket
from quotientopt.optim.engine import Engine
from quotientopt.optim.polar import polar_factor, row_polar_factor
from quotientopt.optim.slices import SIDES, Slice
from quotientopt.optim.update import Product
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap, find_symmetries

Patch = Generator[None, None, None]
WRITING = ("output", "down")


@contextmanager
def pooled_residual_frames(class_of: Callable[[Slice], Hashable]) -> Patch:
    """One residual frame for all slices of a class: their covariances are summed for it."""
    refresh, weights_grams = Engine._refresh, Engine._weights_grams

    def pooled(buckets: Sequence[Bucket], stacks: Sequence[Tensor]) -> list[Tensor]:
        totals: dict[Hashable, Tensor] = {}
        classes = [[class_of(slice_) for slice_ in bucket.slices] for bucket in buckets]
        for own, stack in zip(classes, stacks, strict=True):
            for name, matrix in zip(own, stack, strict=True):
                totals[name] = totals[name] + matrix if name in totals else matrix
        return [torch.stack([totals[name] for name in own]) for own in classes]

    def pooled_refresh(engine: Engine, *arguments: Any) -> list[Tensor]:
        buckets = [bucket for bucket in engine.buckets if bucket.residual]
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
        buckets = [bucket for bucket in engine.buckets if id(bucket) in grams]
        sums = pooled(buckets, [grams[id(bucket)] for bucket in buckets])
        return {id(b): gram for b, gram in zip(buckets, sums, strict=True)}, streams

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
    """Covariances take every `every`-th gradient and decay by `beta` each time."""
    with mock.patch.multiple(engine_module, COVARIANCE_EVERY=every, COVARIANCE_BETA=beta):
        yield


@contextmanager
def reused_evening(every: int) -> Patch:
    """Evening factors are made at every `every`-th step and with fresh frames, else reused.

    A factor is kept in the coordinates of its update's frame, scaled to keep the norm of the update
    that it was made from.
    """
    factors: dict[int, Tensor] = {}
    steps = place = 0
    fresh = True
    step = Engine.step

    def counted_step(engine: Engine, *arguments: Any) -> None:
        nonlocal steps, place, fresh
        dressings = arguments[2]
        steps, place = steps + 1, 0
        fresh = dressings is not None or steps % every == 0
        step(engine, *arguments)

    def kept(make: Callable[[], Tensor]) -> Tensor:
        nonlocal place
        if fresh:
            factors[place] = make()
        place += 1
        return factors[place - 1]

    def orthogonalise(matrix: Tensor, right: Tensor | None, multiply: Product) -> Tensor:
        tall = matrix.size(1) >= matrix.size(2)

        def make() -> Tensor:
            factor, size = polar_factor(matrix if tall else matrix.mT)
            orthogonal = matrix @ factor if tall else factor @ matrix
            tiny = torch.finfo(orthogonal.dtype).tiny
            return factor * (
                size / torch.linalg.matrix_norm(orthogonal, keepdim=True).clamp_min(tiny)
            )

        factor = kept(make)
        orthogonal = matrix @ factor if tall else factor @ matrix
        return orthogonal if right is None else orthogonal @ right

    def row_factor(matrix: Tensor) -> Tensor:
        return kept(lambda: row_polar_factor(matrix))

    with (
        mock.patch.object(Engine, "step", counted_step),
        mock.patch.multiple(
            bucket_module, orthogonalise=orthogonalise, row_polar_factor=row_factor
        ),
    ):
        yield


@contextmanager
def whole_matrix_evening() -> Patch:
    """Even out the singular values of attention's matrices as a whole, not head by head."""
    turn_back = Bucket._turn_back

    def whole(
        bucket: Bucket,
        update: Tensor,
        left: Tensor | None,
        frame: Tensor | None,
        multiply: Product,
    ) -> Tensor:
        orthogonal = turn_back(bucket, update, None, frame, multiply)
        return orthogonal if left is None else left @ orthogonal

    with mock.patch.object(Bucket, "_turn_back", whole):
        yield


@contextmanager
def evening_polynomial(*coefficients: float) -> Patch:
    """Even out singular values by another odd polynomial, of degree 9 at most."""
    padded = (*coefficients, 0.0, 0.0, 0.0, 0.0)[: len(polar_module.COEFFICIENTS)]
    with mock.patch.object(polar_module, "COEFFICIENTS", padded):
        yield


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
                    factors[slice_.symmetry, slice_.side] += own.unbind()
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
        wanted = torch.tensor([size_of(slice_) for slice_ in slices]).to(update)
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


def with_hidden_blocks(model: Any, rows: int) -> SymmetryMap:
    """The model's symmetries, and blocks of hidden rows of every MLP as heads under O(rows).

    The activation leaves only permutations of the hidden rows, so these are frames for Adam and
    nothing else: rotations of a block change what the model computes.

    Parameters
    ----------
    model : Module
        A reference model, whose MLPs have ``up``, perhaps ``gate``, and ``down``.
    rows : int
        Of a block; divides the hidden width.

    Raises
    ------
    ValueError
        If it does not.
    """
    found = find_symmetries(model)
    hidden = []
    for index, layer in enumerate(model.blocks):
        prefix = f"blocks.{index}.mlp"
        readers = [name for name in ("gate", "up") if hasattr(layer.mlp, name)]
        width = layer.mlp.down.weight.size(1)
        if width % rows:
            raise ValueError(f"{prefix} has {width} hidden rows, no multiple of {rows}")
        left = []
        for name in readers:
            weight = getattr(layer.mlp, name).weight
            view = weight.detach().unflatten(0, (-1, rows))
            left.append(Block.of(view, weight, f"{prefix}.{name}.weight"))
        weight = layer.mlp.down.weight
        view = weight.detach().unflatten(1, (-1, rows)).permute(1, 2, 0)
        right = Block.of(view, weight, f"{prefix}.down.weight")
        hidden.append(HeadSymmetry(left, [right], O(rows), f"{prefix}.hidden"))
    return SymmetryMap(
        [*found.heads, *hidden],
        found.residual,
        residual_reason=found.residual_reason,
        unrecognized=found.unrecognized,
    )
