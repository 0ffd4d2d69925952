"""Slices: the pieces of a model's parameters that are updated in frames of their own.

:func:`find_slices` cuts them; `signature_of`, among the checks, tells when that has to be done
again.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quotientopt._linalg import compute_dtype
from quotientopt.optim.options import TRANSPORTED
from quotientopt.symmetries import Block, HeadSymmetry, SymmetryMap
from quotientopt.symmetries.pairs import is_lora_pair

SIDES = ("left", "right")

# Columns of a matrix over the leading directions of its hidden units.
LEADING = 2
# Tokens over the columns of a matrix up to which they get a frame: as many as hidden units often.
TOKENS = 4

# A name in a list of modules: what is before the first number.
NUMBERED = re.compile(r"((?:[^.]+\.)*?)\d+\.")


@dataclass(frozen=True, eq=False)
class Slice:
    """Blocks of one parameter that share their frames.

    Attributes
    ----------
    parameter : Tensor
    name : str
        The parameter's name, for messages.
    group_index : int
        Its param group.
    blocks : tuple of Block
        M views ``(heads, r, n)``; several for grouped queries. A matrix outside attention is one
        block ``(1, rows, d)`` with the residual axis last; see :func:`matrices_on`.
    symmetry : HeadSymmetry, optional
        Whose group acts on the rows; None for a matrix without head frame.
    side : str
        ``"left"`` or ``"right"`` factor of that symmetry.
    residual : bool
        Whether the columns are the residual stream and get a residual frame.
    suffix : str
        Distinguishes the slices of one parameter in its optimizer state; empty if there is one.
    outside : bool
        Whether it is a matrix outside the layers that hold the heads: embedding, positions, head.
    embedding : bool
        Whether it is one of these whose residual frame stays as it was made.
    output : bool
        Whether it is one behind those layers whose frame follows its gradients; its singular
        values stay as they are.
    rest_of : Slice, optional
        Of what the symmetries of a fused parameter leave uncovered: a slice that they cover.
    """

    parameter: Tensor
    name: str
    group_index: int
    blocks: tuple[Block, ...]
    symmetry: HeadSymmetry | None
    side: str
    residual: bool
    suffix: str = ""
    outside: bool = False
    embedding: bool = False
    output: bool = False
    rest_of: Slice | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """``(M, heads, r, n)``."""
        return (len(self.blocks), *self.blocks[0].size)

    @functools.cached_property
    def stacked(self) -> bool:
        """Whether it is several matrices that share their residual frame, one for each expert."""
        several = self.residual and self.symmetry is None and self.shape[1] > 1
        return several and _is_stack(self.parameter, self.blocks[0].column_axis)

    @functools.cached_property
    def takes_scale(self) -> bool:
        """Whether its updates are ``update_scale`` times Adam's: matrices in frames, but LoRA's."""
        framed = self.residual or self.symmetry is not None
        lora = self.symmetry is not None and is_lora_pair(self.symmetry)
        return framed and not lora and self.shape[-1] > 1

    def hidden_directions(self, group: Mapping[str, Any]) -> int:
        """How many directions of its rows, hidden units, get a frame: all, the leading ones, or 0.

        The leading ones are half as many as the columns, of matrices with more rows than columns.
        None of a stack, whose hidden units differ from matrix to matrix.
        Rows of a matrix outside the layers, tokens, get one where they are no more than `TOKENS`
        times as many; those of an output none where the second moment is factored: in frames on
        both sides v is nearly diagonal, ρ γᵀ is not, and no polar step takes the directions back
        that are much too long.
        """
        rows, columns = self.shape[0] * self.shape[1] * self.shape[2], self.shape[3]
        if not self.residual or self.symmetry is not None or self.embedding or self.stacked:
            return 0
        if group["hidden_frame"] == "leading":
            return columns // LEADING if rows > columns and not self.output else 0
        factored = group["second_moment"] == "factored"
        if (self.outside and rows > TOKENS * columns) or (self.output and factored):
            return 0
        return 0 if group["hidden_frame"] is None else rows


def stream_of(slice_: Slice) -> tuple[int, torch.dtype, torch.device]:
    """Dimension, dtype of computation and device of the residual stream on a slice's columns."""
    return slice_.shape[-1], compute_dtype(slice_.parameter.dtype), slice_.parameter.device


@dataclass(eq=False)
class Slices:
    """All slices of an optimizer's parameters, and the parameters that have none.

    Those in ``transported`` are factors of LoRA pairs whose coordinates follow.
    """

    framed: list[Slice] = field(default_factory=list)
    transported: list[Slice] = field(default_factory=list)
    plain: list[list[Tensor]] = field(default_factory=list)


