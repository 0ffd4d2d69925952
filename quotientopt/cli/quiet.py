"""Third-party packages without progress bars and reports on standard error."""

from contextlib import suppress


def quiet_transformers() -> None:
    """Let transformers, if it is installed, print errors only: a command's output is a table."""
    with suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
