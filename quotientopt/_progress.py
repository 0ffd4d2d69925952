"""How long a loop still takes, on a terminal, once it has taken five seconds."""

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

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
