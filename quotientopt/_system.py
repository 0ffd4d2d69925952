"""What is around the library: optional packages, files, a terminal.

In reading order: what optional packages are installed with (:func:`install_command`); files
replaced in one step (:func:`write_atomically`) and folders held by one process at a time
(:func:`locked`); and how long a loop still takes (:func:`progress`).
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

# As in the extras of pyproject.toml.
REQUIREMENTS = {
    "geoopt": "geoopt>=0.5.1",
    "heavyball": "heavyball>=3.2,<4",
    "matplotlib": "matplotlib>=3.8",
    "peft": "peft>=0.18",
    "pymanopt": "pymanopt>=2.2",
    "pytorch_optimizer": "pytorch_optimizer>=3.5",
    "scipy": "scipy>=1.10",
    "transformers": "transformers>=5.0",
}


def install_command(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install '{REQUIREMENTS.get(package, package)}'"


fcntl: Any
msvcrt: Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


class LockedError(OSError):
    """Another process holds the lock."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` in one step; of a link, the file it points to.

    A reader finds the old content or the new one, whole, and nothing else is left after an error.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, which is removed afterwards.

    The system lets go of the lock when the process ends, however it ends: a lock file that was
    left behind by a kill is free.

    Raises
    ------
    LockedError
        If another process holds it.
    OSError
        If the file cannot be written, or its file system has no locks.
    """
    descriptor = _open_locked(path)
    try:
        yield
    finally:
        # Removed while it is held, so that nobody waits at a name that is gone.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            # A holder removes the file: the one that was opened may have lost its name since.
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise LockedError(error.errno, "another process is at work there") from None
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


Item = TypeVar("Item")
PATIENCE = 5.0  # seconds without a word
EVERY = 0.5
CLEAR = "\r\x1b[K"


def progress(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, one after the other; a loop over them reports on standard error.

    Nothing is written in the first five seconds, and nothing at all where standard error is no
    terminal. The line is cleared at the end, also after an error.

    Parameters
    ----------
    items : collection
    what : str
        What is being done, ``"verifying symmetries"``.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    begin = shown = time.monotonic()
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - begin >= PATIENCE and now - shown >= EVERY:
                shown = now
                rest = (now - begin) * (len(items) - done) / done
                line = f"{what}: {done} of {len(items)}, about {_duration(rest)} left"
                print(CLEAR + line, end="", file=sys.stderr, flush=True)
            yield item
    finally:
        if shown > begin:
            print(CLEAR, end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Seconds, or minutes where there are many."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