def frame_kind(group: Mapping[str, Any], symmetry: HeadSymmetry) -> str | None:
    """What frames the options of a param group ask for; without a word on LoRA, as for heads."""
    kind: str | None = group["head_frame"]
    if "lora_frame" in group and is_lora_pair(symmetry):
        kind = group["lora_frame"]
    return kind


def parameter_name(
    parameter: Tensor, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]
) -> str:
    """The parameter's qualified name, or its place in the param groups."""
    if id(parameter) in names:
        return names[id(parameter)]
    for i, group in enumerate(groups):
        for j, candidate in enumerate(group["params"]):
            if candidate is parameter:
                return f"param_groups[{i}]['params'][{j}]"
    return "a parameter outside the optimizer"


def find_slices(
    param_groups: Sequence[Mapping[str, Any]],
    symmetries: SymmetryMap,
    names: Mapping[int, str],
    outside: Mapping[int, bool] | None = None,
) -> Slices:
    """Cut the parameters of an optimizer into slices.

    Parameters
    ----------
    param_groups : sequence of dict
        With ``params``, ``head_frame``, ``residual_frame``, ``embedding_frame`` and, if it differs,
        ``lora_frame``.
    symmetries : SymmetryMap
    names : mapping of int to str
        ``id(parameter)`` to name.
    outside : mapping of int to bool, optional
        ``id`` of matrices outside the layers, and whether they lie behind them, where
        ``symmetries`` are of a part of the model and do not tell.

    Raises
    ------
    ValueError
        If the weights of a pair are split over groups, or symmetries cover an entry of a
        parameter twice.
    """
    owners = {
        id(parameter): i for i, group in enumerate(param_groups) for parameter in group["params"]
    }
    residual = symmetries.residual
    outside = _outside_of_layers(symmetries) if outside is None else outside
    axes = (
        {}
        if residual is None
        else {id(residual.parameters[name]): (axis, name) for name, axis in residual.axes.items()}
    )

    def name_of(parameter: Tensor) -> str:
        return parameter_name(parameter, names, param_groups)

    found = Slices(plain=[[] for _ in param_groups])
    slices: dict[int, list[Slice]] = defaultdict(list)
    for symmetry in symmetries.heads:
        _refuse_split(symmetry, owners, name_of)
        for side, blocks in zip(SIDES, (symmetry.left_blocks, symmetry.right_blocks), strict=True):
            for members in _by_parameter(blocks):
                parameter = members[0].parameter
                if id(parameter) not in owners:
                    continue
                group = param_groups[owners[id(parameter)]]
                kind = frame_kind(group, symmetry)
                if kind is None:
                    continue
                axis, _ = axes.get(id(parameter), (None, ""))
                framed = group["residual_frame"] is not None and axis is not None
                slice_ = Slice(
                    parameter,
                    name_of(parameter),
                    owners[id(parameter)],
                    members,
                    symmetry,
                    side,
                    residual=framed and members[0].column_axis == axis,
                )
                if kind == TRANSPORTED:
                    found.transported.append(slice_)
                else:
                    slices[id(parameter)].append(slice_)
    transported = {id(slice_.parameter) for slice_ in found.transported}
    for i, group in enumerate(param_groups):
        for parameter in group["params"]:
            if id(parameter) in transported:
                continue
            if own := slices.get(id(parameter)):
                found.framed += _with_suffixes([*own, *_uncovered(own)])
                continue
            view = None
            if group["residual_frame"] is not None and id(parameter) in axes:
                view = matrices_on(parameter, *axes[id(parameter)])
            if view is not None:
                block = Block.of(view, parameter, name_of(parameter))
                framing, behind = group["embedding_frame"], outside.get(id(parameter))
                output = framing == "fixed_but_head" and behind is True
                found.framed.append(
                    Slice(
                        parameter,
                        block.name,
                        i,
                        (block,),
                        None,
                        "",
                        residual=True,
                        outside=behind is not None,
                        embedding=framing != "per_matrix" and behind is not None and not output,
                        output=output,
                    )
                )
            else:
                found.plain[i].append(parameter)
    return found


def matrices_on(parameter: Tensor, axis: int, name: str) -> Tensor | None:
    """A parameter as matrices ``(stack, rows, d)`` with the residual stream, its ``axis``, last.

    Of three axes, see :func:`_is_stack`, they may be those of experts. All others have one matrix,
    ``stack`` times ``rows`` of it, which is a view in any memory format: convolutions that read the
    stream, tables, and weights of convolutions that write to it, but those of numbered layers with
    a single channel, which take every coordinate for itself. None where there is no matrix, nor in
    a table of biases, of experts say, whose rows have nothing to do with each other.
    """
    if parameter.ndim < 2:
        return None
    if axis == 0 and parameter.ndim > 2:
        depthwise = parameter.size(1) == 1 and NUMBERED.match(name) is not None
        if depthwise or not name.endswith(".weight"):
            return None
    rows = parameter.movedim(axis, -1)
    if rows.ndim == 2:
        return None if name.endswith("bias") else rows.unsqueeze(0)
    try:
        return rows.view(rows.size(0), -1, rows.size(-1))
    except RuntimeError:  # Axes that no view takes together.
        return None


