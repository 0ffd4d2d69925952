"""Token sequences in batches of about equal length, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
