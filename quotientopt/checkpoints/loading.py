"""A checkpoint's model, built by transformers from its configuration and its own weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quotientopt.checkpoints.errors import CheckpointError, first_line
from quotientopt.checkpoints.matching import same_name
from quotientopt.checkpoints.packages import require_transformers
from quotientopt.checkpoints.source import Checkpoint

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
    """

    model: nn.Module
    missing: tuple[str, ...]


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
    dtype = dtype or widest(
        entry.dtype for file in checkpoint.files for entry in file.entries().values()
    )
    if dtype is None:
        raise CheckpointError(f"{checkpoint.path} holds no floating-point tensors")
    if at_least_float32:
        dtype = torch.promote_types(dtype, torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    # Of other shapes the caller hears below, in one line.
    options["ignore_mismatched_sizes"] = True
    place = None
    if checkpoint.is_folder:
        place = checkpoint.path
        safetensors = checkpoint.files[0].path.suffix == ".safetensors"
        options |= {"local_files_only": True, "use_safetensors": safetensors}
    else:
        # Copies: the model's parameters must not be the mapped memory of the file.
        tensors = (pair for file in checkpoint.files for pair in file.tensors())
        options["state_dict"] = {name: tensor.clone() for name, tensor in tensors}
    try:
        config = model_class.config_class.from_dict(checkpoint.config)
        model, info = model_class.from_pretrained(place, config=config, **options)
    except Exception as error:  # what transformers raises depends on the architecture
        raise CheckpointError(f"cannot load {checkpoint.path}: {first_line(error)}") from error
    if info["mismatched_keys"]:
        name, *shapes = min(info["mismatched_keys"])
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
    return Loaded(model.eval().requires_grad_(False), missing)


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
    if names:
        found = getattr(transformers, str(names[0]), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        code = ", and code of the folder is not run" if "auto_map" in checkpoint.config else ""
        raise CheckpointError(
            f"unknown architecture {names[0]!r}: transformers {transformers.__version__} has no "
            f"such model{code}"
        )
    kind = checkpoint.config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"the configuration of {checkpoint.path} names no architecture and no known "
            f"model_type, got {kind!r}"
        )
    return transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
