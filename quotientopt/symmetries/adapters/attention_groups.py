"""Structure groups of query-key pairs: rotary embeddings, normalised queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quotientopt.groups import (
    GL,
    O,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
)
from quotientopt.symmetries.adapters.layers import IDENTITY, own_parameter
from quotientopt.symmetries.norm import norm_kind
from quotientopt.symmetries.registry import NotUnderstoodError, follows

# Functions of q kᵀ and v alone; anyone may register others with transformers.
_IMPLEMENTATIONS = {
    None,
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
}

# All turn the planes (j, j + rotary_dim/2); they differ in the angles.
_ROTARY_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}


def require_known_attention(module: Any) -> None:
    """Refuse an attention function that somebody registered with transformers.

    Raises
    ------
    NotUnderstoodError
        Naming it.
    """
    implementation = module.config._attn_implementation
    if isinstance(implementation, str):
        implementation = implementation.removeprefix("paged|")
    if implementation not in _IMPLEMENTATIONS:
        raise NotUnderstoodError(f"the attention implementation {implementation!r} is not known")


def rotary_group(config: Any, rank: int, *, partial: bool = False) -> StructureGroup:
    """The commutant of the rotary embedding that a configuration of transformers describes.

    Parameters
    ----------
    config : PreTrainedConfig
    rank : int
        Width of a head.
    partial : bool
        Whether the model can leave the last rows of a head as they are.

    Raises
    ------
    NotUnderstoodError
        For a kind of rotary embedding that is not known.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type")
    if kind not in _ROTARY_TYPES:
        raise NotUnderstoodError(f"the rotary embedding {kind!r} is not known")
    factor = 1.0
    # The proportional kind turns all planes, some of them with frequency zero.
    if partial and kind != "proportional":
        factor = parameters.get("partial_rotary_factor", 1.0)
    rows = int(rank * factor)
    if rows % 2 or rows > rank:
        raise NotUnderstoodError(f"a rotary embedding of {rows} rows in a head of {rank}")
    return RotaryCommutant(rank, rows) if rows else GL(rank)


def normalised_group(norms: Sequence[nn.Module], group: StructureGroup) -> StructureGroup | None:
    """What is left of a query-key group when queries and keys are normalised head by head.

    GL(r) becomes O(r), the stabiliser of ones in it if the norm also centres; a rotary commutant
    becomes the unitary phases of its planes. Gains break all of it unless they are frozen and
    multiply by one number wherever the group mixes rows; then None is returned, which leaves
    queries and keys alone.

    Parameters
    ----------
    norms : sequence of Module
        Norms of queries and keys over the r rows of a head; identities do nothing.
    group : GL or RotaryCommutant
        The group without the norms.

    Raises
    ------
    NotUnderstoodError
        If a norm is not known, or not over one head.
    """
    norms = [norm for norm in norms if not follows(norm, IDENTITY)]
    if not norms:
        return group
    kinds = [norm_kind(norm) for norm in norms]
    if None in kinds:
        unknown = type(norms[kinds.index(None)]).__name__
        raise NotUnderstoodError(f"{unknown} on queries or keys is not known")
    centres = any(kind is not None and kind.centres for kind in kinds)
    rotary = isinstance(group, RotaryCommutant)
    # A list, so that every norm is checked.
    intact = [_commutes(norm, group) for norm in norms]
    if not all(intact) or (centres and rotary):
        return None
    if isinstance(group, RotaryCommutant):
        return RotaryPhases(group.r, group.rotary_dim, group.layout)
    return StabilizerOfOnes(group.r) if centres else O(group.r)


def _commutes(norm: nn.Module, group: StructureGroup) -> bool:
    """Whether gain and bias of a norm commute with the unitary part of the group, and stay so."""
    if getattr(norm, "normalized_shape", (group.r,)) != (group.r,):
        raise NotUnderstoodError(f"the norm of queries or keys is not over {group.r} rows")
    for part in ("weight", "bias"):
        if getattr(norm, part, None) is None:
            continue
        parameter = own_parameter(norm, part)
        if parameter is None or tuple(parameter.shape) != (group.r,):
            raise NotUnderstoodError(f"the norm of queries or keys is not over {group.r} rows")
        values = parameter.detach()
        if parameter.requires_grad or (part == "bias" and bool((values != 0).any())):
            return False
        if any(bool((values[rows] != values[rows[0]]).any()) for rows in _mixed_rows(group)):
            return False
    return True


def _mixed_rows(group: StructureGroup) -> list[list[int]]:
    """Sets of rows that the group mixes."""
    if isinstance(group, RotaryCommutant):
        return [*map(list, group.planes), *([list(group.pass_rows)] if group.pass_rows else [])]
    return [list(range(group.r))]
