"""The symmetry of a family of attention heads: a structure group and the blocks it acts on.

Then lengths that norms do not see (:class:`ScaleSymmetry`), and what other optimizers need: views
per head of attention matrices (:func:`head_blocks`), groups of parameters (:func:`matrix_groups`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.groups import Scale, StructureGroup
from quotientopt.symmetries.block import Block, HeadBlocks

BY_CLASS = "class"


@dataclass(frozen=True, eq=False)
class Translation:
    """The affine part of a head's gauge: ``b ↦ b + t`` on a bias of the right factor.

    Softmax ignores what is constant over the keys, so that the bias of the keys may be moved freely
    where no rotation stands between queries and keys. Its rows sum to one, so that the bias of the
    values adds ``W_O b`` to every output, which the output bias can take: ``b_V ↦ b_V + t``,
    ``b_O ↦ b_O − Σ_h W_O t``. Together with a head's group G it is the semidirect product
    G ⋉ R^r; g comes first.

    Attributes
    ----------
    blocks : tuple of Block
        Blocks ``(heads, r, 1)`` among the right blocks of the symmetry; all move by the same t.
    sink : Block, optional
        The output bias, ``(1, 1, d)``; None where nothing has to make up for t.
    """

    blocks: tuple[Block, ...]
    sink: Block | None = None


class HeadSymmetry:
    """A structure group acting on a factor pair that lives in a model's parameters.

    The left factor A and the right factor B are tuples of blocks that share the head axis:
    ``A = [A_1, …, A_k]`` with ``A_i`` of shape ``(heads, r, n_i)``. An element g of the group,
    one per head, acts by ``(A, B) ↦ (g^{-T} A, g B)`` on every block and leaves what the model
    computes unchanged, which depends on ``AᵀB`` alone.

    Parameters
    ----------
    left, right : iterable of Block or Tensor
        Blocks of the two factors. A tensor must be a view of a parameter with shape
        ``(heads, r, n)`` or ``(heads, r)``.
    group : StructureGroup
        Acts on the r rows.
    name : str
        Unique in the model, for example ``"blocks.0.attention.qk"``.
    translation : Translation, optional
        The affine part of the gauge: a bias of the right factor that may be translated.
    source : str
        How the symmetry is known: ``"class"``, or ``"found"`` with the deviation of its proof.

    Raises
    ------
    ValueError
        If the blocks do not share heads and rows, the group has another size, a factor has
        fewer columns than rows, so that it cannot have full row rank, or the translated blocks are
        no single columns of the right factor.
    """

    def __init__(
        self,
        left: Iterable[Block | Tensor],
        right: Iterable[Block | Tensor],
        group: StructureGroup,
        name: str = "",
        *,
        translation: Translation | None = None,
        source: str = BY_CLASS,
    ) -> None:
        self.name = name
        self.group = group
        self.translation = translation
        self.source = source
        self.left_blocks = tuple(b if isinstance(b, Block) else Block.of(b) for b in left)
        self.right_blocks = tuple(b if isinstance(b, Block) else Block.of(b) for b in right)
        shapes = {block.size[:2] for block in self.blocks}
        if not self.left_blocks or not self.right_blocks or len(shapes) != 1:
            raise ValueError(
                f"symmetry {name!r} needs left and right blocks with the same heads and rows, got "
                f"{[b.size for b in self.left_blocks]} and {[b.size for b in self.right_blocks]}"
            )
        self.heads, self.rank = next(iter(shapes))
        if group.r != self.rank:
            raise ValueError(
                f"symmetry {name!r}: the group {group} does not act on blocks of {self.rank} rows"
            )
        for side, columns in zip(("left", "right"), self.columns, strict=True):
            if columns < self.rank:
                raise ValueError(
                    f"symmetry {name!r}: the {side} factor has {columns} columns, fewer than its "
                    f"{self.rank} rows, and cannot have full row rank"
                )
        if translation is not None:
            self._check_translation(translation)

    def _check_translation(self, translation: Translation) -> None:
        columns = [block for block in self.right_blocks if block.size[2] == 1]
        moved = translation.blocks
        if not moved or not all(any(block is column for column in columns) for block in moved):
            raise ValueError(
                f"symmetry {self.name!r}: a translation moves biases of the right factor, got "
                f"{[block.size for block in moved]}"
            )
        sink = translation.sink
        widths = {block.size[2] for block in self.left_blocks}
        if sink is not None and (sink.size[:2] != (1, 1) or widths != {sink.size[2]}):
            raise ValueError(
                f"symmetry {self.name!r}: an output bias of {sink.size[2]} entries cannot take "
                f"what left blocks of {sorted(widths)} columns add"
            )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, those of the left factor first."""
        return self.left_blocks + self.right_blocks

    @property
    def left(self) -> tuple[Tensor, ...]:
        """Views ``(heads, r, n_i)`` of the parameters that make up the left factor A."""
        return tuple(block.view() for block in self.left_blocks)

    @property
    def right(self) -> tuple[Tensor, ...]:
        """Views ``(heads, r, m_i)`` of the parameters that make up the right factor B."""
        return tuple(block.view() for block in self.right_blocks)

    @property
    def columns(self) -> tuple[int, int]:
        """Numbers of columns (n, m) of the two factors, summed over their blocks."""
        left, right = (
            sum(block.size[2] for block in side) for side in (self.left_blocks, self.right_blocks)
        )
        return left, right

    @property
    def of_units(self) -> bool:
        """Whether the "heads" are single hidden units."""
        return self.rank == 1 and self.heads > 1

    def renamed(self, name_of: Callable[[Block], str]) -> HeadSymmetry:
        """The same symmetry with the blocks' parameters under other names."""
        return self.with_blocks(lambda block: replace(block, name=name_of(block)))

    def with_blocks(self, change: Callable[[Block], Block]) -> HeadSymmetry:
        """The same symmetry with every block, the output bias's too, replaced by another."""
        new = {id(block): change(block) for block in (*self.blocks, *self._sinks())}
        translation = self.translation
        if translation is not None:
            sink = translation.sink
            moved = tuple(new[id(block)] for block in translation.blocks)
            translation = Translation(moved, None if sink is None else new[id(sink)])
        left, right = (
            [new[id(block)] for block in side] for side in (self.left_blocks, self.right_blocks)
        )
        return HeadSymmetry(
            left, right, self.group, self.name, translation=translation, source=self.source
        )

    def without_translation(self) -> HeadSymmetry:
        """The same symmetry without its affine part."""
        return HeadSymmetry(
            self.left_blocks, self.right_blocks, self.group, self.name, source=self.source
        )

    def _sinks(self) -> tuple[Block, ...]:
        if self.translation is None or self.translation.sink is None:
            return ()
        return (self.translation.sink,)

    def random_element(
        self, cond: float = 10.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A random group element per head, float64 on the CPU, shape ``(heads, r, r)``."""
        return self.group.random((self.heads,), cond=cond, generator=generator, dtype=torch.float64)

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not an element of the group for every head.

        Raises
        ------
        ValueError
            Naming the symmetry and the shape, or what is wrong with the element.
        """
        expected = (self.heads, self.rank, self.rank)
        if tuple(element.shape) != expected:
            raise ValueError(
                f"symmetry {self.name!r} needs an element of shape {expected}, "
                f"got {tuple(element.shape)}"
            )
        try:
            self.group.check_element(element)
        except ValueError as error:
            raise ValueError(f"symmetry {self.name!r}: {error}") from None

    @torch.no_grad()
    def refuse_overflow(
        self, element: Tensor, view: Callable[[Block], Tensor] = Block.view
    ) -> None:
        """Refuse an element that takes finite weights beyond the numbers of their dtype (float16).

        Parameters
        ----------
        element : Tensor
        view : callable
            The weights that it will act on; by default those that are there.

        Raises
        ------
        ValueError
            Naming symmetry, parameter and dtype.
        """
        element = element.to(torch.float64)
        contragredient = self.group.inverse(element).mT
        for blocks, g in ((self.left_blocks, contragredient), (self.right_blocks, element)):
            for block in blocks:
                largest = torch.finfo(block.parameter.dtype).max
                if largest >= torch.finfo(torch.bfloat16).max:
                    continue
                moved = g.to(block.parameter.device) @ view(block).to(torch.float64)
                if bool((moved.abs() > largest).any()):
                    raise ValueError(
                        f"symmetry {self.name!r}: {block.name!r} does not fit "
                        f"{block.parameter.dtype}; convert the model to float32"
                    )

    @torch.no_grad()
    def act_(self, element: Tensor) -> None:
        """Act on the parameters in place, ``(A, B) ↦ (g^{-T} A, g B)``.

        Parameters
        ----------
        element : Tensor
            Shape ``(heads, r, r)``, in the group. Products are formed in float64 and rounded once
            to the parameters' dtype.
        """
        self.check_element(element)
        element = element.to(torch.float64)
        contragredient = self.group.inverse(element).mT
        for blocks, g in ((self.left_blocks, contragredient), (self.right_blocks, element)):
            for block in blocks:
                view = block.view()
                view.copy_(g.to(view.device) @ view.to(torch.float64))

    def random_translation(self, *, generator: torch.Generator | None = None) -> Tensor:
        """A random translation per head, float64 on the CPU, shape ``(heads, r)``."""
        device = "cpu" if generator is None else generator.device
        shape = (self.heads, self.rank)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).cpu()

    def check_translation(self, t: Tensor) -> None:
        """Refuse a translation of another shape, or where the symmetry has none.

        Raises
        ------
        ValueError
            Naming the symmetry and the shape.
        """
        if self.translation is None:
            raise ValueError(f"symmetry {self.name!r} has no bias that could be translated")
        if tuple(t.shape) != (self.heads, self.rank) or not bool(t.isfinite().all()):
            raise ValueError(
                f"symmetry {self.name!r} needs a finite translation of shape "
                f"{(self.heads, self.rank)}, got {tuple(t.shape)}"
            )

    @torch.no_grad()
    def translate_(self, t: Tensor) -> None:
        """Translate in place, ``b ↦ b + t`` and ``b_O ↦ b_O − Σ_h W_O t`` where there is a sink.

        Parameters
        ----------
        t : Tensor
            Shape ``(heads, r)``. Sums are formed in float64 and rounded once.
        """
        self.check_translation(t)
        assert self.translation is not None
        t = t.to(torch.float64)
        for block in self.translation.blocks:
            view = block.view()
            view.copy_(view.to(torch.float64) + t.to(view.device).unsqueeze(-1))
        if self.translation.sink is not None:
            view = self.translation.sink.view()
            moved = sum(
                torch.einsum("hrd,hr->d", left.to(torch.float64), t.to(left.device))
                for left in self.left
            )
            view.copy_(view.to(torch.float64) - moved)

    def __repr__(self) -> str:
        return (
            f"HeadSymmetry({self.name!r}, {self.group}, heads={self.heads}, columns={self.columns})"
        )


