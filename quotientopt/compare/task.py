"""What a model is trained on: batches, and the loss they all share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.compare.protocol import Protocol


class Batch(NamedTuple):
    """Inputs of a model and the classes it should predict.

    For texts both are of shape (batch, length), the targets being the next bytes; for images they
    are of shape (batch, height, width) and (batch,).
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Kind:
    """A sort of data, in the words of messages and reports.

    Attributes
    ----------
    name : str
    unit : str
        What the loss is per: "byte" or "image".
    step : str
        Size of a step, a format string with the protocol's fields.
    """

    name: str
    unit: str
    step: str


TEXT = Kind("text", "byte", "{batch} × {context} tokens")
IMAGES = Kind("images", "image", "{batch} images")


class Task(ABC):
    """A data set, split once and for all into a training and a validation part."""

    kind: ClassVar[Kind]

    @property
    @abstractmethod
    def digest(self) -> str:
        """Short hash of both parts."""

    @abstractmethod
    def model_arguments(self, protocol: Protocol) -> dict[str, Any]:
        """Arguments of the reference model that depend on the data."""

    @abstractmethod
    def training_batches(self, protocol: Protocol, seed: int) -> Iterator[Batch]:
        """Yield batches for ever: the same ones for the same seed."""

    @abstractmethod
    def validation_batches(self, protocol: Protocol) -> list[Batch]:
        """Batches of equal size at even distances over the validation part: the same always."""

    def labelled_batches(self, protocol: Protocol) -> list[Batch]:
        """The whole validation part, for the final accuracy; empty where none is taken."""
        return []


def prediction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of all predictions in `batch`."""
    logits = model(batch.inputs)
    return functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())
