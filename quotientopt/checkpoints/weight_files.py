"""Files of named tensors: read one tensor at a time, written with some of the values replaced.

Everything that is not replaced stays as it is: names, order, dtypes, metadata, tensors that share
memory.
"""

from __future__ import annotations

import json
import pickle
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quotientopt.checkpoints.errors import CheckpointError, first_line

PICKLED = (".bin", ".pt", ".pth")
GGUF_ADVICE = (
    "blocks of quantised values, on which no group can act: take the folder of the original model"
)


FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class Stored(NamedTuple):
    """How a tensor is stored; the dtype is None unless it is a plain floating-point one.

    `kind` is the dtype's name in the file.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    kind: str


class WeightFile(Protocol):
    """A file of named tensors."""

    path: Path

    def entries(self) -> dict[str, Stored]:
        """Names of the tensors, with dtype and shape."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one after the other."""

    def write(self, path: Path, values: Mapping[str, Tensor]) -> None:
        """Write the file anew at `path`, with these values in place of its own."""


class SafetensorsFile:
    """A file in the safetensors format."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self._entries = {
                    name: Stored(FLOATING.get(kind), tuple(part.get_shape()), kind)
                    for name, part in slices.items()
                    for kind in (part.get_dtype(),)
                }
        except Exception as error:  # safetensors' errors have no common base class
            raise CheckpointError(f"cannot read {path}: {first_line(error)}") from None

    def entries(self) -> dict[str, Stored]:
        """Names of the tensors, with dtype and shape."""
        return self._entries

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one after the other, mapped from the file."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in self._entries:
                yield name, file.get_tensor(name)

    def write(self, path: Path, values: Mapping[str, Tensor]) -> None:
        """Copy the file and overwrite the bytes of some tensors.

        The format is eight bytes with the length of the header, the header (JSON: name to dtype,
        shape and place), and the tensors' bytes, little-endian.
        """
        shutil.copyfile(self.path, path)
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, value in values.items():
                start, end = header[name]["data_offsets"]
                content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
                assert content.numel() == end - start
                file.seek(8 + length + start)
                file.write(content.numpy().data)


class PickledFile:
    """A state dict written by ``torch.save``; nothing but tensors is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = {
            name: Stored(
                t.dtype if t.dtype in FLOATING.values() else None, tuple(t.shape), str(t.dtype)
            )
            for name, t in self._read().items()
        }

    def entries(self) -> dict[str, Stored]:
        """Names of the tensors, with dtype and shape."""
        return self._entries

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one after the other."""
        yield from self._read().items()

    def write(self, path: Path, values: Mapping[str, Tensor]) -> None:
        """Save the state dict with some values overwritten."""
        # Overwritten in place, so that tensors that share memory go on sharing it.
        state = self._read()
        with torch.no_grad():
            for name, value in values.items():
                state[name].copy_(value)
        torch.save(state, path)

    def _read(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{self.path} holds pickled objects that are no tensors, which are not loaded: "
                "save model.state_dict() in the safetensors format"
            ) from None
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise CheckpointError(f"cannot read {self.path}: {first_line(error)}") from None
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{self.path} holds a {type(state).__name__}, no state dict: save "
                "model.state_dict()"
            )
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path} is no flat state dict: {name!r} is a {type(value).__name__}; "
                    "save model.state_dict()"
                )
            if value.device.type == "meta":
                raise CheckpointError(
                    f"{name!r} in {self.path} is on the meta device, it has no values"
                )
        return state


def require_file(path: Path) -> None:
    """Refuse what is no file before it is opened: reading a pipe would wait for ever.

    Raises
    ------
    CheckpointError
        If there is something else at `path`, or nothing.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            reason = "a link to nothing"
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no file"
        raise CheckpointError(f"cannot read {path}: it is {kind}")


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights by the ending of its name.

    Raises
    ------
    CheckpointError
        If the ending is not known, or the file cannot be read or holds anything but tensors.
    """
    require_file(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLED:
        return PickledFile(path)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is in GGUF format, {GGUF_ADVICE}")
    raise CheckpointError(f"{path} has no known ending; known: .safetensors, {', '.join(PICKLED)}")