class ScaleSymmetry:
    """Positive factors, one per head, on one factor alone: ``X ↦ c X``.

    What a norm behind a projection does not see: normalised queries are the same from W_Q and
    from c W_Q.

    Parameters
    ----------
    blocks : sequence of Block
        ``(heads, r, n)``; all blocks of a head are multiplied by the same c.
    name : str
        Unique in the model.
    source : str
        As of :class:`HeadSymmetry`.
    """

    def __init__(self, blocks: Sequence[Block], name: str, *, source: str = BY_CLASS) -> None:
        self.blocks = tuple(blocks)
        self.name = name
        self.source = source
        if not self.blocks or len({block.size[0] for block in self.blocks}) != 1:
            raise ValueError(f"symmetry {name!r} needs blocks with the same heads")
        self.heads, self.rank, _ = self.blocks[0].size
        self.group = Scale(1)

    def random_element(
        self, cond: float = 10.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A random factor per head, float64 on the CPU, shape ``(heads, 1, 1)``."""
        return self.group.random((self.heads,), cond=cond, generator=generator, dtype=torch.float64)

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not one positive factor per head; ``ValueError`` names the symmetry."""
        if tuple(element.shape) != (self.heads, 1, 1):
            raise ValueError(
                f"symmetry {self.name!r} needs an element of shape {(self.heads, 1, 1)}, "
                f"got {tuple(element.shape)}"
            )
        try:
            self.group.check_element(element)
        except ValueError as error:
            raise ValueError(f"symmetry {self.name!r}: {error}") from None

    @torch.no_grad()
    def act_(self, element: Tensor) -> None:
        """Multiply in place; products are formed in float64 and rounded once."""
        self.check_element(element)
        for block in self.blocks:
            view = block.view()
            view.copy_(view.to(torch.float64) * element.to(view.device, torch.float64))

    def __repr__(self) -> str:
        return f"ScaleSymmetry({self.name!r}, heads={self.heads})"


QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"


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
