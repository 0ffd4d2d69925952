"""Heads for other optimizers: views per head of attention matrices, groups of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from quotientopt.symmetries.block import Block
from quotientopt.symmetries.head import HeadSymmetry

QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"


@dataclass(frozen=True, eq=False)
class HeadBlocks:
    """The heads of one matrix, or of one part of a fused one.

    Attributes
    ----------
    kind : {"query", "key", "value", "output"}
    block : Block
        A view ``(heads, r, n)`` of the parameter, all heads of this kind; ``block.view(tensor)`` is
        the same view of anything laid out like it, a gradient or a momentum for example.
    symmetry : str
        Name of the symmetry they belong to.
    """

    kind: str
    block: Block
    symmetry: str

    @property
    def parameter(self) -> Tensor:
        """The parameter the heads are views of."""
        return self.block.parameter

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.block.name

    @property
    def view(self) -> Tensor:
        """The heads, ``(heads, r, n)``: rows of r, whichever way the matrix is stored."""
        return self.block.view()


def head_blocks(heads: Sequence[HeadSymmetry]) -> list[HeadBlocks]:
    """The matrices of attention heads, per head.

    Fused matrices fall into their parts; the query heads of all key-value heads are one view where
    they lie at even distances, which they do in every layout but exotic ones. Biases and pairs that
    are no attention (LoRA, linear chains) are left out.

    Parameters
    ----------
    heads : sequence of HeadSymmetry
        Of a :class:`SymmetryMap`; queries and keys are told from values and outputs by their names.

    Returns
    -------
    list of HeadBlocks
    """
    found = []
    for symmetry in heads:
        kinds = _kinds(symmetry)
        if kinds is None:
            continue
        for kind, blocks in zip(kinds, (symmetry.left_blocks, symmetry.right_blocks), strict=True):
            matrices = [block for block in blocks if block.size[2] > 1]
            found += [HeadBlocks(kind, block, symmetry.name) for block in _merged(matrices)]
    return found


def matrix_groups(model: nn.Module, optimizer: str = "torch") -> list[dict[str, Any]]:
    """Param groups of a model for optimizers that orthogonalise matrices, Muon and its relatives.

    The first group holds the trained matrices inside repeated layers (members of a list of
    modules), the last one all other trained parameters: embeddings, the head, vectors.

    Parameters
    ----------
    model : Module
    optimizer : {"torch", "dion", "deepspeed"}
        ``"torch"``: the two groups, for ``torch.optim.Muon`` and for AdamW. ``"dion"``: the two
        with ``algorithm`` ``"muon"`` and ``"adamw"``, for one optimizer of dion. ``"deepspeed"``:
        one group, and the attribute ``use_muon`` set on every parameter, by which DeepSpeed tells
        them apart.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        For another name of an optimizer.
    """
    if optimizer not in ("torch", "dion", "deepspeed"):
        raise ValueError(
            f"optimizer must be 'torch', 'dion' or 'deepspeed', got {optimizer!r}; for others take "
            "symmetries.head_blocks()"
        )
    inside = _inside_layers(model)
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        chosen = parameter.ndim == 2 and name in inside
        if optimizer == "deepspeed":
            parameter.use_muon = chosen  # type: ignore[attr-defined]
        if parameter.requires_grad:
            (matrices if chosen else rest).append(parameter)
    if optimizer == "deepspeed":
        return [{"params": [*matrices, *rest]}]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest}]
    if optimizer == "dion":
        groups[0]["algorithm"], groups[1]["algorithm"] = "muon", "adamw"
    return groups


def _kinds(symmetry: HeadSymmetry) -> tuple[str, str] | None:
    """What the left and the right factor are."""
    part = next((p for p in reversed(symmetry.name.split(".")) if not p.isdecimal()), "").partition(
        "_"
    )[0]
    return {"qk": (QUERY, KEY), "vo": (OUTPUT, VALUE)}.get(part)


def _merged(blocks: Sequence[Block]) -> Iterator[Block]:
    """Blocks of one parameter at even distances as one block with all their heads."""
    by_parameter: dict[int, list[Block]] = defaultdict(list)
    for block in blocks:
        by_parameter[id(block.parameter)].append(block)
    for members in by_parameter.values():
        starts = sorted(
            block.offset + head * block.stride[0]
            for block in members
            for head in range(block.size[0])
        )
        steps = {b - a for a, b in pairwise(starts)}
        shapes = {(block.size[1:], block.stride[1:]) for block in members}
        if len(members) == 1 or len(steps) != 1 or len(shapes) != 1:
            yield from members
            continue
        first = min(members, key=lambda block: block.offset)
        size = (len(starts), *first.size[1:])
        yield replace(first, size=size, stride=(steps.pop(), *first.stride[1:]))


def _inside_layers(model: nn.Module) -> set[str]:
    """Names of the parameters inside repeated layers: members of a list of modules."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path.rpartition(".")[2].isdecimal()
        for name, _ in module.named_parameters()
    }
