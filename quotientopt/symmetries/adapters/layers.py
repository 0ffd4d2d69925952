"""What adapters share: checks of layers, blocks of their parameters, breakers from norms."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import StructureGroup
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, follows, qualified

LINEAR = "torch.nn.modules.linear.Linear"
EMBEDDING = "torch.nn.modules.sparse.Embedding"
LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"


def require(module: Any, class_name: str) -> Any:
    """Return the module if it computes what that class does, else raise NotUnderstoodError."""
    if not follows(module, class_name):
        raise NotUnderstoodError(f"{type(module).__name__} is not a plain {class_name}")
    return module


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter of the module itself, None where it was registered as None.

    Raises
    ------
    NotUnderstoodError
        If the value is computed from other parameters (parametrizations, weight norm).
    """
    if name not in module._parameters:
        raise NotUnderstoodError(f"{name} of {type(module).__name__} is not a parameter")
    return module._parameters[name]


def weight_and_bias(
    layer: nn.Module, class_name: str, shape: tuple[int, int]
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the parameters of a plain affine layer whose weight has that shape."""
    require(layer, class_name)
    weight = own_parameter(layer, "weight")
    if weight is None or tuple(weight.shape) != shape:
        found = None if weight is None else tuple(weight.shape)
        raise NotUnderstoodError(f"{type(layer).__name__} has a weight {found}, expected {shape}")
    return weight, own_parameter(layer, "bias")


def row_block(
    parameter: nn.Parameter, name: str, heads: int, start: int, length: int, axis: int = 0
) -> Block:
    """Block of a matrix or vector whose ``axis`` holds the heads one after the other.

    ``length`` entries from ``start`` on become ``(heads, r)``, the other axis the columns.
    """
    part = parameter.detach().movedim(axis, 0).narrow(0, start, length)
    return Block.of(part.unflatten(0, (heads, -1)), parameter, name)


def add_pair(
    contribution: Contribution,
    name: str,
    group: StructureGroup,
    left: list[Block],
    right: list[Block],
) -> None:
    """Add a head symmetry, unless a factor has too few columns to have full row rank."""
    if min(sum(block.size[2] for block in side) for side in (left, right)) >= group.r:
        contribution.heads.append(HeadSymmetry(left, right, group, name))


def add_residual(
    contribution: Contribution, layer: nn.Module, name: str, axis: int, *, writes: bool = False
) -> None:
    """Add a layer's weight and, if the layer writes into the stream, its bias."""
    contribution.residual_axes[qualified(name, "weight")] = axis
    if writes and own_parameter(layer, "bias") is not None:
        contribution.residual_axes[qualified(name, "bias")] = 0


def add_layer_norm(contribution: Contribution, norm: nn.Module, name: str) -> None:
    """Add the bias of a layer norm to the axes; its centring and its gain break O(d)."""
    require(norm, LAYER_NORM)
    contribution.residual_breakers.append(f"centring of {name}")
    gain = own_parameter(norm, "weight")
    if gain is not None:
        kind = "trainable gain" if gain.requires_grad else "gain"
        contribution.residual_breakers.append(f"{kind} {qualified(name, 'weight')}")
    if own_parameter(norm, "bias") is not None:
        contribution.residual_axes[qualified(name, "bias")] = 0
