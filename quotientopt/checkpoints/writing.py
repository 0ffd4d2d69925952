"""Checkpoints written whole or not at all; of what is there only a checkpoint's are replaced.

A copy is made in a hidden folder beside its target, ``.NAME.quotientopt``, and renamed when it is
complete. The folder is locked while a run is at work and removed at its end; what a kill has left
in it is cleared, or put back, by the next run that writes to the same parent.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from quotientopt._system import LockedError, locked, progress
from quotientopt.checkpoints.files import ADAPTER, CONFIG, Checkpoint, CheckpointError, open_weights

LEFT_OUT = {".git"}
WORK = ".quotientopt"
LOCK, NEW, OLD = "lock", "new", "old"

# What save_pretrained writes, and what loads in place of other weights if it stays there.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
SETTINGS = {
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
}
# As transformers' Trainer, accelerate and DeepSpeed name states of optimizers.
OPTIMIZER_STATE = re.compile(
    r"optimizer(_\d+)?\.(pt|bin|pth|safetensors)|optimizer_\d+|global_step\d+"
)


class Source(NamedTuple):
    """A file or an empty folder to be copied."""

    place: Path
    path: Path


class Destination:
    """Where a copy of a checkpoint goes; made by :func:`destination`.

    Attributes
    ----------
    target : Path
        Without links.
    """

    def __init__(
        self, checkpoint: Checkpoint, target: Path, work: Path, *, overwrite: bool
    ) -> None:
        self.target = target
        self._checkpoint, self._overwrite = checkpoint, overwrite
        self._new = work / (NEW if checkpoint.is_folder else NEW + target.suffix)
        self._old = work / OLD
        self._sources = _sources_of(checkpoint.path) if checkpoint.is_folder else []

    def refuse_loss(self) -> None:
        """Refuse to write where something would be lost.

        Raises
        ------
        CheckpointError
            If the target is there and of another kind, or not empty and not to be overwritten, or
            no checkpoint, or holds other files where the copy's would go.
        """
        target = self.target
        if not os.path.lexists(target):
            return
        if not (target.is_dir() if self._checkpoint.is_folder else target.is_file()):
            kind = "file" if target.is_file() else "folder" if target.is_dir() else "special file"
            raise CheckpointError(f"{target} is a {kind}: choose another --out")
        if target.is_dir() and not any(target.iterdir()):
            return
        if not self._overwrite:
            raise CheckpointError(
                f"{target} is there already: choose another --out, or --overwrite"
            )
        if target.is_dir():
            _refuse_no_checkpoint(target)
            for source in self._sources:
                _refuse_other_file(source, target)
        else:
            try:
                open_weights(target)
            except CheckpointError as error:
                raise CheckpointError(
                    f"--overwrite replaces weights only, and {error}: choose another --out"
                ) from None

    def write(
        self,
        values: Mapping[int, Mapping[str, Tensor]],
        *,
        without: Collection[str] = (),
        further: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> Path:
        """Write the copy, under another name for the time being, and return where it lies.

        Of a folder everything is copied but ``.git``; links are followed.

        Parameters
        ----------
        values : dict of int to dict of str to Tensor
            By number of the file, name to new value.
        without : collection of str
            Names in the folder that are left out.
        further : dict of str to callable
            Name to what writes that file at a path.
        """
        if not self._checkpoint.is_folder:
            self._checkpoint.files[0].write(self._new, values.get(0, {}))
            return self._new
        self._new.mkdir()
        files = {f.path: (f, values.get(i, {})) for i, f in enumerate(self._checkpoint.files)}
        for place, path in progress(self._sources, "writing files"):
            if place.parts[0] in without:
                continue
            copy = self._new / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path in files:
                file, own = files[path]
                file.write(copy, own)
            elif path.is_dir():
                copy.mkdir(exist_ok=True)
            else:
                shutil.copyfile(path, copy)
        for name, write in (further or {}).items():
            write(self._new / name)
        return self._new

    def commit(self) -> None:
        """Give the copy its name; what it does not replace stays in the target."""
        self.refuse_loss()  # the target may have changed meanwhile
        if not self.target.is_dir():
            os.replace(self._new, self.target)
            return
        _carry(self.target, self._new)
        shutil.copymode(self.target, self._new)
        os.rename(self.target, self._old)
        try:
            os.rename(self._new, self.target)
        except BaseException:
            os.rename(self._old, self.target)
            raise
        _discard(self._old, self.target)


@contextmanager
def destination(checkpoint: Checkpoint, target: Path, *, overwrite: bool) -> Iterator[Destination]:
    """Hold the place where a copy goes, and leave nothing else there.

    Parameters
    ----------
    checkpoint : Checkpoint
    target : Path
        A link to a folder or file stands for what it points to.
    overwrite : bool
        Whether a checkpoint may be there already.

    Raises
    ------
    CheckpointError
        If `target` is the checkpoint, lies in it or holds it, has another ending than a single
        file of weights, is being written to by another run, or would lose something
        (:meth:`Destination.refuse_loss`).
    OSError
        If nothing can be written there.
    """
    target = _resolved(checkpoint, target)
    made = [p for p in reversed(target.parents) if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _working_folder(target) as work:
            place = Destination(checkpoint, target, work, overwrite=overwrite)
            place.refuse_loss()
            yield place
    except LockedError:
        raise CheckpointError(
            f"another run is writing {target}: wait for it, or choose another --out"
        ) from None
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # not empty when the copy is there
                folder.rmdir()


def _resolved(checkpoint: Checkpoint, target: Path) -> Path:
    """The target without links, apart from the checkpoint."""
    if target.is_symlink() and not target.exists():
        raise CheckpointError(f"{target} is a link to nothing: choose another --out")
    source, resolved = checkpoint.path.resolve(), target.resolve()
    if source == resolved:
        raise CheckpointError(f"{target} is the checkpoint itself: choose another --out")
    if source in resolved.parents or resolved in source.parents:
        raise CheckpointError(f"{target} and {checkpoint.path} lie in one another")
    if not checkpoint.is_folder and resolved.suffix != checkpoint.path.suffix:
        raise CheckpointError(
            f"{target} should end in {checkpoint.path.suffix!r}: the format stays as it is"
        )
    return resolved


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """The hidden folder of a target under its lock, cleared before and removed afterwards."""
    for other in target.parent.glob(f".*{WORK}"):
        name = other.name[1 : -len(WORK)]
        if name != target.name and not other.is_symlink() and (other / LOCK).is_file():
            with suppress(OSError), _held(other):
                _recover(other, target.with_name(name))
    work = target.with_name(f".{target.name}{WORK}")
    if work.is_symlink():
        raise CheckpointError(f"{work} is a link: remove it, or choose another --out")
    with _held(work):
        _recover(work, target)
        yield work


@contextmanager
def _held(work: Path) -> Iterator[None]:
    """Hold the lock of a working folder; removes what this run has made in it at the end."""
    while True:
        work.mkdir(exist_ok=True)
        lock = locked(work / LOCK)
        try:
            lock.__enter__()
        except FileNotFoundError:  # another run has just removed the folder
            continue
        break
    try:
        yield
    finally:
        _remove_new(work)
        lock.__exit__(None, None, None)
        with suppress(OSError):
            work.rmdir()


def _recover(work: Path, target: Path) -> None:
    """Undo or finish what a run has left that was killed."""
    old = work / OLD
    if os.path.lexists(old):
        if os.path.lexists(target):
            _discard(old, target)
        else:
            os.rename(old, target)
    if os.path.lexists(old):
        raise CheckpointError(
            f"{old} holds files of {target} that an interrupted run has left: move them first"
        )
    _remove_new(work)


def _remove_new(work: Path) -> None:
    for path in work.glob(f"{NEW}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sources_of(folder: Path) -> list[Source]:
    """All files in a folder and the empty folders, links followed, in a fixed order.

    Raises
    ------
    CheckpointError
        For links that lead to nothing or back, and for what is neither a file nor a folder.
    """
    found: list[Source] = []
    above = {folder.resolve(), *folder.resolve().parents}

    def visit(place: Path, path: Path, ancestors: set[Path]) -> None:
        names = sorted(os.listdir(path))
        if not names and place.parts:
            found.append(Source(place, path))
        for name in names:
            own, here = path / name, place / name
            if here.parts[0] in LEFT_OUT or name.endswith(WORK):
                continue
            try:
                mode = own.stat().st_mode
            except OSError as error:
                what = "a link that leads to nothing" if own.is_symlink() else "not readable"
                raise CheckpointError(f"{own} is {what}: {error.strerror}") from None
            if stat.S_ISDIR(mode):
                real = own.resolve()
                if real in ancestors:
                    raise CheckpointError(f"{own} is a link that leads back: remove it first")
                visit(here, own, ancestors | {real})
            elif stat.S_ISREG(mode):
                found.append(Source(here, own))
            else:
                raise CheckpointError(f"{own} is neither a file nor a folder: remove it first")

    try:
        visit(Path(), folder, above)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    return found


def is_weights(place: Path) -> bool:
    """Whether a checkpoint's model is loaded from the file at that place in its folder."""
    return len(place.parts) == 1 and WEIGHTS.fullmatch(place.name) is not None


