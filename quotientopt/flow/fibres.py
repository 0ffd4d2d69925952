"""Where factor pairs lie in a list of tensors, and what of a direction is along their orbits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quotientopt._linalg import Pair, wide, wide_dtype
from quotientopt.flow.geometry import PairGeometry
from quotientopt.optim.pairs import columns_of, stack_factors
from quotientopt.symmetries import Block, HeadSymmetry


class Fibre(ABC):
    """Pairs of one shape and structure group, read from tensors and written back.

    Attributes
    ----------
    geometry : PairGeometry
    """

    geometry: PairGeometry

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pairs."""
        return (self.geometry.name,)

    @abstractmethod
    def read(self, tensors: Sequence[Tensor]) -> Pair:
        """Both factors in the widest precision, with the batch dimensions in front."""

    @abstractmethod
    def write_(self, pair: Pair, tensors: Sequence[Tensor]) -> None:
        """Write both factors to their places."""

    @abstractmethod
    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """Results ``(*batch, …)`` by the names of the pairs."""


class PairFibre(Fibre):
    """The pair ``(tensors[place], tensors[place + 1])``."""

    def __init__(self, geometry: PairGeometry, place: int) -> None:
        self.geometry, self._place = geometry, place

    def read(self, tensors: Sequence[Tensor]) -> Pair:
        return wide(tensors[self._place]), wide(tensors[self._place + 1])

    def write_(self, pair: Pair, tensors: Sequence[Tensor]) -> None:
        for offset, factor in enumerate(pair):
            tensors[self._place + offset].copy_(factor)

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        return {self.geometry.name: values}


class TokenFibre(Fibre):
    """The token matrix X at a place: the pair ``(Xᵀ, [])``."""

    def __init__(self, geometry: PairGeometry, place: int) -> None:
        self.geometry, self._place = geometry, place

    def read(self, tensors: Sequence[Tensor]) -> Pair:
        A = wide(tensors[self._place]).mT
        return A, A[..., :0]

    def write_(self, pair: Pair, tensors: Sequence[Tensor]) -> None:
        tensors[self._place].copy_(pair[0].mT)

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        return {self.geometry.name: values}


class HeadFibre(Fibre):
    """Head symmetries of a model that are alike, their blocks views of its parameters.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
        With one :func:`~quotientopt.optim.pairs.shape_key`.
    geometry : PairGeometry
    place_of : callable
        Parameter to its place among the tensors.
    """

    def __init__(
        self,
        symmetries: Sequence[HeadSymmetry],
        geometry: PairGeometry,
        place_of: Callable[[Tensor], int],
    ) -> None:
        self.geometry, self._symmetries, self._place_of = geometry, symmetries, place_of
        self._dtype = wide_dtype(symmetries[0].blocks[0].parameter.device)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(symmetry.name for symmetry in self._symmetries)

    def read(self, tensors: Sequence[Tensor]) -> Pair:
        def read(block: Block) -> Tensor:
            return block.view(tensors[self._place_of(block.parameter)])

        return stack_factors(self._symmetries, read, self._dtype)

    def write_(self, pair: Pair, tensors: Sequence[Tensor]) -> None:
        for side, stacked in enumerate(pair):
            for symmetry, factor in zip(self._symmetries, stacked, strict=True):
                blocks = (symmetry.left_blocks, symmetry.right_blocks)[side]
                for block, columns in zip(blocks, columns_of(blocks), strict=True):
                    target = tensors[self._place_of(block.parameter)]
                    _write_block_(block, target, factor[..., columns])

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))


def _write_block_(block: Block, target: Tensor, values: Tensor) -> None:
    """Write to a tensor shaped like the block's parameter, however it is laid out."""
    if target.stride() == block.layout:
        block.view(target).copy_(values)
        return
    laid_out = torch.empty_like(block.parameter, dtype=target.dtype).copy_(target)
    block.view(laid_out).copy_(values)
    target.copy_(laid_out)


