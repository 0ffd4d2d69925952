"""Ordinary attention modules as matrices of all heads, and factor pairs made of those matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quotientopt._linalg import Pair, wide
from quotientopt.groups import GL, RotaryCommutant, StructureGroup
from quotientopt.models import Attention
from quotientopt.symmetries.registry import follows

TORCH = "torch.nn.modules.activation.MultiheadAttention"
REFERENCE = "quotientopt.models.attention.Attention"
KINDS = {"torch": TORCH, "reference": REFERENCE}
PARTS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Shape:
    """Sizes and settings of an attention; arguments of :class:`InvariantAttention`.

    Attributes
    ----------
    width : int
        Of the queries' input and of the output.
    heads, key_value_heads, head_width : int
    key_width, value_width : int
        Of the inputs of keys and values.
    bias : bool
        Whether queries and output have a bias; those of keys and values are needed only where they
        are seen, see :attr:`key_bias` and :attr:`value_bias`.
    causal, batch_first, rotary : bool
        With `rotary`, queries and keys are turned by their positions as in the reference models.
    dropout, scale : float
        Of the attention weights; factor of the scores.
    """

    width: int
    heads: int
    key_value_heads: int
    head_width: int
    key_width: int
    value_width: int
    bias: bool
    causal: bool
    dropout: float
    scale: float
    batch_first: bool
    rotary: bool

    @classmethod
    def of(
        cls,
        *,
        width: int,
        heads: int,
        key_value_heads: int | None,
        head_width: int | None,
        key_width: int | None,
        value_width: int | None,
        bias: bool,
        causal: bool,
        dropout: float,
        scale: float | None,
        batch_first: bool,
        rotary: bool,
    ) -> Shape:
        """The shape with its defaults filled in; refuses what does not fit.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        key_value_heads = heads if key_value_heads is None else key_value_heads
        for size in (width, heads, key_value_heads, head_width, key_width, value_width):
            if size is not None and not isinstance(size, int):
                raise TypeError(f"widths and numbers of heads must be int, got {size!r}")
        if min(width, heads, key_value_heads) < 1 or heads % key_value_heads:
            raise ValueError(
                "width, heads and key_value_heads must be positive, heads a multiple of "
                f"key_value_heads, got {width}, {heads} and {key_value_heads}"
            )
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; give head_width")
        head_width = width // heads if head_width is None else head_width
        shape = cls(
            width,
            heads,
            key_value_heads,
            head_width,
            width if key_width is None else key_width,
            width if value_width is None else value_width,
            bias,
            causal,
            dropout,
            max(head_width, 1) ** -0.5 if scale is None else scale,
            batch_first,
            rotary,
        )
        if rotary and head_width % 2:
            raise ValueError(f"rotary attention needs an even head_width, got {head_width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not math.isfinite(shape.scale):
            raise ValueError(f"scale must be finite, got {scale}")
        shape.check_rank()
        return shape

    def check_rank(self) -> None:
        """Raise ``ValueError`` if a factor has fewer columns than rows, and no full row rank."""
        for name, columns in self.columns().items():
            if not 0 < self.head_width <= min(columns):
                raise ValueError(
                    f"head_width {self.head_width} must be positive and at most "
                    f"{min(columns)}, the columns of a factor of {name!r}"
                )

    def groups(self) -> dict[str, StructureGroup]:
        """The structure groups of ``"qk"`` and ``"vo"``."""
        rank = self.head_width
        return {"qk": RotaryCommutant(rank) if self.rotary else GL(rank), "vo": GL(rank)}

    def columns(self) -> dict[str, tuple[int, int]]:
        """Columns (n, m) of the left and right factors of ``"qk"`` and ``"vo"``."""
        group = self.query_groups
        return {
            "qk": (group * (self.width + self.bias), self.key_width + self.key_bias),
            "vo": (group * self.width, self.value_width + self.value_bias),
        }

    @property
    def key_bias(self) -> bool:
        """Whether the keys' bias is seen: without rotation softmax drops it."""
        return self.bias and self.rotary

    @property
    def value_bias(self) -> bool:
        """Whether the values' bias is seen by itself: without dropout the output's takes it up.

        Rows of attention weights sum to one then, so that it adds ``W_O b_V`` to every output.
        """
        return self.bias and self.dropout > 0

    def matrix_sizes(self) -> list[tuple[int, int, int]]:
        """Rows, columns and fan-in of the four :class:`Matrices`, without biases."""
        rows, shared = (n * self.head_width for n in (self.heads, self.key_value_heads))
        return [
            (rows, self.width, self.width),
            (shared, self.key_width, self.key_width),
            (shared, self.value_width, self.value_width),
            (rows, self.width, rows),
        ]

    @property
    def query_groups(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.key_value_heads


class Matrices(NamedTuple):
    """Weights of an attention, each with its bias as the last column where that is seen.

    Attributes
    ----------
    query, key, value : Tensor
        ``(heads · r, n)``, rows grouped by head.
    output : Tensor
        The transpose of the output matrix, ``(heads · r, width)``.
    output_bias : Tensor, optional
        Belongs to no pair, ``(width,)``; with what the values' bias adds where that has no column.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None

    def pairs(self, shape: Shape) -> dict[str, Pair]:
        """The factor pairs ``"qk"`` and ``"vo"`` of all key-value heads.

        Left factors ``(key_value_heads, r, group · n)``: queries, or output columns, of the heads
        that share a key-value head side by side. Right factors ``(key_value_heads, r, m)``.
        """
        shared = shape.key_value_heads

        def left(matrix: Tensor) -> Tensor:
            heads = matrix.unflatten(0, (shared, shape.query_groups, -1))
            return heads.transpose(1, 2).flatten(-2)

        return {
            "qk": (left(self.query), self.key.unflatten(0, (shared, -1))),
            "vo": (left(self.output), self.value.unflatten(0, (shared, -1))),
        }

    @classmethod
    def of_pairs(
        cls, pairs: Mapping[str, Pair], shape: Shape, output_bias: Tensor | None
    ) -> Matrices:
        """Inverse of :meth:`pairs`."""

        def rows(left: Tensor) -> Tensor:
            heads = left.unflatten(-1, (shape.query_groups, -1))
            return heads.transpose(1, 2).flatten(0, 2)

        (query, key), (output, value) = pairs["qk"], pairs["vo"]
        return cls(rows(query), key.flatten(0, 1), value.flatten(0, 1), rows(output), output_bias)


def read_attention(module: nn.Module) -> tuple[str, Shape, Matrices]:
    """Class, sizes and detached weights of an ordinary attention.

    Raises
    ------
    TypeError
        If the module is none of the two classes that are understood.
    ValueError
        If it has a part that the factor pairs do not cover; the part is named.
    """
    if follows(module, TORCH):
        return TORCH, *_read_torch(module)
    if follows(module, REFERENCE):
        return REFERENCE, *_read_reference(module)
    raise TypeError(
        "from_attention reads torch.nn.MultiheadAttention and quotientopt.models.Attention, got "
        f"{type(module).__module__}.{type(module).__qualname__}"
    )


def kind_for(kind: str | None, came_from: str | None, shape: Shape) -> str:
    """The class to write: the one asked for, the one it came from, or the first that fits.

    Raises
    ------
    ValueError
        If the kind is unknown, or no class fits.
    """
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
        return KINDS[kind]
    if came_from is not None:
        return came_from
    try:
        refuse_misfit(REFERENCE, shape)
    except ValueError:
        refuse_misfit(TORCH, shape)
        return TORCH
    return REFERENCE


def write_attention(
    kind: str, shape: Shape, matrices: Matrices
) -> nn.MultiheadAttention | Attention:
    """An ordinary attention with these weights; see :func:`read_attention`.

    Raises
    ------
    ValueError
        If the class has no place for something; it is named.
    """
    refuse_misfit(kind, shape)
    if kind == TORCH:
        return _write_torch(shape, matrices)
    return _write_reference(shape, matrices)


def refuse_misfit(kind: str, shape: Shape) -> None:
    """Raise ``ValueError`` if an attention of that class cannot have this shape."""
    default_scale = shape.head_width**-0.5
    misfits = {
        f"head_width {shape.head_width} other than width / heads": shape.head_width * shape.heads
        != shape.width,
        f"scale {shape.scale:g} other than {default_scale:g}": shape.scale != default_scale,
    }
    if kind == TORCH:
        name = "torch.nn.MultiheadAttention"
        misfits |= {
            f"key_value_heads {shape.key_value_heads}": shape.query_groups > 1,
            "causal=True (it takes masks at every call)": shape.causal,
            "rotary=True": shape.rotary,
        }
    else:
        name = "quotientopt.models.Attention"
        misfits |= {
            "bias=True": shape.bias,
            f"dropout {shape.dropout:g}": shape.dropout > 0,
            "keys or values of another width": {shape.key_width, shape.value_width}
            != {shape.width},
            "batch_first=False": not shape.batch_first,
        }
    reason = next((misfit for misfit, found in misfits.items() if found), None)
    if reason is not None:
        raise ValueError(f"{name} has no place for {reason}; pass another kind to to_attention")


def _read_torch(module: Any) -> tuple[Shape, Matrices]:
    for part in ("bias_k", "bias_v"):
        if getattr(module, part) is not None:
            raise ValueError(
                f"{part} (add_bias_kv=True) is an extra key, which InvariantAttention has not"
            )
    if module.add_zero_attn:
        raise ValueError("add_zero_attn=True is an extra key, which InvariantAttention has not")
    width, heads = module.embed_dim, module.num_heads
    if module._qkv_same_embed_dim:
        weights = tuple(module.in_proj_weight.detach().chunk(3))
    else:
        weights = tuple(getattr(module, f"{part}_proj_weight").detach() for part in ("q", "k", "v"))
    if (module.in_proj_bias is None) != (module.out_proj.bias is None):
        raise ValueError("MultiheadAttention has a bias on one side only; give it both or none")
    output_bias = None
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.detach().chunk(3)
        weights = tuple(
            torch.cat((weight, bias[:, None]), dim=1)
            for weight, bias in zip(weights, biases, strict=True)
        )
        output_bias = module.out_proj.bias.detach()
    output = module.out_proj.weight.detach().mT
    shape = Shape.of(
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=module.head_dim,
        key_width=module.kdim,
        value_width=module.vdim,
        bias=output_bias is not None,
        causal=False,
        dropout=module.dropout,
        scale=None,
        batch_first=module.batch_first,
        rotary=False,
    )
    query, key, value = weights
    if output_bias is not None and not shape.key_bias:
        key = key[:, :-1]
    if output_bias is not None and not shape.value_bias:
        output_bias = (wide(output_bias) + wide(value[:, -1]) @ wide(output)).to(output_bias.dtype)
        value = value[:, :-1]
    return shape, Matrices(query, key, value, output, output_bias)


def _read_reference(module: Any) -> tuple[Shape, Matrices]:
    for part in PARTS:
        if getattr(module, part).bias is not None:
            raise ValueError(f"{part} of {type(module).__name__} has a bias, which it should not")
    width = module.query.in_features
    shape = Shape.of(
        width=width,
        heads=module.heads,
        key_value_heads=module.key_value_heads,
        head_width=module.head_width,
        key_width=width,
        value_width=width,
        bias=False,
        causal=module.causal,
        dropout=0.0,
        scale=None,
        batch_first=True,
        rotary=module.rotary,
    )
    query, key, value, output = (getattr(module, part).weight.detach() for part in PARTS)
    return shape, Matrices(query, key, value, output.mT, None)


def _write_torch(shape: Shape, matrices: Matrices) -> nn.MultiheadAttention:
    like = matrices.query
    module = nn.utils.skip_init(
        nn.MultiheadAttention,
        shape.width,
        shape.heads,
        dropout=shape.dropout,
        bias=shape.bias,
        kdim=shape.key_width,
        vdim=shape.value_width,
        batch_first=shape.batch_first,
        device=like.device,
        dtype=like.dtype,
    )
    weights: list[Tensor] = [matrices.query, matrices.key, matrices.value]
    with torch.no_grad():
        if shape.bias:
            seen = (True, shape.key_bias, shape.value_bias)
            biases = [
                weight[:, -1] if has else weight.new_zeros(len(weight))
                for weight, has in zip(weights, seen, strict=True)
            ]
            module.in_proj_bias.copy_(torch.cat(biases))
            module.out_proj.bias.copy_(matrices.output_bias)
            weights = [
                weight[:, :-1] if has else weight for weight, has in zip(weights, seen, strict=True)
            ]
        if module._qkv_same_embed_dim:
            module.in_proj_weight.copy_(torch.cat(weights))
        else:
            for part, weight in zip("qkv", weights, strict=True):
                getattr(module, f"{part}_proj_weight").copy_(weight)
        module.out_proj.weight.copy_(matrices.output.mT)
    return module


def _write_reference(shape: Shape, matrices: Matrices) -> Attention:
    # Its constructor takes no dtype and draws initial weights; neither may show.
    with torch.device("meta"):
        sizes = (shape.width, shape.heads, shape.key_value_heads)
        module = Attention(*sizes, rotary=shape.rotary, causal=shape.causal)
    module.to(matrices.query.dtype).to_empty(device=matrices.query.device)
    weights = (matrices.query, matrices.key, matrices.value, matrices.output.mT)
    with torch.no_grad():
        for part, weight in zip(PARTS, weights, strict=True):
            getattr(module, part).weight.copy_(weight)
    return module