def _is_known(place: Path) -> bool:
    return is_weights(place) or (len(place.parts) == 1 and place.name in SETTINGS)


def _refuse_no_checkpoint(target: Path) -> None:
    """Refuse a folder that neither `save_pretrained` of a model nor this command has written."""
    names = os.listdir(target)
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    known = isinstance(config, dict) and not {"architectures", "model_type"}.isdisjoint(config)
    if not known or not any(WEIGHTS.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{target} is no checkpoint, and --overwrite replaces nothing else: choose another "
            "--out"
        )
    for name in names:
        if OPTIMIZER_STATE.fullmatch(name) or name == ADAPTER:
            raise CheckpointError(
                f"{target} holds {name}, which belongs to the weights that would be replaced: "
                "move it first, or choose another --out"
            )


def _refuse_other_file(source: Source, target: Path) -> None:
    """Refuse to replace a file that is no checkpoint's, unless by the same content."""
    present = target / source.place
    try:
        if not os.path.lexists(present) or (_is_known(source.place) and present.is_file()):
            return
        if source.path.is_dir() and present.is_dir():
            return
        same = present.is_file() and filecmp.cmp(source.path, present, shallow=False)
    except OSError:  # a file where the copy has a folder
        same = False
    if not same:
        raise CheckpointError(
            f"{present} is another than {source.path} and no file of a checkpoint: move it first, "
            "or choose another --out"
        )


