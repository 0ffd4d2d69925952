"""The package that builds the models."""

from __future__ import annotations

from typing import Any

from quotientopt._extras import install_command
from quotientopt.checkpoints.errors import CheckpointError


def require_transformers() -> Any:
    """The package transformers, which brings safetensors along.

    Raises
    ------
    CheckpointError
        Naming the command that installs it.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"transformers is not installed: {install_command('transformers')}"
        ) from None
    return transformers