def _is_stack(parameter: Tensor, axis: int | None) -> bool:
    """Whether three axes are those of experts: the first is not the stream, and no other is less.

    Of a convolution that reads the stream the kernel is.
    """
    return parameter.ndim == 3 and axis != 0 and parameter.size(0) == min(parameter.shape)


def _outside_of_layers(symmetries: SymmetryMap) -> dict[int, bool]:
    """``id`` of the stream's matrices outside the numbered layers that hold attention heads.

    Embeddings, positions and heads of a model, with True for what it lists behind its layers, which
    is its head where that is not tied to an embedding; none of a model without numbered layers. A
    linear layer in front of them that writes to the stream (patches of an image, features, what
    other models put out) is a matrix as those inside: all of its rows have gradients.
    """
    residual = symmetries.residual
    if residual is None:
        return {}
    names = {id(parameter): name for name, parameter in residual.parameters.items()}
    blocks = (block for symmetry in symmetries.heads for block in symmetry.blocks)
    of_heads = {names.get(id(block.parameter), block.name) or "" for block in blocks}
    lists = {found[1] for name in of_heads if (found := NUMBERED.match(name))}
    inside = [(m := NUMBERED.match(name)) is not None and m[1] in lists for name in names.values()]
    last = max((place for place, own in enumerate(inside) if own), default=len(inside))
    axes = residual.axes.items()
    writes = {name for name, axis in axes if axis == 0 and name.endswith(".weight")}
    return {
        key: place > last
        for place, (key, name) in enumerate(names.items())
        if lists and not inside[place] and (place > last or name not in writes)
    }


def _refuse_split(symmetry: HeadSymmetry, owners: Mapping[int, int], name_of: Any) -> None:
    """A pair's weights belong to one group; its biases may sit in one without weight decay."""
    weights = [b.parameter for b in symmetry.blocks if b.size[2] > 1 and id(b.parameter) in owners]
    for parameter in weights[1:]:
        first, other = owners[id(weights[0])], owners[id(parameter)]
        if first != other:
            raise ValueError(
                f"symmetry {symmetry.name!r} is split over param groups: "
                f"{name_of(weights[0])!r} is in group {first}, {name_of(parameter)!r} in group "
                f"{other}; put both into one group with one lr"
            )


def _by_parameter(blocks: Iterable[Block]) -> list[tuple[Block, ...]]:
    """Blocks of one parameter and one shape together: they share their frames."""
    members: dict[tuple[int, tuple[int, ...]], list[Block]] = defaultdict(list)
    for block in blocks:
        members[id(block.parameter), block.size].append(block)
    return [tuple(group) for group in members.values()]


def _uncovered(slices: Sequence[Slice]) -> list[Slice]:
    """Slices without frames for what the symmetries of a fused parameter leave uncovered."""
    parameter = slices[0].parameter
    hits = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.int8).zero_()
    for slice_ in slices:
        for block in slice_.blocks:
            block.view(hits).add_(1)
    if bool((hits > 1).any()):
        raise ValueError(
            f"parameter {slices[0].name!r} is covered more than once by the blocks of its "
            "symmetries; every entry may belong to one block of one symmetry"
        )
    if bool((hits == 1).all()):
        return []
    for axis in range(parameter.ndim):
        lines = hits.movedim(axis, 0).reshape(hits.size(axis), -1)
        if bool((lines == lines[:, :1]).all()):
            return [
                _uncovered_slice(slices[0], parameter.narrow(axis, start, length))
                for start, length in runs((lines[:, 0] == 0).nonzero().flatten().tolist())
            ]
    raise ValueError(
        f"parameter {slices[0].name!r} is covered only partly by the blocks of its symmetries, and "
        "the rest is not made of whole rows or columns; leave its symmetries out"
    )


def _uncovered_slice(sibling: Slice, uncovered: Tensor) -> Slice:
    rows = uncovered.unsqueeze(0) if uncovered.ndim == 1 else uncovered.flatten(1)
    block = Block.of(rows.unsqueeze(0), sibling.parameter, sibling.name)
    return replace(
        sibling, blocks=(block,), symmetry=None, side="", residual=False, rest_of=sibling
    )


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of every run of ascending numbers without a gap."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            yield indices[start], end - start
            start = end


def _with_suffixes(slices: Sequence[Slice]) -> list[Slice]:
    if len(slices) == 1:
        return list(slices)
    return [replace(slice_, suffix=f".{i}") for i, slice_ in enumerate(slices)]
