"""Where a checkpoint's files are: a folder in Hugging Face's format, or a file with its config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quotientopt.checkpoints.errors import CheckpointError
from quotientopt.checkpoints.packages import require_transformers
from quotientopt.checkpoints.weight_files import GGUF_ADVICE, WeightFile, open_weights

CONFIG = "config.json"
# In the order in which transformers looks for them.
SINGLE = ("model.safetensors", "pytorch_model.bin")


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
    if not path.exists():
        raise CheckpointError(f"no such file or folder: {path}")
    if path.is_dir():
        return Checkpoint(path, _read_config(_config_of(path, config)), _weights_of(path))
    if config is None:
        raise CheckpointError(f"{path} is a file: name its configuration with --config config.json")
    weights = open_weights(path)
    return Checkpoint(path, _read_config(Path(config)), (weights,))


def _config_of(folder: Path, config: str | Path | None) -> Path:
    if config is not None:
        return Path(config)
    if not (folder / CONFIG).exists():
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} holds a PEFT adapter without its model: merge it with "
                "merge_and_unload(), save_pretrained the result, and take that folder"
            )
        if any(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder} holds weights in GGUF format, {GGUF_ADVICE}")
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold an object, it holds a {type(content).__name__}")
    return content


def _weights_of(folder: Path) -> tuple[WeightFile, ...]:
    for name in SINGLE:
        if (folder / name).exists():
            return (open_weights(folder / name),)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{index} has no weight_map")
            for shard in sorted(set(shards.values())):
                if not (folder / shard).is_file():
                    raise CheckpointError(f"{index.name} names {shard}, which is not in {folder}")
            return tuple(open_weights(folder / shard) for shard in sorted(set(shards.values())))
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} holds weights in GGUF format, {GGUF_ADVICE}")
    names = ", ".join(f"{name} or {name}.index.json" for name in SINGLE)
    raise CheckpointError(f"no weights in {folder}: looked for {names}")