@dataclass(frozen=True)
class Decomposition:
    """A direction and its vertical part.

    Attributes
    ----------
    vertical : list of Tensor
        Shaped like the direction; zero outside the pairs.
    vertical_squares, horizontal_squares : dict of str to Tensor
        Squared lengths of both parts by pair, per head.
    rest : Tensor
        Squared Euclidean length of what lies outside the pairs.
    """

    vertical: list[Tensor]
    vertical_squares: dict[str, Tensor]
    horizontal_squares: dict[str, Tensor]
    rest: Tensor

    def without_vectors(self) -> Decomposition:
        """The lengths alone."""
        return replace(self, vertical=[])

    @property
    def vertical_square(self) -> Tensor:
        """Squared length of the vertical part, over everything."""
        return _total(self.vertical_squares, self.rest)

    @property
    def horizontal_square(self) -> Tensor:
        """Squared length of the horizontal part, what lies outside the pairs included."""
        return _total(self.horizontal_squares, self.rest) + self.rest


class Fibres:
    """All pairs of a point. Points and directions are lists of tensors.

    Parameters
    ----------
    fibres : sequence of Fibre
        In disjoint entries of the tensors.
    """

    def __init__(self, fibres: Sequence[Fibre]) -> None:
        self._fibres = tuple(fibres)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the pairs."""
        return tuple(name for fibre in self._fibres for name in fibre.names)

    def gradient(self, x: Sequence[Tensor], partials: Sequence[Tensor]) -> list[Tensor]:
        """The gradient in the metric of the pairs; Euclidean elsewhere."""
        found = [partial.clone() for partial in partials]
        for fibre in self._fibres:
            pair = fibre.geometry.gradient(fibre.read(x), fibre.read(partials))
            fibre.write_(pair, found)
        return found

    def decompose(self, x: Sequence[Tensor], u: Sequence[Tensor]) -> Decomposition:
        """Vertical part of a direction and the lengths of both parts, all heads at once."""
        outside = [wide(tensor).clone() for tensor in u]
        vertical = [torch.zeros_like(tensor) for tensor in outside]
        vertical_squares: dict[str, Tensor] = {}
        horizontal_squares: dict[str, Tensor] = {}
        for fibre in self._fibres:
            pair, direction = fibre.read(x), fibre.read(u)
            along = fibre.geometry.vertical(pair, direction)
            across = direction[0] - along[0], direction[1] - along[1]
            for part, squares in ((along, vertical_squares), (across, horizontal_squares)):
                squares |= fibre.by_name(fibre.geometry.squared_norm(pair, part))
            fibre.write_(along, vertical)
            fibre.write_((torch.zeros_like(along[0]), torch.zeros_like(along[1])), outside)
        rest = torch.stack([tensor.square().sum().cpu() for tensor in outside]).sum()
        return Decomposition(vertical, vertical_squares, horizontal_squares, rest)

    def charges(self, x: Sequence[Tensor]) -> dict[str, Tensor]:
        """What gradient flow conserves, see :meth:`PairGeometry.charge`."""
        return self._each(x, "charge")

    def spectra(self, x: Sequence[Tensor]) -> dict[str, Tensor]:
        """Invariant numbers, see :meth:`PairGeometry.spectrum`."""
        return self._each(x, "spectrum")

    def isotropic_shares(self, x: Sequence[Tensor]) -> dict[str, float]:
        """See :meth:`PairGeometry.isotropic_share`."""
        return {
            name: fibre.geometry.isotropic_share(fibre.read(x))
            for fibre in self._fibres
            for name in fibre.names
        }

    def _each(self, x: Sequence[Tensor], method: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for fibre in self._fibres:
            found |= fibre.by_name(getattr(fibre.geometry, method)(fibre.read(x)))
        return found


def _total(squares: dict[str, Tensor], like: Tensor) -> Tensor:
    return torch.stack([like.new_zeros(()), *(s.sum().to(like) for s in squares.values())]).sum()
