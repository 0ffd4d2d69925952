"""States of optimizers beside a checkpoint's weights: moved along with them, or left out.

Moments of Adam belong to the representative that was trained. Beside dressed weights they would be
read as if they were theirs, and training would go on from somewhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.checkpoints.errors import CheckpointError, first_line
from quotientopt.checkpoints.loading import Loaded
from quotientopt.checkpoints.source import Checkpoint
from quotientopt.checkpoints.weight_files import require_file
from quotientopt.optim import QuotientAdam, QuotientSGD
from quotientopt.optim.saved import NAMES, bare_names
from quotientopt.symmetries import SymmetryMap
from quotientopt.symmetries.map import TRANSLATION

# As transformers' Trainer, accelerate and DeepSpeed name them.
OPTIMIZER_STATE = re.compile(
    r"optimizer(_\d+)?\.(pt|bin|pth|safetensors)|optimizer_\d+|global_step\d+"
)
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
