"""A checkpoint's model, built by transformers from its configuration and its own weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from quotientopt.checkpoints.errors import CheckpointError, first_line
from quotientopt.checkpoints.matching import same_name
from quotientopt.checkpoints.packages import require_transformers
from quotientopt.checkpoints.source import Checkpoint

# Keys of configurations, without their underscores, that choose kernels.
IMPLEMENTATIONS = {
    "attn_implementation",
    "attn_implementation_internal",
    "experts_implementation",
    "experts_implementation_internal",
}
LAYERS = re.compile(r"layers?$|depths?$|blocks$|experts$|groups$|stages$|copies$")
MOST_LAYERS = 1000
SMALL_MODEL = 200_000_000
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model and how it was loaded.

    Attributes
    ----------
    model : Module
        In evaluation mode, on the CPU, its parameters frozen: gains that are one are no obstacle
        to a rotation of the residual stream then.
    missing : tuple of str
        Parameters that the files do not hold, so that they are random.
    dtype_changed : bool
        Whether the files hold another dtype than the model has.
    """

    model: nn.Module
    missing: tuple[str, ...]
    dtype_changed: bool = False


def load_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, at_least_float32: bool = False
) -> Loaded:
    """Build the model of a checkpoint.

    The class is the one that the configuration names under ``architectures``; without a name there,
    transformers' base model of its ``model_type``. Nothing is downloaded, and no code in the folder
    is run.

    Parameters
    ----------
    checkpoint : Checkpoint
    dtype : dtype, optional
        Of the parameters; by default the widest in which the files hold weights.
    at_least_float32 : bool
        Whether weights stored in narrower dtypes become float32.

    Raises
    ------
    CheckpointError
        If transformers is missing, does not know the architecture, or cannot load the weights.
    """
    transformers = require_transformers()
    model_class = _class_of(checkpoint, transformers)
    entries = [entry for file in checkpoint.files for entry in file.entries().values()]
    dtype = dtype or widest(entry.dtype for entry in entries)
    if dtype is None:
        raise CheckpointError(f"{checkpoint.path} holds no floating-point tensors")
    if at_least_float32:
        dtype = torch.promote_types(dtype, torch.float32)
    _refuse_many_layers(checkpoint.config, len(entries))
    # transformers gets tensors and settings, never a folder: it opens further files where it finds
    # them (adapters, pickled metadata), and asks the hub for what they name.
    tensors = {name: tensor for file in checkpoint.files for name, tensor in file.tensors()}
    stored = sum(math.prod(entry.shape) for entry in entries)
    try:
        with offline(), _bounded(stored):
            config = model_class.config_class.from_dict(without_implementations(checkpoint.config))
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # of these the caller hears below, in one line
            )
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {checkpoint.path}: {error}") from None
    except (Exception, SystemExit) as error:  # what is raised depends on the architecture
        raise CheckpointError(f"cannot load {checkpoint.path}: {first_line(error)}") from error
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # it may be the mapped memory of a file
    if info["mismatched_keys"]:
        name, *shapes = min(info["mismatched_keys"])
        if tuple(shapes[0]) == (1, *shapes[1]):
            raise CheckpointError(
                f"{checkpoint.path} was saved by a folded model whose residual stream has left "
                f"mean zero ({name!r} has an axis more): {model_class.__name__} computes "
                "something else"
            )
        raise CheckpointError(
            f"{name!r} in {checkpoint.path} does not have the shape its configuration asks for: "
            + " and ".join(str(tuple(shape)) for shape in shapes)
        )
    _refuse_quantised(checkpoint, model)
    missing = tuple(sorted(info["missing_keys"]))
    if len(missing) >= len(dict(model.named_parameters())):
        raise CheckpointError(
            f"no tensor in {checkpoint.path} is a weight of {model_class.__name__}; is that the "
            "right configuration?"
        )
    changed = any(entry.dtype not in (None, dtype) for entry in entries)
    return Loaded(model.eval().requires_grad_(False), missing, changed)


def _refuse_quantised(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse weights that are no floating-point numbers, which transformers would cast."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for file in checkpoint.files:
        for name, entry in file.entries().items():
            if entry.dtype is None and any(same_name(name, own) for own in names):
                raise CheckpointError(
                    f"{name!r} in {file.path} is stored as {entry.kind}, quantised: no group can "
                    "act on it; dequantise the model, or take the original one"
                )


def widest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The narrowest of the plain floating-point dtypes that holds all of them; None for none."""
    found = {dtype for dtype in dtypes if dtype in DTYPES}
    if {torch.bfloat16, torch.float16} <= found:
        found.add(torch.float32)
    return next((dtype for dtype in DTYPES if dtype in found), None)


def _class_of(checkpoint: Checkpoint, transformers: Any) -> Any:
    """The class of transformers that a configuration names."""
    names = checkpoint.config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"the configuration of {checkpoint.path} should have a list of names as architectures, "
            f"it has {names!r:.60}"
        )
    if names:
        try:
            found = getattr(transformers, names[0], None)
        except Exception as error:  # a class that needs a package, or a name that is none
            raise CheckpointError(
                f"architecture {names[0]!r} is not available: {first_line(error)}"
            ) from error
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        code = ", and code of the folder is not run" if "auto_map" in checkpoint.config else ""
        raise CheckpointError(
            f"unknown architecture {names[0]!r}: transformers {transformers.__version__} has no "
            f"such model{code}"
        )
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"the configuration of {checkpoint.path} names no architecture and no known "
            f"model_type, got {kind!r:.60}"
        )
    try:
        return transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
    except KeyError:
        raise CheckpointError(f"transformers has no base model of model_type {kind!r}") from None


def without_implementations(config: Any) -> Any:
    """A configuration without its choice of kernels, whose names may be looked up on the hub."""
    if isinstance(config, dict):
        return {
            key: without_implementations(value)
            for key, value in config.items()
            if key.strip("_") not in IMPLEMENTATIONS
        }
    if isinstance(config, list):
        return [without_implementations(value) for value in config]
    return config


@contextmanager
def offline() -> Iterator[None]:
    """Within it, the hub's client refuses every request, whatever a configuration names."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _refuse_many_layers(config: Any, tensors: int) -> None:
    """Refuse more layers than the tensors in the files could be, before one is built."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_many_layers(value, tensors)
            continue
        numbers = value if isinstance(value, list) else [value]
        numbers = [count for count in numbers if isinstance(count, (int, float))]
        if LAYERS.search(key) and sum(numbers) > MOST_LAYERS + tensors:
            raise CheckpointError(
                f"the configuration asks for {key} = {sum(numbers):.6g}, the files hold {tensors} "
                "tensors"
            )


@contextmanager
def _bounded(stored: int) -> Iterator[None]:
    """Within it, modules much larger than what the files hold are refused while they are built.

    Parameters
    ----------
    stored : int
        Numbers in the files. A model may have what they lack, a head for example.
    """
    most = SMALL_MODEL + 4 * stored
    counts = {"parameters": 0, "buffers": 0}

    def count(kind: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            counts[kind] += tensor.numel() + 1
            if counts[kind] > most:
                raise CheckpointError(
                    f"the configuration asks for more than {most:.0e} numbers in {kind}, the "
                    f"files hold {stored}"
                )

    hooks = [
        register_module_parameter_registration_hook(lambda _, __, p: count("parameters", p)),
        register_module_buffer_registration_hook(lambda _, __, b: count("buffers", b)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
