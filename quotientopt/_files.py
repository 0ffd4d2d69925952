"""Files replaced in one step, folders held by one process at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
