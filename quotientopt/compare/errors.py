"""The one error a user can cause."""

import importlib

from quotientopt._extras import install_command


class UsageError(ValueError):
    """A request that cannot be carried out; its message is one line that says why."""


class RunFailedError(RuntimeError):
    """A run that could not be finished, for reasons outside the request; one line that says why."""


def require(package: str) -> None:
    """Refuse if the optional `package` cannot be imported, naming the command that installs it."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{package} is not installed: {install_command(package)}") from error
