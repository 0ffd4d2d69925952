"""Attentions: groups of their pairs by positions and norms, pairs by the layout of projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quotientopt.groups import (
    GL,
    Commutant,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
    commutant_of,
)
from quotientopt.symmetries.adapters.branches import Sublayer, register_sublayer
from quotientopt.symmetries.adapters.layers import (
    IDENTITY,
    LINEAR,
    HeadView,
    Pick,
    add_attention,
    bias_of,
    consecutive,
    input_heads,
    known,
    narrowed,
    output_heads,
    own_parameter,
    present_parameter,
)
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, follows, qualified
from quotientopt.symmetries.residual import norm_kind

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


def rotary_group(
    config: Any,
    rank: int,
    *,
    partial: bool = False,
    layout: str = "half",
    layer_type: str | None = None,
) -> StructureGroup:
    """The commutant of the rotary embedding that a configuration of transformers describes.

    Parameters
    ----------
    config : PreTrainedConfig
    rank : int
        Width of a head.
    partial : bool
        Whether the model can leave the last rows of a head as they are.
    layout : {"half", "interleaved"}
        Which rows make a plane, see :class:`~quotientopt.groups.RotaryCommutant`.
    layer_type : str, optional
        Where layers of several types have rotary embeddings of their own: the layer's.

    Raises
    ------
    NotUnderstoodError
        For a kind of rotary embedding that is not known.
    """
    parameters = config.rope_parameters
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
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
    if not rows:
        return GL(rank)
    group = RotaryCommutant(rank, rows, layout)
    if kind != "proportional":
        return group
    turning = int(parameters.get("partial_rotary_factor", 1.0) * rank // 2)
    frequencies = [1.0 + j if j < turning else 0.0 for j in range(len(group.planes))]
    return commutant_of(rank, group.planes, frequencies)


def normalised_group(
    norms: Sequence[nn.Module], group: StructureGroup, *, whole: bool = False
) -> StructureGroup | None:
    """What is left of a query-key group when queries and keys are normalised.

    GL(r) becomes O(r), the stabiliser of ones in it if the norm also centres; a rotary commutant
    becomes the unitary phases of its planes. Gains break all of it unless they are frozen and
    multiply by one number wherever the group mixes rows; then None is returned, which leaves
    queries and keys alone.

    Parameters
    ----------
    norms : sequence of Module
        Norms of queries and keys, over the r rows of a head; identities do nothing. Gains of shape
        ``(r,)``, or ``(heads, r)``.
    group : GL, RotaryCommutant or PlaneCommutant
        The group without the norms.
    whole : bool
        Whether the norms are over the rows of all heads at once, with gains of shape
        ``(heads * r,)``.

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
    rotary = isinstance(group, Commutant)
    # A list, so that every norm is checked.
    intact = [_commutes(norm, group, whole) for norm in norms]
    if not all(intact) or (centres and (rotary or whole)):
        return None
    if isinstance(group, PlaneCommutant):
        return RotaryPhases.of(group)
    if isinstance(group, RotaryCommutant):
        return RotaryPhases(group.r, group.rotary_dim, group.layout)
    return StabilizerOfOnes(group.r) if centres else O(group.r)


