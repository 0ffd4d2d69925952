"""What adapters share: checks of layers, views of their heads, axes of the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from quotientopt.groups import GL, Commutant, StructureGroup
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.classes import alteration
from quotientopt.symmetries.head import HeadSymmetry, Translation
from quotientopt.symmetries.registry import (
    Adapter,
    ByClass,
    Contribution,
    NotUnderstoodError,
    follows,
    qualified,
    register,
    unwrapped,
)
from quotientopt.symmetries.residual import Norm, Reader, norm_kind

LINEAR = "torch.nn.modules.linear.Linear"
EMBEDDING = "torch.nn.modules.sparse.Embedding"
# Conv1D of transformers stores (in, out), the transpose of a Linear.
CONV1D = "transformers.pytorch_utils.Conv1D"
CONV2D = "torch.nn.modules.conv.Conv2d"
IDENTITY = "torch.nn.modules.linear.Identity"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"

OUTPUT_AXIS = {LINEAR: 0, CONV1D: 1, CONV2D: 0, EMBEDDING: 1, FALCON_LINEAR: 0}

# Embeddings that scale their rows, or count positions from elsewhere.
_embeddings: ByClass[bool] = ByClass()

Pick = Callable[[Tensor], Tensor]


def transformers_classes(*names: str) -> list[str]:
    """Qualified names in the transformers package, from ``"llama.LlamaAttention"`` and the like.

    Names of more than two parts are qualified already.
    """
    qualified_names = []
    for name in names:
        family, _, class_name = name.partition(".")
        if "." not in class_name:
            name = f"transformers.models.{family}.modeling_{family}.{class_name}"
        qualified_names.append(name)
    return qualified_names


def known(*names: str) -> Callable[[Adapter], Adapter]:
    """Register an adapter for classes of transformers; see :func:`transformers_classes`."""
    return understands(*transformers_classes(*names))


class HeadView(NamedTuple):
    """One head per entry of the first axis: a view ``(heads, r)`` or ``(heads, r, n)``."""

    parameter: nn.Parameter
    name: str
    view: Tensor


def understands(*class_names: str) -> Callable[[Adapter], Adapter]:
    """Register an adapter whose class may be built differently in other versions of its package.

    A missing attribute then means "not understood" instead of an error.
    """

    def decorator(adapter: Adapter) -> Adapter:
        @functools.wraps(adapter)
        def careful(module: nn.Module, name: str) -> Contribution:
            try:
                return adapter(module, name)
            except AttributeError as error:
                raise NotUnderstoodError(
                    f"{type(module).__name__} is built differently: {error}"
                ) from error

        for class_name in class_names:
            register(class_name)(careful)
        return careful

    return decorator


def require(module: Any, *class_names: str) -> Any:
    """Return the module if it computes what one of those classes does.

    Raises
    ------
    NotUnderstoodError
        Otherwise.
    """
    module = unwrapped(module)
    if not any(follows(module, class_name) for class_name in class_names):
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NotUnderstoodError(
            alteration(module, type(module), found)
            or f"a {found} in the place of a plain {class_names[0]}"
        )
    return module


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter of the module itself, None where it was registered as None.

    Raises
    ------
    NotUnderstoodError
        If the value is computed from other parameters (parametrizations, weight norm).
    """
    module = unwrapped(module)
    if name not in module._parameters:
        raise NotUnderstoodError(f"{name} of {type(module).__name__} is not a parameter")
    return module._parameters[name]


