"""Attentions with separate projections, equal heads and no rotary embedding."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.layers import (
    add_attention,
    consecutive,
    input_heads,
    output_heads,
    present_parameter,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified


def plain_attention(
    module: Any, name: str, *, rank: int, heads: int, layers: tuple[str, str, str, str]
) -> Contribution:
    """GL(r) on both pairs of every head; missing biases are left out.

    Parameters
    ----------
    module : Module
    name : str
        Its qualified name.
    rank, heads : int
    layers : tuple of str
        Paths of the query, key, value and output layers.
    """
    width = heads * rank
    if present_parameter(module.get_submodule(layers[0]), "weight").shape[0] != width:
        raise NotUnderstoodError(f"queries of another width than {heads} heads of {rank}")
    query, key, value = (
        output_heads(module.get_submodule(path), qualified(name, path), width, consecutive(heads))
        for path in layers[:3]
    )
    output = input_heads(
        module.get_submodule(layers[3]), qualified(name, layers[3]), width, consecutive(heads)
    )
    contribution = Contribution()
    add_attention(
        contribution, name, query=query, key=key, value=value, output=output, qk_group=GL(rank)
    )
    return contribution
