"""What each reference model reads, and its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass

from quotientopt.compare.data import load_corpus
from quotientopt.compare.errors import UsageError
from quotientopt.compare.images import load_images
from quotientopt.compare.task import IMAGES, TEXT, Kind, Task


@dataclass(frozen=True)
class ModelDefaults:
    """Defaults of a reference model.

    Attributes
    ----------
    kind : Kind
        What the model reads.
    data : str
    batch, context, layers, width, validation_batches : int
        See `Protocol`; an image is a sequence of as many patches as `context`, always.
    """

    kind: Kind
    data: str
    batch: int
    context: int
    layers: int
    width: int
    validation_batches: int


_TEXT = ModelDefaults(TEXT, "stdlib", 16, 128, 4, 128, 12)
MODEL_DEFAULTS: Mapping[str, ModelDefaults] = {
    "gpt": _TEXT,
    "llama": _TEXT,
    "vit": ModelDefaults(IMAGES, "fashion-mnist", 64, 49, 4, 64, 32),
}
IMAGE_DATA = ("fashion-mnist", "mnist-5k")
DATA = {TEXT: "stdlib, shakespeare or the path of a file", IMAGES: " or ".join(IMAGE_DATA)}


def load_task(data: str, model: str, batch: int, context: int) -> Task:
    """Load what `model` is to be trained on.

    Raises
    ------
    UsageError
        If the model cannot read such data, or the data cannot be had.
    """
    wanted = MODEL_DEFAULTS[model].kind
    found = IMAGES if data in IMAGE_DATA else TEXT
    if found != wanted:
        raise UsageError(
            f"model {model!r} reads {wanted.name}, but data {data!r} is {found.name}; "
            f"give {DATA[wanted]}"
        )
    return load_corpus(data, context) if wanted == TEXT else load_images(data, batch)
