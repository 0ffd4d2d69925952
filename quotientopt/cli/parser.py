"""What all commands share: one-line errors, exit statuses, and quiet packages."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


class TerminatedError(BaseException):
    """SIGTERM has come; like KeyboardInterrupt no error of the program, and nothing catches it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within it, SIGTERM unwinds the stack as Ctrl-C does, so that temporary files are removed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with status 2."""
    print("quotientopt: error: " + printable(message), file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def interrupted(what: str) -> int:
    """Print what an interrupt left behind and return the exit status."""
    print(f"quotientopt: interrupted, {what}", file=sys.stderr)
    return INTERRUPTED


def printable(text: str) -> str:
    """One line without control characters, which a name in a file may hold."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def quiet_transformers() -> None:
    """Let transformers, if it is installed, print errors only: a command's output is a table."""
    with suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
