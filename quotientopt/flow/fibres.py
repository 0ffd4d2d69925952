"""Factor pairs in the total space, and where they lie among the tensors of a point.

:class:`PairGeometry` has vertical parts, lengths, gradients and charges in three metrics.
``"euclidean"`` is the metric of the weights as they are. It is invariant under orthogonal elements
only, so that horizontal parts depend on the gauge; in exchange its gradient flow is that of the
training of networks, and conserves Noether charges. ``"preconditioned"`` and ``"right-invariant"``
are the invariant metrics of :class:`quotientopt.manifolds.FactorQuotient`. Token matrices X under
O(d) are pairs with ``A = Xᵀ`` and no columns in B.

A :class:`Fibre` reads pairs from a list of tensors and writes them back; :class:`Fibres` has all of
a point and says what of a direction is along their orbits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quotientopt._linalg import Pair, gram, wide, wide_dtype
from quotientopt.canonical.invariants import product_singular_values
from quotientopt.canonical.reading import is_compact
from quotientopt.groups import (
    GL,
    O,
    RotaryCommutant,
    RotaryPhases,
    StabilizerOfOnes,
    StructureGroup,
)
from quotientopt.manifolds.factor_geometry import FactorGeometry
from quotientopt.symmetries import Block, HeadSymmetry
from quotientopt.symmetries.pairs import columns_of, stack_factors

FLOW_METRICS = ("euclidean", "preconditioned", "right-invariant")


def check_metric(metric: str) -> None:
    """Raise ``ValueError`` unless there is such a metric."""
    if metric not in FLOW_METRICS:
        raise ValueError(f"metric must be one of {FLOW_METRICS}, got {metric!r}")


class PairGeometry:
    """Pairs of one structure group, batched over heads, in one metric; in the widest precision.

    Parameters
    ----------
    group : StructureGroup
    metric : str
        One of :data:`FLOW_METRICS`.
    name : str
        What to call the pairs in messages.
    tokens : bool
        Whether the pairs are token matrices.

    Raises
    ------
    ValueError
        If there is no such metric, or none that is invariant under the group.
    """

    def __init__(
        self, group: StructureGroup, metric: str, name: str, *, tokens: bool = False
    ) -> None:
        check_metric(metric)
        planes = group.commutant if isinstance(group, RotaryPhases) else group
        if not isinstance(planes, GL | O | RotaryCommutant):
            raise ValueError(f"{name!r}: vertical vectors of {group!r} are not known; leave it out")
        self.group, self.metric, self.name = group, metric, name
        self._invariant: FactorGeometry | None = None
        if metric != "euclidean":
            known = isinstance(group, GL | RotaryCommutant) or type(group) is O
            if tokens or not known:
                kind = "token matrices" if tokens else f"the group {group!r}"
                raise ValueError(
                    f"{name!r}: metric {metric!r} is not there for {kind}; use 'euclidean'"
                )
            self._invariant = FactorGeometry(group, metric, check=True)

    def vertical(self, x: Pair, u: Pair) -> Pair:
        """The orthogonal projection of u to the tangent space of the orbit, ``(−Λᵀ A, Λ B)``.

        Euclidean metric: with ``R = u_B Bᵀ − A u_Aᵀ`` and everything projected to the Lie algebra,
        Λ solves ``S_A Λ + Λ S_B = R`` under GL(r) and rotary commutants, ``S Λ + Λ S = R − Rᵀ``
        with ``S = S_A + S_B`` under compact groups. Ranks need not be full.
        """
        if self._invariant is not None:
            return self._invariant.vertical(x, u)
        (A, B), group = x, self.group
        R = group.algebra_projection(u[1] @ B.mT - A @ u[0].mT)
        S_A, S_B = self._reduced(gram(A)), self._reduced(gram(B))
        if is_compact(group):
            S_A = S_B = S_A + S_B
            R = 2 * R
        Lambda = _sylvester(S_A, S_B, R)
        return -Lambda.mT @ A, Lambda @ B

    def squared_norm(self, x: Pair, u: Pair) -> Tensor:
        """``⟨u, u⟩`` per head."""
        if self._invariant is not None:
            return self._invariant.inner(x, u, u)
        return sum(X.square().sum(dim=(-2, -1)) for X in u)  # type: ignore[return-value]

    def gradient(self, x: Pair, partials: Pair) -> Pair:
        """The vector that represents a differential in the metric."""
        if self._invariant is not None:
            return self._invariant.gradient(x, partials)
        return partials

    def charge(self, x: Pair) -> Tensor:
        """What the gradient flow of this metric conserves.

        Euclidean: the Noether charge ``A Aᵀ − B Bᵀ``, projected to the symmetric part of the Lie
        algebra as in :func:`quotientopt.noether_charges`, ``(*batch, r, r)``. The two invariant
        metrics: ``log det S_A − log det S_B``, ``(*batch, 1)``; for a rotary commutant
        ``log |a|² − log |b|²`` of every plane, then that of the passing rows if there are any. Of
        compact groups none: zeros, or no entries.
        """
        S_A, S_B = gram(x[0]), gram(x[1])
        if self._invariant is None:
            # All groups here are closed under transposition, so the projection is symmetric.
            return self.group.algebra_projection(S_A - S_B)
        if is_compact(self.group):
            return S_A.new_zeros(*S_A.shape[:-2], 0)
        S_A, S_B = self.group.row_products(S_A), self.group.row_products(S_B)
        if not isinstance(self.group, RotaryCommutant):
            return _log_ratio(S_A, S_B).unsqueeze(-1)
        first = [plane[0] for plane in self.group.planes]
        diagonals = [S.diagonal(dim1=-2, dim2=-1)[..., first].log() for S in (S_A, S_B)]
        ratios = diagonals[0] - diagonals[1]
        rows = slice(self.group.rotary_dim, self.group.r)
        if not self.group.pass_rows:
            return ratios
        passing = _log_ratio(S_A[..., rows, rows], S_B[..., rows, rows])
        return torch.cat((ratios, passing.unsqueeze(-1)), dim=-1)

    def spectrum(self, x: Pair) -> Tensor:
        """r numbers that no element of the group changes, ``(*batch, r)`` or one per plane and row.

        GL(r): singular values of ``Aᵀ B``. Rotary planes: ``|a| |b|``, then the singular values of
        the passing rows' product. Compact groups: those of [A B], the planes of
        :class:`~quotientopt.groups.RotaryPhases` by their lengths.
        """
        A, B = x
        if isinstance(self.group, RotaryCommutant):
            lengths = [_plane_lengths(self.group, X) for X in x]
            planes, start = lengths[0] * lengths[1], self.group.rotary_dim
            passing = product_singular_values(A[..., start:, :], B[..., start:, :])
            return torch.cat((planes, passing), dim=-1)
        if not is_compact(self.group):
            return product_singular_values(A, B)
        joint = torch.cat((A, B), dim=-1)
        if isinstance(self.group, RotaryPhases):
            commutant = self.group.commutant
            assert isinstance(commutant, RotaryCommutant)
            passing = torch.linalg.svdvals(joint[..., commutant.rotary_dim :, :])
            return torch.cat((_plane_lengths(commutant, joint), passing), dim=-1)
        return torch.linalg.svdvals(joint)

    def isotropic_share(self, x: Pair) -> float:
        """Mean share of the squared length that is vertical, of directions drawn evenly."""
        dim = self.group.dim
        if isinstance(self.group, O):
            # Less the rotations that leave few columns as they are.
            moving = self.group.r - isinstance(self.group, StabilizerOfOnes)
            free = max(0, moving - sum(X.shape[-1] for X in x))
            dim -= free * (free - 1) // 2
        return dim / sum(X.shape[-2] * X.shape[-1] for X in x)

    def _reduced(self, S: Tensor) -> Tensor:
        """The part of a Gram matrix that the normal equations in the Lie algebra see."""
        if isinstance(self.group, RotaryCommutant):
            return self.group.algebra_projection(S)
        if isinstance(self.group, RotaryPhases):
            return self.group.commutant.algebra_projection(S)
        if isinstance(self.group, StabilizerOfOnes):
            S = S - S.mean(dim=-1, keepdim=True)
            return S - S.mean(dim=-2, keepdim=True)
        return S


def _sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """The smallest Y with ``P Y + Y Q = C`` for positive semidefinite P and Q."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p.unsqueeze(-1) + q.unsqueeze(-2)
    floor = P.shape[-1] * torch.finfo(P.dtype).eps * sums.amax(dim=(-2, -1), keepdim=True)
    solvable = sums > floor
    rotated = U.mT @ C @ V
    rotated = torch.where(solvable, rotated / torch.where(solvable, sums, 1), 0)
    return U @ rotated @ V.mT


def _log_ratio(S_A: Tensor, S_B: Tensor) -> Tensor:
    return torch.linalg.slogdet(S_A).logabsdet - torch.linalg.slogdet(S_B).logabsdet


def _plane_lengths(group: RotaryCommutant, X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(group.complex_rows(wide(X)), dim=-1)


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
        With one :func:`~quotientopt.symmetries.pairs.shape_key`.
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
