"""Which tensors in the files are which parameters of the model.

Names do not always tell: transformers renames weights while it loads them. Values do: a tensor is a
parameter if it has its shape and, cast to its dtype, its bits. Where several parameters have equal
values (biases that are still zero), names decide, or the names of their neighbours.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quotientopt._progress import progress
from quotientopt.checkpoints.errors import CheckpointError
from quotientopt.checkpoints.source import Checkpoint
from quotientopt.checkpoints.weight_files import Stored

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
                "the model with transformers, save_pretrained it, and take that folder"
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