def add_score_gains(
    contribution: Contribution,
    module: nn.Module,
    name: str,
    norms: Sequence[str],
    group: StructureGroup,
) -> None:
    """Count the numbers that can move from the gain of queries into that of keys.

    A gain multiplies rows behind the norm: of a rotated plane both by s in the queries and by 1/s
    in the keys, of a row that passes by itself.

    Parameters
    ----------
    contribution : Contribution
    module : Module
        The attention.
    name : str
    norms : sequence of str
        Paths of the norms of queries and of keys.
    group : GL, RotaryCommutant or PlaneCommutant
        The group without the norms.
    """
    parts = [module.get_submodule(path) for path in norms]
    gains = [own_parameter(p, "weight") for p in parts if getattr(p, "weight", None) is not None]
    if len(gains) != 2 or gains[0] is None or gains[1] is None or gains[0] is gains[1]:
        return
    queries, keys = (gain.numel() for gain in gains if gain is not None)
    if keys % group.r or queries % keys:
        return
    count = group.r
    if isinstance(group, Commutant):
        count = len(group.planes) + len(group.pass_rows)
    contribution.score_gains[qualified(name, norms[0], "weight")] = count * (keys // group.r)


def _commutes(norm: nn.Module, group: StructureGroup, whole: bool) -> bool:
    """Whether gain and bias of a norm commute with the unitary part of the group, and stay so."""
    over = NotUnderstoodError(f"the norm of queries or keys is not over {group.r} rows")
    shape = getattr(norm, "normalized_shape", (group.r,))
    if len(shape) != 1 or (shape[0] % group.r if whole else shape[0] != group.r):
        raise over
    for part in ("weight", "bias"):
        if getattr(norm, part, None) is None:
            continue
        parameter = own_parameter(norm, part)
        if parameter is None or (parameter.shape[-1] % group.r):
            raise over
        if not whole and parameter.shape[-1] != group.r:
            raise over
        values = parameter.detach().reshape(-1, group.r)
        if parameter.requires_grad or (part == "bias" and bool((values != 0).any())):
            return False
        mixed = _mixed_rows(group)
        if any(bool((values[:, rows] != values[:, rows[:1]]).any()) for rows in mixed):
            return False
    return True


def _mixed_rows(group: StructureGroup) -> list[list[int]]:
    """Sets of rows that the group mixes."""
    if isinstance(group, PlaneCommutant):
        mixed = [[row for plane in planes for row in plane] for planes in group.frequencies]
        return [*mixed, *([list(group.pass_rows)] if group.pass_rows else [])]
    if isinstance(group, RotaryCommutant):
        return [*map(list, group.planes), *([list(group.pass_rows)] if group.pass_rows else [])]
    return [list(range(group.r))]


def projected_attention(
    module: Any,
    name: str,
    *,
    rank: int,
    layers: Sequence[str],
    qk_group: StructureGroup | None,
    kind: str = LINEAR,
    between: str = "",
    keys_move: bool = True,
    values_move: bool = True,
) -> Contribution:
    """Pairs of an attention with four projections, whose heads follow one another.

    Parameters
    ----------
    module : Module
    name : str
        Its qualified name.
    rank : int
        Width of a head.
    layers : sequence of str
        Paths of the query, key, value and output layers; missing biases are left out. There may be
        fewer heads of keys and values than of queries.
    qk_group : StructureGroup, optional
        Group of the query-key pair; None leaves it alone.
    kind : str
        Class of the layers.
    between : str
        What stands between the heads and the output layer and leaves no value-output pair.
    keys_move, values_move : bool
        See :func:`~quotientopt.symmetries.adapters.layers.add_attention`.
    """
    views = []
    for path in layers[:3]:
        layer = module.get_submodule(path)
        rows = present_parameter(layer, "weight").shape[0 if kind == LINEAR else 1]
        pick = consecutive(_heads(rows, rank))
        views.append(output_heads(layer, qualified(name, path), rows, pick, kind))
    return with_output(
        module,
        name,
        layers[3],
        (len(views[0][0].view), rank),
        views,
        qk_group,
        kind,
        between=between,
        keys_move=keys_move,
        values_move=values_move,
    )


def stacked_attention(
    module: Any,
    name: str,
    *,
    rank: int,
    heads: int,
    shared: int | None = None,
    layers: tuple[str, str],
    qk_group: StructureGroup | None,
    kind: str = LINEAR,
) -> Contribution:
    """Pairs of an attention with one projection: first all queries, then all keys, all values.

    Parameters
    ----------
    module, name, rank, qk_group, kind
        See :func:`projected_attention`.
    heads : int
        Heads of the queries.
    shared : int, optional
        Heads of keys and values.
    layers : tuple of str
        Paths of the fused layer and of the output layer.
    """
    shared = heads if shared is None else shared
    rows = (heads + 2 * shared) * rank
    layer, path = module.get_submodule(layers[0]), qualified(name, layers[0])
    views = [
        output_heads(layer, path, rows, narrowed(count, start * rank, count * rank), kind)
        for count, start in ((heads, 0), (shared, heads), (shared, heads + shared))
    ]
    return with_output(module, name, layers[1], (heads, rank), views, qk_group, kind)


def grouped_attention(
    module: Any,
    name: str,
    *,
    rank: int,
    shared: int,
    groups: int = 1,
    layers: tuple[str, str],
    qk_group: StructureGroup | None,
    kind: str = LINEAR,
    values_move: bool = True,
) -> Contribution:
    """Pairs of an attention with one projection: group by group some queries, a key and a value.

    Parameters
    ----------
    module, name, rank, layers, qk_group, kind
        See :func:`stacked_attention`.
    shared : int
        Heads of keys and values.
    groups : int
        Queries per key.
    values_move : bool
        See :func:`~quotientopt.symmetries.adapters.layers.add_attention`.
    """
    rows = shared * (groups + 2) * rank

    layer, path = module.get_submodule(layers[0]), qualified(name, layers[0])

    def heads(*members: int) -> list[HeadView]:
        return [view for member in members for view in fused(member)]

    def fused(member: int) -> list[HeadView]:
        pick: Pick = lambda rows: rows.unflatten(0, (shared, groups + 2, rank))[:, member]  # noqa: E731
        return output_heads(layer, path, rows, pick, kind)

    views = [heads(*range(groups)), heads(groups), heads(groups + 1)]
    size = (shared * groups, rank)
    return with_output(
        module, name, layers[1], size, views, qk_group, kind, values_move=values_move
    )


def with_output(
    module: Any,
    name: str,
    path: str,
    size: tuple[int, int],
    views: Sequence[Sequence[HeadView]],
    qk_group: StructureGroup | None,
    kind: str = LINEAR,
    **options: Any,
) -> Contribution:
    """Pairs of queries, keys and values that are known, with the output layer at a path.

    Parameters
    ----------
    module, name, qk_group, kind
        See :func:`projected_attention`.
    path : str
        Of the output layer, whose inputs are heads that follow one another.
    size : (int, int)
        Heads of the queries, and width of a head.
    views : sequence of sequence of HeadView
        Of queries, of keys and of values.
    **options
        Of :func:`~quotientopt.symmetries.adapters.layers.add_attention`.
    """
    layer, (heads, rank) = module.get_submodule(path), size
    output = input_heads(layer, qualified(name, path), heads * rank, consecutive(heads), kind)
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=views[0],
        key=views[1],
        value=views[2],
        output=output,
        qk_group=qk_group,
        output_bias=bias_of(layer, qualified(name, path)),
        **options,
    )
    return contribution


def plain_attention(layers: Sequence[str], *names: str, rank: str = "head_dim") -> None:
    """Make attentions of transformers known that have GL(r) on both pairs of every head.

    What is added to their scores, as positions are, does not depend on queries or keys.

    Parameters
    ----------
    layers : sequence of str
        Paths of the query, key, value and output layers.
    *names : str
        See :func:`~quotientopt.symmetries.adapters.layers.transformers_classes`.
    rank : str
        Name of the attribute that is the width of a head.
    """

    def adapter(module: Any, name: str) -> Contribution:
        require_known_attention(module)
        r = getattr(module, rank)
        return projected_attention(module, name, rank=r, layers=layers, qk_group=GL(r))

    known(*names)(adapter)
    register_sublayer(Sublayer(tuple(layers[:3]), tuple(layers[3:])), *names)


def _heads(rows: int, rank: int) -> int:
    heads, rest = divmod(rows, rank)
    if rest or not heads:
        raise NotUnderstoodError(f"{rows} rows for heads of {rank}")
    return heads
