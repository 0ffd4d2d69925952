"""What all commands share: one-line errors and exit statuses."""

import argparse
import sys
from typing import NoReturn

USAGE_ERROR = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with status 2."""
    print("quotientopt: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def interrupted(what: str) -> int:
    """Print what an interrupt left behind and return the exit status."""
    print(f"quotientopt: interrupted, {what}", file=sys.stderr)
    return INTERRUPTED
