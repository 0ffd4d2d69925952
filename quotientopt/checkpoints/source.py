"""Where a checkpoint's files are: a folder in Hugging Face's format, or a file with its config."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quotientopt.checkpoints.errors import CheckpointError
from quotientopt.checkpoints.packages import require_transformers
from quotientopt.checkpoints.weight_files import (
    GGUF_ADVICE,
    WeightFile,
    open_weights,
    require_file,
)

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