def present_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of the module itself that must not be None."""
    parameter = own_parameter(module, name)
    if parameter is None:
        raise NotUnderstoodError(f"{type(module).__name__} has no {name}")
    return parameter


def consecutive(heads: int, part: int = 0, parts: int = 1) -> Pick:
    """Heads one after the other, in the given part of an axis cut into equal parts."""

    def pick(axis_first: Tensor) -> Tensor:
        return axis_first.chunk(parts)[part].unflatten(0, (heads, -1))

    return pick


def interleaved(heads: int, part: int, parts: int) -> Pick:
    """Heads one after the other, each cut into equal parts of which one is taken."""
    return lambda axis_first: axis_first.unflatten(0, (heads, parts, -1))[:, part]


def narrowed(heads: int, start: int, length: int) -> Pick:
    """Heads one after the other in a stretch of the axis."""
    return lambda axis_first: axis_first.narrow(0, start, length).unflatten(0, (heads, -1))


def output_heads(
    layer: nn.Module, name: str, size: int, pick: Pick, kind: str = LINEAR
) -> list[HeadView]:
    """Heads along the outputs of an affine layer: its weight, and its bias if it has one.

    Parameters
    ----------
    layer : Module
        Must compute what the class ``kind`` does and have ``size`` outputs.
    name : str
        Its qualified name.
    size : int
    pick : callable
        From a tensor whose first axis runs over the outputs to ``(heads, r, …)``, by views.
    kind : str
        ``LINEAR`` or ``CONV1D``.
    """
    weight = _matrix(layer, kind, OUTPUT_AXIS[kind], size)
    weight_rows = weight.detach().movedim(OUTPUT_AXIS[kind], 0)
    views = [HeadView(weight, qualified(name, "weight"), pick(weight_rows))]
    bias = own_parameter(layer, "bias")
    if bias is not None:
        views.append(HeadView(bias, qualified(name, "bias"), pick(bias.detach())))
    return views


def input_heads(
    layer: nn.Module, name: str, size: int, pick: Pick, kind: str = LINEAR
) -> list[HeadView]:
    """Heads along the ``size`` inputs of an affine layer; see :func:`output_heads`."""
    axis = 1 - OUTPUT_AXIS[kind]
    weight = _matrix(layer, kind, axis, size)
    return [HeadView(weight, qualified(name, "weight"), pick(weight.detach().movedim(axis, 0)))]


def add_attention(
    contribution: Contribution,
    name: str,
    *,
    query: Sequence[HeadView],
    key: Sequence[HeadView],
    value: Sequence[HeadView],
    output: Sequence[HeadView],
    qk_group: StructureGroup | None = None,
    between: str = "",
    output_bias: HeadView | None = None,
    keys_move: bool = True,
    values_move: bool = True,
) -> None:
    """Add the query-key and the value-output pair of an attention.

    Where queries and keys have GL(r), softmax ignores what a bias of the keys adds: a translation.
    What a bias of the values adds, a bias of the output can take.

    Parameters
    ----------
    contribution : Contribution
    name : str
        Qualified name of the attention.
    query, key, value, output : sequence of HeadView
        ``(heads, r, n)``. Queries and outputs may have a multiple of the heads of keys and values:
        the query heads of one key-value head are next to each other then.
    qk_group : StructureGroup, optional
        Group of the query-key pair; None leaves it alone.
    between : str
        What stands between the heads and the output layer and leaves no value-output pair.
    output_bias : HeadView, optional
        The bias of the output layer, see :func:`bias_of`.
    keys_move : bool
        Whether adding a constant to all scores of a query changes nothing: the scores are not
        capped, and no sink or zero is among them.
    values_move : bool
        Whether the weights of a query sum to one: no sink and no zero takes a part.
    """
    if qk_group is not None:
        right = blocks_of(key)
        left = blocks_of(query, right[0].size[0])
        moved = _biases(right) if keys_move and isinstance(qk_group, GL) else ()
        translation = Translation(moved) if moved else None
        add_pair(contribution, qualified(name, "qk"), qk_group, left, right, translation)
        if keys_move and isinstance(qk_group, Commutant):
            count = right[0].size[0] * len(qk_group.pass_rows)
            contribution.silent_keys |= {b.name: count for b in _biases(right) if count}
    else:
        reason = "queries and keys are normalised, with gains or centred"
        contribution.left_alone[qualified(name, "qk")] = reason
    if between:
        contribution.left_alone[qualified(name, "vo")] = between
        return
    right = blocks_of(value)
    left = blocks_of(output, right[0].size[0])
    moved = _biases(right) if values_move and output_bias is not None else ()
    translation = Translation(moved, blocks_of([output_bias])[0]) if moved and output_bias else None
    add_pair(contribution, qualified(name, "vo"), GL(right[0].size[1]), left, right, translation)


def bias_of(layer: nn.Module, name: str) -> HeadView | None:
    """The bias of an output layer, ``(1, 1, d)``; None where it has none."""
    bias = own_parameter(layer, "bias")
    if bias is None:
        return None
    return HeadView(bias, qualified(name, "bias"), bias.detach()[None, None])


def _biases(blocks: Sequence[Block]) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block.size[2] == 1)


def add_pair(
    contribution: Contribution,
    name: str,
    group: StructureGroup,
    left: list[Block],
    right: list[Block],
    translation: Translation | None = None,
) -> None:
    """Add a head symmetry, unless a factor has too few columns to have full row rank."""
    shapes = {block.size[:2] for block in (*left, *right)}
    if len(shapes) != 1 or next(iter(shapes))[1] != group.r:
        raise NotUnderstoodError(f"the heads of {name} have different shapes: {sorted(shapes)}")
    if min(sum(block.size[2] for block in side) for side in (left, right)) >= group.r:
        contribution.heads.append(HeadSymmetry(left, right, group, name, translation=translation))


def add_reader(
    contribution: Contribution, layer: nn.Module, name: str, kind: str = LINEAR
) -> Reader:
    """Add a matrix that reads the stream."""
    require(layer, kind)
    present_parameter(layer, "weight")
    axis = 1 - OUTPUT_AXIS[kind]
    reader = Reader(
        qualified(name, "weight"),
        axis,
        None if own_parameter(layer, "bias") is None else qualified(name, "bias"),
    )
    contribution.residual_axes[reader.weight] = axis
    return reader


def add_writer(contribution: Contribution, layer: nn.Module, name: str, kind: str = LINEAR) -> None:
    """Add a matrix, and its bias if it has one, whose output is added to the stream."""
    require(layer, kind)
    present_parameter(layer, "weight")
    add_vectors(contribution, qualified(name, "weight"), OUTPUT_AXIS[kind])
    if kind != EMBEDDING and own_parameter(layer, "bias") is not None:
        add_vectors(contribution, qualified(name, "bias"), 0)


def add_embedding(contribution: Contribution, layer: Any, name: str, kind: str = EMBEDDING) -> None:
    """Add an embedding whose rows are added to the stream."""
    if layer.max_norm is not None:
        raise NotUnderstoodError(f"{name} renormalises its rows when it is read")
    if _embeddings.find(layer) is None:
        require(layer, kind)
    present_parameter(layer, "weight")
    add_vectors(contribution, qualified(name, "weight"), 1)


def add_vectors(contribution: Contribution, name: str, axis: int) -> None:
    """Add a parameter that is itself added to the stream."""
    contribution.residual_axes[name] = axis
    contribution.writers.add(name)


def add_norm(
    contribution: Contribution,
    norm: nn.Module,
    name: str,
    readers: Iterable[Reader] | None = None,
) -> None:
    """Add a norm on the stream; without readers, its output is itself part of the stream."""
    kind = norm_kind(norm)
    if kind is None:
        raise NotUnderstoodError(f"{name} is no known norm but a {type(norm).__name__}")
    if len(getattr(norm, "normalized_shape", (0,))) != 1:
        raise NotUnderstoodError(f"{name} normalises over several axes")
    parameters = {}
    for part in ("weight", "bias"):
        parameter = unwrapped(norm)._parameters.get(part)
        if parameter is None and getattr(norm, part, None) is not None:
            raise NotUnderstoodError(f"{part} of {name} is not a parameter")
        if parameter is not None:
            parameters[part] = qualified(name, part)
    if "bias" in parameters:
        contribution.residual_axes[parameters["bias"]] = 0
        if readers is None:
            contribution.writers.add(parameters["bias"])
    contribution.norms.append(
        Norm(
            name,
            kind.centres,
            parameters.get("weight"),
            parameters.get("bias"),
            kind.neutral,
            None if readers is None else tuple(readers),
        )
    )


def add_branch(
    contribution: Contribution,
    module: nn.Module,
    name: str,
    *,
    readers: Sequence[str],
    writers: Sequence[str],
    norm: str | None = None,
    kind: str = LINEAR,
) -> None:
    """Add one branch of a layer, ``x + f(x)``: what reads the stream and what writes to it.

    Parameters
    ----------
    contribution : Contribution
    module : Module
        The layer.
    name : str
        Its qualified name.
    readers, writers : sequence of str
        Affine layers, by their path in ``module``.
    norm : str, optional
        Path of the norm in front of the readers, whose output is read by nothing else.
    kind : str
        Class of readers and writers.
    """
    read = [
        add_reader(contribution, module.get_submodule(path), qualified(name, path), kind)
        for path in readers
    ]
    for path in writers:
        add_writer(contribution, module.get_submodule(path), qualified(name, path), kind)
    if norm is not None:
        add_norm(contribution, module.get_submodule(norm), qualified(name, norm), read)


def register_embedding(*names: str) -> None:
    """Make classes known that look rows up in their weight, up to constants and positions."""
    for class_name in transformers_classes(*names):
        _embeddings[class_name] = True


def add_consumer(
    contribution: Contribution, module: nn.Module, name: str, source: str, *paths: str
) -> None:
    """Add affine layers that read all the hidden states that the module ``source`` returns.

    Parameters
    ----------
    contribution : Contribution
    module : Module
        Around both.
    name : str
        Its qualified name.
    source : str
        Path of the module that returns hidden states.
    *paths : str
        Paths of the layers.
    """
    contribution.consumers[qualified(name, source)] = tuple(
        add_reader(contribution, module.get_submodule(path), qualified(name, path))
        for path in paths
    )


def _matrix(layer: nn.Module, kind: str, axis: int, size: int) -> nn.Parameter:
    """The weight of a plain affine layer, checked along one axis."""
    weight = present_parameter(require(layer, kind), "weight")
    if weight.ndim != 2 or weight.shape[axis] != size:
        raise NotUnderstoodError(
            f"{type(layer).__name__} has a weight {tuple(weight.shape)}, expected {size} along "
            f"axis {axis}"
        )
    return weight


def blocks_of(views: Sequence[HeadView], heads: int | None = None) -> list[Block]:
    """Blocks of all views; several of a view that has more heads, which follow one another."""
    blocks = []
    for parameter, name, view in views:
        groups, rest = divmod(len(view), heads or len(view))
        if rest or not groups:
            raise NotUnderstoodError(f"{len(view)} heads of {name} for {heads} others")
        members = view.unflatten(0, (-1, groups))
        blocks += [Block.of(members[:, member], parameter, name) for member in range(groups)]
    return blocks
