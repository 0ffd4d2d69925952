"""Dress a checkpoint: files in, files out, the model's outputs unchanged.

In reading order: `dress_checkpoint`, with its `Report`; `SavedOptimizer`, states of optimizers
beside the weights, moved along with them or left out. Moments of Adam belong to the representative
that was trained: beside dressed weights they would be read as if they were theirs, and training
would go on from somewhere else.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.canonical import dress_
from quotientopt.canonical.dress import Dressing
from quotientopt.canonical.elements import SectionKind
from quotientopt.checkpoints.files import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    first_line,
    require_file,
)
from quotientopt.checkpoints.loading import Loaded, Place, fingerprints, load_checkpoint, places_of
from quotientopt.checkpoints.outputs import outputs_of, symmetries_of_checkpoint
from quotientopt.checkpoints.writing import OPTIMIZER_STATE, Destination, destination
from quotientopt.optim import QuotientAdam, QuotientSGD
from quotientopt.optim.bookkeeping.saved import NAMES, bare_names
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION
from quotientopt.symmetries.verification import largest_deviation

# Rounding errors of original and dressed weights differ, and the largest output is one number.
ROUNDINGS = 4


@dataclass(frozen=True, eq=False)
class Report:
    """What dressing a checkpoint did.

    Attributes
    ----------
    dressing : Dressing
    changed : tuple of str
        Tensors in the files that have new values.
    unrecognized : tuple of str
        Attention modules that were left as they are.
    missing : tuple of str
        Parameters that the files do not hold.
    deviation, allowed : float
        Largest change of an output on random inputs, relative to the largest output, and what was
        allowed: the root of the precision in which the weights are stored, or four times what
        rounding errors in the original weights do, where that is more.
    moved : tuple of str
        States of optimizers that were moved along.
    left_out : tuple of str
        States of optimizers that the copy lacks, and why they could not be moved.
    """

    dressing: Dressing
    changed: tuple[str, ...]
    unrecognized: tuple[str, ...]
    missing: tuple[str, ...]
    deviation: float
    allowed: float
    moved: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.dressing.section} section: {len(self.changed)} tensors have new values",
            f"outputs on random inputs differ by {self.deviation:.1e} of the largest, "
            f"{self.allowed:.1e} allowed",
        ]
        gaps = {name: gap.min().item() for name, gap in self.dressing.gaps.items()}
        if gaps:
            name = min(gaps, key=gaps.__getitem__)
            lines.append(f"smallest spectral gap {gaps[name]:.1e} ({name})")
        if self.unrecognized:
            lines.append(f"not understood, left as they are: {', '.join(self.unrecognized)}")
        if self.missing:
            lines.append(f"not in the files, nor in the copy: {', '.join(self.missing)}")
        lines += [f"moved along: {name}" for name in self.moved]
        lines += [f"left out: {name}" for name in self.left_out]
        return "\n".join(lines)


def dress_checkpoint(
    path: str | Path,
    out: str | Path,
    section: SectionKind = "svd",
    *,
    config: str | Path | None = None,
    residual: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write a copy of a checkpoint with dressed weights (:func:`quotientopt.dress_`).

    Only the values of dressed tensors change: names, dtypes, metadata, shards, tied copies and all
    other files stay. The copy gets its name when it is complete and has been loaded again, so that
    `out` is never half written. The state of an optimizer beside the weights belongs to them as
    they were: that of QuotientAdam or QuotientSGD moves along, others are left out.

    Parameters
    ----------
    path, config : path
        See :func:`find_checkpoint`.
    out : path
        Where the copy goes, a folder or a file as `path`.
    section, residual
        See :func:`quotientopt.dress_`.
    overwrite : bool
        Whether `out` may be a checkpoint already. Its weights and settings are replaced, other
        files stay.

    Returns
    -------
    Report

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, dressed or written, or if its outputs would change by more
        than rounding explains (:class:`Report`). Nothing is written then.

    Notes
    -----
    The model is loaded, dressed and run in float32 (float64 if stored so), and then rounded.
    """
    checkpoint, out = find_checkpoint(path, config), Path(out)
    try:
        with destination(checkpoint, out, overwrite=overwrite) as place:
            return _dressed_into(place, checkpoint, section, config=config, residual=residual)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}{where}") from error


