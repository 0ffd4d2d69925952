"""Checkpoints written whole or not at all: under another name first, renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from quotientopt.checkpoints.errors import CheckpointError
from quotientopt.checkpoints.source import Checkpoint

LEFT_OUT = {".git"}


def refuse_target(checkpoint: Checkpoint, target: Path, *, overwrite: bool) -> None:
    """Refuse to write where something would be lost.

    Raises
    ------
    CheckpointError
        If `target` is the checkpoint, lies in it or holds it, or is there already and not empty
        and not to be overwritten; or if it has another ending than a single file of weights.
    """
    source, resolved = checkpoint.path.resolve(), target.resolve()
    if source == resolved:
        raise CheckpointError(f"{target} is the checkpoint itself: choose another --out")
    if source in resolved.parents or resolved in source.parents:
        raise CheckpointError(f"{target} and {checkpoint.path} lie in one another")
    if not checkpoint.is_folder and target.suffix != checkpoint.path.suffix:
        raise CheckpointError(
            f"{target} should end in {checkpoint.path.suffix!r}: the format stays as it is"
        )
    if not target.exists():
        return
    if target.is_dir() != checkpoint.is_folder:
        kind = "file" if checkpoint.is_folder else "folder"
        raise CheckpointError(f"{target} is a {kind}: choose another --out")
    if not overwrite and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already: choose another --out, or --overwrite")


@contextmanager
def written(
    checkpoint: Checkpoint, values: Mapping[int, Mapping[str, Tensor]], target: Path
) -> Iterator[Path]:
    """Write a copy of the checkpoint with other values; it gets its name when the block succeeds.

    Until then it lies beside `target`, and is removed after any error. Of a folder everything is
    copied but ``.git``; links are followed.

    Parameters
    ----------
    checkpoint : Checkpoint
    values : dict of int to dict of str to Tensor
        By number of the file, name to new value.
    target : Path

    Yields
    ------
    Path
        Where the copy lies for the time being.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if checkpoint.is_folder:
            _copy_folder(checkpoint, values, temporary)
        else:
            checkpoint.files[0].write(temporary, values.get(0, {}))
        yield temporary
        _rename(temporary, target)
    finally:
        _remove(temporary)


def _copy_folder(
    checkpoint: Checkpoint, values: Mapping[int, Mapping[str, Tensor]], target: Path
) -> None:
    target.mkdir()
    files = {file.path: (file, values.get(i, {})) for i, file in enumerate(checkpoint.files)}
    for path in sorted(checkpoint.path.rglob("*")):
        place = path.relative_to(checkpoint.path)
        if place.parts[0] in LEFT_OUT:
            continue
        if path in files:
            file, own = files[path]
            file.write(target / place, own)
        elif path.is_dir() and path.is_symlink():
            shutil.copytree(path, target / place)
        elif path.is_dir():
            (target / place).mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, target / place)


def _rename(temporary: Path, target: Path) -> None:
    """Put a finished copy in place; what was there is removed when the copy has its name."""
    if not target.is_dir():
        os.replace(temporary, target)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.before")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
