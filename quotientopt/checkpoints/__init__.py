"""Checkpoints on disk: models built from their files, and files with dressed weights.

Reads folders in Hugging Face's format and single files of weights with a configuration. Needs
transformers, which is imported on first use.
"""

from quotientopt.checkpoints.dressing import Report, dress_checkpoint
from quotientopt.checkpoints.errors import CheckpointError
from quotientopt.checkpoints.example_inputs import example_inputs
from quotientopt.checkpoints.loading import Loaded, load_checkpoint
from quotientopt.checkpoints.outputs import symmetries_of_checkpoint, verify_checkpoint
from quotientopt.checkpoints.source import Checkpoint, find_checkpoint

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
