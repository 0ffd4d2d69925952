"""A checkpoint's model, and which tensors in the files are which of its parameters.

In reading order: `load_checkpoint`, built by transformers from the configuration and the weights;
`places_of`, where each parameter lies in the files. Names do not always tell: transformers renames
weights while it loads them. Values do: a tensor is a parameter if it has its shape and, cast to its
dtype, its bits. Where several parameters have equal values (biases that are still zero), names
decide, or the names of their neighbours.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from quotientopt._system import progress
from quotientopt.checkpoints.files import (
    Checkpoint,
    CheckpointError,
    Stored,
    first_line,
    require_transformers,
)

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


Fingerprint = tuple[tuple[int, ...], bytes]


class Place(NamedTuple):
    """A tensor in the files."""

    file: int
    name: str
    stored: Stored


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Shape and a hash of the bits."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.blake2b(content.data, digest_size=16).digest()


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """Fingerprints of all parameters of a model, by first name."""
    return {name: fingerprint(parameter) for name, parameter in model.named_parameters()}


def places_of(
    checkpoint: Checkpoint,
    model: nn.Module,
    before: Mapping[str, Fingerprint],
    changed: Iterable[str],
) -> dict[str, list[Place]]:
    """Where the files hold the parameters that have changed.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : Module
        Its model.
    before : dict of str to Fingerprint
        Those of all parameters as they were loaded.
    changed : iterable of str
        First names of parameters.

    Returns
    -------
    dict of str to list of Place
        All copies of each, tied ones too.

    Raises
    ------
    CheckpointError
        If a parameter is in the files in another form.
    """
    changed = list(changed)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = defaultdict(list)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[first[id(parameter)]].append(name)
    owners: dict[Fingerprint, list[str]] = defaultdict(list)
    for name, mark in before.items():
        owners[mark].append(name)
    candidates = _candidates(checkpoint, {before[name]: dtypes[name] for name in changed})

    found: dict[str, list[Place]] = {}
    modules: dict[str, str] = {}
    for name in changed:
        places = candidates.get(before[name], [])
        if not places:
            raise CheckpointError(
                f"{name!r} is stored in {checkpoint.path} in another form than the model's: load "
                "the model with transformers, save_pretrained it, and take that folder; experts, "
                "which it splits again when it saves them, need quotientopt.dress_ on the model"
            )
        if len(owners[before[name]]) == 1:
            found[name] = places
            modules[_module(name)] = _module(places[0].name)
    for name in changed:
        if name in found:
            continue
        own = [
            p for p in candidates[before[name]] if any(same_name(p.name, n) for n in names[name])
        ]
        if not own and _module(name) in modules:
            neighbour = f"{modules[_module(name)]}.{name.rpartition('.')[2]}"
            own = [p for p in candidates[before[name]] if p.name == neighbour]
        if not own:
            raise CheckpointError(
                f"cannot tell which tensor of {checkpoint.path} is {name!r}: several have its "
                "values, none its name"
            )
        found[name] = own
    return found


def _candidates(
    checkpoint: Checkpoint, wanted: Mapping[Fingerprint, torch.dtype]
) -> dict[Fingerprint, list[Place]]:
    """Tensors in the files that have one of the fingerprints."""
    dtypes: dict[tuple[int, ...], set[torch.dtype]] = defaultdict(set)
    for (shape, _), dtype in wanted.items():
        dtypes[shape].add(dtype)
    found: dict[Fingerprint, list[Place]] = defaultdict(list)
    for number, file in enumerate(progress(checkpoint.files, "finding parameters in files")):
        entries = file.entries()
        for name, tensor in file.tensors():
            if entries[name].dtype is None:
                continue
            for dtype in dtypes.get(entries[name].shape, ()):
                mark = fingerprint(tensor.to(dtype))
                if wanted.get(mark) == dtype:
                    found[mark].append(Place(number, name, entries[name]))
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def same_name(one: str, other: str) -> bool:
    """Whether names are equal, but for a prefix that one of them may have."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
