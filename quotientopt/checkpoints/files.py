"""What a checkpoint is on disk: files of named tensors, and the folder they lie in.

In reading order: `CheckpointError`, what can be wrong; `WeightFile`, read one tensor at a time and
written with some of the values replaced, all else as it is: names, order, dtypes, metadata, tensors
that share memory; `Checkpoint` and `find_checkpoint`, a folder in Hugging Face's format, or a file
with its configuration.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quotientopt._system import install_command


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, dressed or written; its message is one line."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error that another package has raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_transformers() -> Any:
    """The package transformers, which brings safetensors along.

    Raises
    ------
    CheckpointError
        Naming the command that installs it.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"transformers is not installed: {install_command('transformers')}"
        ) from None
    return transformers


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


CONFIG = "config.json"
ADAPTER = "adapter_config.json"
# In the order in which transformers looks for them.
SINGLE = ("model.safetensors", "pytorch_model.bin")
OTHER_FOLDERS = {
    "model_index.json": "a pipeline of diffusers, take the folder of one of its models",
    "params.json": "in Meta's or Mistral's own format, convert it to Hugging Face's",
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
MOST_JSON = 256 << 20
MOST_DEPTH = 64


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint on disk.

    Attributes
    ----------
    path : Path
        The folder, or the file of weights.
    config : dict
        What its config.json says.
    files : tuple of WeightFile
        All files of weights, one or several shards.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[WeightFile, ...]

    @property
    def is_folder(self) -> bool:
        """Whether the checkpoint is a folder."""
        return self.path.is_dir()


def find_checkpoint(path: str | Path, config: str | Path | None = None) -> Checkpoint:
    """Find the files of a checkpoint, and open its weights.

    Parameters
    ----------
    path : path
        A folder with config.json and weights as safetensors or as pickled tensors, in one file or
        in shards with an index; or one file of weights.
    config : path, optional
        The config.json of a single file; for a folder, in place of its own.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If something is missing (transformers too), damaged, quantised or not understood.
    """
    require_transformers()
    path = Path(path)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(_missing(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    if stat.S_ISDIR(kind):
        checkpoint = Checkpoint(path, _read_config(_config_of(path, config)), _weights_of(path))
        _refuse_special_files(path)
        return checkpoint
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path} is neither a file nor a folder")
    if config is None:
        raise CheckpointError(f"{path} is a file: name its configuration with --config config.json")
    weights = open_weights(path)
    return Checkpoint(path, _read_config(Path(config)), (weights,))


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a link to nothing"
    line = f"no such file or folder: {path}"
    if HUB_NAME.fullmatch(str(path)) and not path.parent.joinpath(CONFIG).exists():
        line += ", and names on the hub are not fetched: download the model first"
    return line


def _config_of(folder: Path, config: str | Path | None) -> Path:
    has_config = os.path.lexists(folder / CONFIG)
    if os.path.lexists(folder / ADAPTER):
        beside = "beside a model" if has_config else "without its model"
        raise CheckpointError(
            f"{folder} holds a PEFT adapter {beside}: merge it with merge_and_unload(), "
            "save_pretrained the result, and take that folder"
        )
    if config is not None:
        return Path(config)
    if not has_config:
        if any(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder} holds weights in GGUF format, {GGUF_ADVICE}")
        for name, kind in OTHER_FOLDERS.items():
            if (folder / name).exists():
                raise CheckpointError(f"{folder} has no {CONFIG}: it is {kind}")
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        if inside:
            raise CheckpointError(
                f"{folder} has no {CONFIG}, but {', '.join(inside[:3])} in it has: take that folder"
            )
    return folder / CONFIG


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{path.parent} holds quantised weights ({method or 'quantization_config'}), on which "
            "no group can act: dequantise the model, or take the original one"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        require_file(path)
        if path.stat().st_size > MOST_JSON:
            raise CheckpointError(f"{path} is larger than {MOST_JSON >> 20} MiB, too large to read")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold an object, it holds a {type(content).__name__}")
    if _depth(content) > MOST_DEPTH:
        raise CheckpointError(f"{path} is nested too deeply")
    return content


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
    return depth


def _refuse_special_files(folder: Path) -> None:
    """Refuse settings that reading would hang on: transformers opens what has these names."""
    for path in folder.iterdir():
        if path.suffix == ".json" and path.exists():
            require_file(path)


def _weights_of(folder: Path) -> tuple[WeightFile, ...]:
    for name in SINGLE:
        if os.path.lexists(folder / name):
            return (open_weights(folder / name),)
        index = folder / f"{name}.index.json"
        if os.path.lexists(index):
            return tuple(open_weights(folder / shard) for shard in _shards(folder, index))
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} holds weights in GGUF format, {GGUF_ADVICE}")
    names = ", ".join(f"{name} or {name}.index.json" for name in SINGLE)
    raise CheckpointError(f"no weights in {folder}: looked for {names}")


def _shards(folder: Path, index: Path) -> list[str]:
    """Names of the files that an index lists, all of them in its own folder."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index} names a {type(shard).__name__} where the name of a file should be"
            )
        if shard in ("", ".", "..") or not {"/", "\\", "\0"}.isdisjoint(shard):
            raise CheckpointError(
                f"{index} names {_short(shard)!r}, which is no file of its own folder"
            )
    names = sorted(set(shards.values()))
    for shard in names:
        try:
            there = (folder / shard).is_file()
        except OSError:  # a name that is too long
            there = False
        if not there:
            raise CheckpointError(f"{index.name} names {_short(shard)}, which is not in {folder}")
    return names


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:60]}… ({len(name)} characters)"
