"""Checkpoints on disk: models built from their files, and files with dressed weights.

Reads folders in Hugging Face's format and single files of weights with a configuration. Needs
transformers, which is imported on first use.
"""

from quotientopt.checkpoints.dressing import Report, dress_checkpoint
from quotientopt.checkpoints.files import Checkpoint, CheckpointError, find_checkpoint
from quotientopt.checkpoints.loading import Loaded, load_checkpoint
from quotientopt.checkpoints.outputs import (
    example_inputs,
    symmetries_of_checkpoint,
    verify_checkpoint,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Loaded",
    "Report",
    "dress_checkpoint",
    "example_inputs",
    "find_checkpoint",
    "load_checkpoint",
    "symmetries_of_checkpoint",
    "verify_checkpoint",
]
