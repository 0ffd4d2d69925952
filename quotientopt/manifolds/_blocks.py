"""Large batches on the processor, in blocks that stay in its caches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2**23
"""Size of the largest tensor of a block in double precision, for each thread.

Allocators hand temporaries of more than a few times that back to the operating system after every
operation, and fetching them anew costs more than computing with them.
"""

_DOUBLE_BYTES = 8


def in_blocks(
    function: Callable[..., Any], batch_shape: Sequence[int], *arguments: Sequence[Tensor]
) -> Any:
    """``function(*arguments)``, in blocks of batch items where the tensors are large.

    Parameters
    ----------
    function : callable
        Takes tuples of tensors with any batch shape in front; returns a tensor or a tuple of
        tensors with the same batch shape. Batch items do not influence each other.
    batch_shape : sequence of int
        Leading dimensions of all tensors.
    *arguments : tuples of Tensor

    Returns
    -------
    Tensor or tuple of Tensor
        What the function returns for the whole batch. On accelerators, and where one block is
        enough, it is simply called.
    """
    count = torch.Size(batch_shape).numel()
    largest = max(tensor.numel() for pair in arguments for tensor in pair)
    limit = BLOCK_BYTES * torch.get_num_threads()
    size = max(1, limit * count // max(1, _DOUBLE_BYTES * largest))
    if size >= count or arguments[0][0].device.type != "cpu":
        return function(*arguments)
    depth = len(batch_shape)
    flat = [[t.reshape(count, *t.shape[depth:]) for t in pair] for pair in arguments]
    try:
        results = [
            function(*(tuple(t[start : start + size] for t in pair) for pair in flat))
            for start in range(0, count, size)
        ]
    except ValueError:
        # Of the whole batch, so that the message counts the batch items of the whole batch.
        return function(*arguments)
    if isinstance(results[0], Tensor):
        return _join(results, batch_shape)
    return tuple(_join(parts, batch_shape) for parts in zip(*results, strict=True))


def _join(parts: Sequence[Tensor], batch_shape: Sequence[int]) -> Tensor:
    joined = torch.cat(tuple(parts))
    return joined.reshape(*batch_shape, *joined.shape[1:])