def _dressed_into(
    destination: Destination,
    checkpoint: Checkpoint,
    section: SectionKind,
    *,
    config: str | Path | None,
    residual: bool,
) -> Report:
    loaded = load_checkpoint(checkpoint, at_least_float32=True)
    model = loaded.model
    before, outputs = fingerprints(model), outputs_of(model)
    try:
        symmetries = symmetries_of_checkpoint(model)
        originals = _copies(model, symmetries, residual=residual)
        optimizer = saved_optimizer(checkpoint, loaded, symmetries)
        chosen = _of_heads(symmetries) if optimizer.movable else symmetries
        dressing = dress_(model, section, symmetries=chosen, residual=residual)
    except ValueError as error:
        raise CheckpointError(_for_files(str(error))) from error
    changed = [name for name, mark in fingerprints(model).items() if mark != before[name]]
    absent = [name for name in changed if name in loaded.missing]
    if absent:
        raise CheckpointError(
            f"{absent[0]!r} is not in {checkpoint.path}, and belongs to a head pair or the "
            "residual stream: complete the checkpoint first"
        )
    places = places_of(checkpoint, model, before, changed)
    _refuse_mixed_dtypes(symmetries.heads, model, places)
    values = _stored_values(model, places)
    deviation = largest_deviation(outputs_of(model), outputs)
    precisions = {name: _precision(found) for name, found in places.items()}
    allowed = max(precisions.values(), default=0.0) ** 0.5
    if deviation > allowed:
        with _rounding_errors(model, {name: originals[name] for name in changed}, precisions):
            allowed = max(allowed, ROUNDINGS * largest_deviation(outputs_of(model), outputs))
    if deviation > allowed:
        raise CheckpointError(
            f"dressing would change the outputs of {checkpoint.path} by {deviation:.1e}, more "
            f"than {allowed:.1e}: convert it to a wider dtype first, or take another section"
        )
    optimizer.move_(dressing)
    copy = destination.write(values, without=optimizer.left_out, further=optimizer.files)
    copied = find_checkpoint(copy, config)
    _require_equal(load_checkpoint(copied, at_least_float32=True), loaded)
    destination.commit()
    names = tuple(place.name for found in places.values() for place in found)
    return Report(
        dressing,
        names,
        symmetries.unrecognized,
        loaded.missing,
        deviation,
        allowed,
        moved=tuple(optimizer.files),
        left_out=tuple(f"{name}, {reason}" for name, reason in optimizer.left_out.items()),
    )


def _for_files(message: str) -> str:
    """The advice of a refusal in Python, as it is meant for a folder."""
    message = re.sub(r",? or leave the symmetry out with symmetries=", "", message)
    return message.replace(
        "fold_norms_(model, untie=True) makes it exact",
        "load it in Python, fold_norms_(model, untie=True), save_pretrained, and take that folder",
    ).replace("residual=True", "--residual")


def _of_heads(symmetries: SymmetryMap) -> SymmetryMap:
    """Those along which the state of an optimizer moves: linear, of heads and of the stream."""
    heads = [HeadSymmetry(s.left_blocks, s.right_blocks, s.group, s.name) for s in symmetries.heads]
    return SymmetryMap(heads, symmetries.residual, residual_reason=symmetries.residual_reason)


def _copies(model: nn.Module, symmetries: SymmetryMap, *, residual: bool) -> dict[str, Tensor]:
    """Copies of all parameters that dressing may change, by first name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = [name for name in symmetries.names if residual or name != RESIDUAL]
    moved = [p for name in wanted for p in symmetries.parameters_of(name)]
    if residual and symmetries.residual is not None:
        moved += symmetries.residual.parameters.values()
    return {names[id(parameter)]: parameter.detach().clone() for parameter in moved}


def _precision(places: Sequence[Place]) -> float:
    return max(torch.finfo(place.stored.dtype).eps for place in places if place.stored.dtype)


@contextmanager
def _rounding_errors(
    model: nn.Module, originals: Mapping[str, Tensor], precisions: Mapping[str, float]
) -> Iterator[None]:
    """Within it, the model has its original weights, each with a random rounding error."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    dressed = {name: parameters[name].detach().clone() for name in originals}
    try:
        with torch.no_grad():
            for name, original in originals.items():
                noise = torch.rand(original.shape, generator=generator, dtype=original.dtype) - 0.5
                parameters[name].copy_(original * (1 + precisions[name] * noise))
        yield
    finally:
        with torch.no_grad():
            for name, value in dressed.items():
                parameters[name].copy_(value)


@torch.no_grad()
def _stored_values(
    model: nn.Module, places: Mapping[str, Sequence[Place]]
) -> dict[int, dict[str, Tensor]]:
    """New values by file, as they are stored; the model's parameters are rounded alike."""
    parameters = dict(model.named_parameters())
    values: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, found in places.items():
        for place in found:
            rounded = parameters[name].to(place.stored.dtype)
            if not bool(rounded.isfinite().all()):
                raise CheckpointError(
                    f"the dressed {name!r} does not fit {place.stored.dtype}: convert the "
                    "checkpoint to a wider dtype first, or take the 'balanced' section"
                )
            parameters[name].copy_(rounded)
            values[place.file][place.name] = rounded
    return values