def _carry(target: Path, new: Path) -> None:
    """Give everything in the target that the copy does not replace a name in the copy as well."""
    for folder, folders, files in os.walk(target):
        here = Path(folder)
        place = here.relative_to(target)
        for name in folders:
            copy = new / place / name
            if not (here / name).is_symlink() and not copy.exists():
                copy.mkdir()
                shutil.copystat(here / name, copy)
        for name in (*files, *(name for name in folders if (here / name).is_symlink())):
            copy = new / place / name
            if os.path.lexists(copy) or is_weights(place / name):
                continue
            if (here / name).is_symlink():
                os.symlink(os.readlink(here / name), copy)
                continue
            try:
                os.link(here / name, copy)
            except OSError:  # a file system without hard links
                shutil.copy2(here / name, copy)


def _discard(old: Path, target: Path) -> None:
    """Remove a replaced folder: weights, and what the target has in its place or as well."""
    for folder, folders, files in os.walk(old, topdown=False):
        here = Path(folder)
        place = here.relative_to(old)
        for name in files:
            present = target / place / name
            replaced = _is_known(place / name) and present.is_file()
            if is_weights(place / name) or replaced or _is_held(here / name, present):
                (here / name).unlink()
        for name in folders:
            if (here / name).is_symlink() and _is_held(here / name, target / place / name):
                (here / name).unlink()
        with suppress(OSError):  # something is left
            here.rmdir()


def _is_held(path: Path, other: Path) -> bool:
    if path.is_symlink():
        return other.is_symlink() and os.readlink(path) == os.readlink(other)
    try:
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False