def _refuse_mixed_dtypes(
    symmetries: Sequence[HeadSymmetry], model: nn.Module, places: Mapping[str, Sequence[Place]]
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for symmetry in symmetries:
        dtypes = {
            place.stored.dtype: place.name
            for block in symmetry.blocks
            for place in places.get(names[id(block.parameter)], ())
        }
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise CheckpointError(
                f"symmetry {symmetry.name!r}: {first!r} is stored in {one} and {second!r} in "
                f"{other}; convert the checkpoint to one dtype first"
            )


def _require_equal(again: Loaded, loaded: Loaded) -> None:
    """Refuse a copy whose parameters are not, bit for bit, those of the dressed model."""
    expected, found = fingerprints(loaded.model), fingerprints(again.model)
    for name in expected.keys() - set(loaded.missing):
        if expected[name] != found[name]:
            raise CheckpointError(f"{name!r} does not come back from the files as it was written")


# An option that only this optimizer has.
KINDS = {"head_frame": QuotientAdam, "metric": QuotientSGD}


class SavedOptimizer:
    """States of optimizers in a checkpoint's folder, read before the weights change.

    Attributes
    ----------
    files : dict of str to callable
        Name of a state that can be moved to what writes it at a path.
    left_out : dict of str to str
        Name of a state that cannot be moved to the reason.
    """

    def __init__(self) -> None:
        self.files: dict[str, Callable[[Path], None]] = {}
        self.left_out: dict[str, str] = {}
        self._read: dict[str, tuple[dict[str, Any], QuotientAdam | QuotientSGD]] = {}

    def read(self, path: Path, loaded: Loaded, symmetries: SymmetryMap) -> None:
        """Take up a state, or note why it cannot be moved."""
        try:
            self._read[path.name] = _optimizer_of(path, loaded, symmetries)
        except CheckpointError as error:
            self.left_out[path.name] = str(error)

    @property
    def movable(self) -> bool:
        """Whether a state was read that an element of the heads' groups can move."""
        return bool(self._read)

    def move_(self, element: Mapping[str, Tensor]) -> None:
        """Move the states by the element that has dressed the weights."""
        # Gradients along translations vanish, and so do their moments.
        element = {name: g for name, g in element.items() if not name.endswith(TRANSLATION)}
        for name, (saved, optimizer) in self._read.items():
            try:
                optimizer.move_state_(element)
            except ValueError as error:
                self.left_out[name] = first_line(error)
            else:
                self.files[name] = partial(torch.save, saved | optimizer.state_dict())


def saved_optimizer(
    checkpoint: Checkpoint, loaded: Loaded, symmetries: SymmetryMap
) -> SavedOptimizer:
    """The states of optimizers in the folder of a checkpoint, as Trainer and accelerate name them.

    Parameters
    ----------
    checkpoint : Checkpoint
    loaded : Loaded
        Its model, undressed.
    symmetries : SymmetryMap
        Of that model.
    """
    found = SavedOptimizer()
    if checkpoint.is_folder:
        for name in sorted(os.listdir(checkpoint.path)):
            if OPTIMIZER_STATE.fullmatch(name):
                found.read(checkpoint.path / name, loaded, symmetries)
    return found


def _optimizer_of(
    path: Path, loaded: Loaded, symmetries: SymmetryMap
) -> tuple[dict[str, Any], QuotientAdam | QuotientSGD]:
    require_file(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups = saved["param_groups"]
        kind = next((kind for key, kind in KINDS.items() if key in groups[0]), None)
    except Exception as error:  # what a foreign file raises depends on what it holds
        raise CheckpointError(f"which cannot be read as a state: {first_line(error)}") from None
    if kind is None:
        raise CheckpointError(
            "the state of an optimizer that depends on the gauge: a new one starts without it"
        )
    if loaded.missing or loaded.dtype_changed:
        raise CheckpointError("whose weights are not in the files as they are trained")
    members = _members(groups, loaded.model)
    for _, parameter in (pair for own in members for pair in own):
        parameter.requires_grad_()  # as they were trained: plans leave out what is frozen
    try:
        groups = [{"params": own} for own in members]
        optimizer = kind(groups, lr=1e-3, symmetries=symmetries)  # the state brings its options
        optimizer.load_state_dict(saved)
    except Exception as error:  # a damaged state may fail anywhere
        raise CheckpointError(f"which does not fit the model: {first_line(error)}") from None
    return saved, optimizer


def _members(groups: Any, model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of every group: by name, or all of the model in their order."""
    parameters = dict(model.named_parameters())
    names = [group.get(NAMES) for group in groups]
    if len(names) == 1 and names[0] is None and len(groups[0]["params"]) == len(parameters):
        names = [list(parameters)]  # of version 0.1.0
    if any(own is None for own in names):
        raise CheckpointError("whose parameters have no names and are in several groups")
    if any(name not in parameters for own in names for name in own):
        # Of a wrapped model, perhaps.
        full = dict(zip(bare_names([list(parameters)])[0], parameters, strict=True))
        names = [[full.get(n, n) for n in own] for own in bare_names(names)]
    unknown = [name for own in names for name in own if name not in parameters]
    if unknown:
        raise CheckpointError(f"which has a parameter {unknown[0]!r} that the model lacks")
    return [[(name, parameters[name]) for name in own] for own in names]
