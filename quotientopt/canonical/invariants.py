"""What a model's head pairs compute: the invariants of their orbits, kept as thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import compute_dtype, outside_autocast, wide
from quotientopt.canonical.compact import is_compact, joint
from quotientopt.canonical.convention import without_unseen_rows
from quotientopt.canonical.elements import elements_of
from quotientopt.canonical.outside import effective_shifts
from quotientopt.canonical.reading import (
    factor,
    of_unit_length,
    query_groups,
    right_factor,
    symmetries_of,
)
from quotientopt.groups import (
    GL,
    O,
    PlaneCommutant,
    RotaryCommutant,
    RotaryPhases,
    Scale,
    StructureGroup,
)
from quotientopt.manifolds import FactorQuotient, GramQuotient
from quotientopt.symmetries import HeadSymmetry, SymmetryMap


@dataclass(frozen=True, eq=False)
class FactoredInvariant:
    """AᵀB of every query head, as its factors in the SVD section.

    With grouped queries several query heads read one key-value head: query head q belongs to the
    right factor ``q // (query heads / heads)``, the order of torch's ``enable_gqa``. Biases are the
    last columns, but for those that may be translated, which no model sees: that of the keys is
    left out, that of the values is in `effective_bias`. Hidden units are heads of one row each.

    Attributes
    ----------
    name : str
    group : StructureGroup
    left : Tensor
        A, shape ``(query heads, r, n)``.
    right : Tensor
        B, shape ``(heads, r, m)``. Over the query heads of one key-value head, ``Σ A Aᵀ = B Bᵀ``:
        diagonal under GL(r), of equal length row by row on rotary planes; not under compact groups.
    effective_bias : Tensor, optional
        ``β = b_O + Σ_h W_O b_V`` of a value-output pair, ``(d,)``, where the values' bias may be
        translated into the output's.
    """

    name: str
    group: StructureGroup
    left: Tensor
    right: Tensor
    effective_bias: Tensor | None = None

    @property
    @outside_autocast()
    def singular_values(self) -> Tensor:
        """Those of AᵀB, ``(query heads, r)``, in decreasing order, from r×r matrices.

        For a rotary commutant ``|a| |b|`` of every plane, in the order of the planes, then the
        singular values of the passing rows, of planes that share a frequency those of ``aᴴ b``;
        for compact groups those of [A B].
        """
        left, right = self.left, self._shared()
        if is_compact(self.group):
            return torch.linalg.svdvals(_triangular(joint((left, right))))
        if self.group.r == 1:
            return torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
        if isinstance(self.group, PlaneCommutant):
            (rows, own), (others, other) = (self.group.complex_rows(X) for X in (left, right))
            pairs = zip(rows, others, strict=True)
            found = [product_singular_values(x, y).flatten(1) for x, y in pairs]
            return torch.cat((*found, product_singular_values(own, other)), dim=-1)
        if not isinstance(self.group, RotaryCommutant):
            return product_singular_values(left, right)
        a, b = self.planes
        values = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
        start = self.group.rotary_dim
        passing = product_singular_values(left[:, start:], right[:, start:])
        return torch.cat((values, passing), dim=-1)

    @property
    def planes(self) -> tuple[Tensor, Tensor]:
        """Complex rows a and b of the rotary planes, ``(query heads, planes, n)`` and m.

        The invariant of a plane is the rank-one matrix ``aᴴ b``: its real part is the plane's share
        of AᵀB, its imaginary part what a rotation by the relative position mixes in. Of planes that
        share a frequency it is the sum of them.

        Raises
        ------
        ValueError
            If no rows are rotated.
        """
        if isinstance(self.group, PlaneCommutant):
            rows = (self.group.complex_rows(X)[0] for X in (self.left, self._shared()))
            a, b = (torch.cat([x.flatten(1, 2) for x in own], dim=1) for own in rows)
            return a, b
        if not isinstance(self.group, RotaryCommutant):
            raise ValueError(f"{self.name!r} has no rotary planes, its group is {self.group!r}")
        return self.group.complex_rows(self.left), self.group.complex_rows(self._shared())

    @outside_autocast()
    def dense(self) -> Tensor:
        """The invariants written out, for inspection: n×m matrices for every query head.

        Shapes as of :meth:`FactorQuotient.canonical_projection`: ``(query heads, n, m)`` for GL(r),
        ``(query heads, K, n, m)`` for a rotary commutant (real parts of all planes, imaginary
        parts, passing rows), ``(query heads, n + m, n + m)`` for O(r), with a further column under
        its stabiliser of ones (:meth:`GramQuotient.canonical_projection`); for the phases of rotary
        planes those of the commutant, of the pair ([A B], [A B]). Of planes that share a frequency
        the parts are summed. Positive scales of hidden units
        are not told from GL(1): the signs are in the factors alone.
        """
        left, right = self.left, self._shared()
        if isinstance(self.group, O):
            X = joint((left, right)).mT
            tokens = GramQuotient(
                *X.shape[-2:], stabilizer=self.group, batch_shape=X.shape[:1], check=False
            )
            return tokens.canonical_projection(wide(X)).to(X.dtype)
        group = self.group
        if isinstance(group, RotaryPhases):
            group, left = group.commutant, joint((left, right))
            right = left
        if isinstance(group, Scale):
            group = GL(group.r)
        if isinstance(group, PlaneCommutant):
            return _frequency_by_frequency(group, left, right)
        manifold = FactorQuotient(
            self.group.r,
            left.shape[-1],
            right.shape[-1],
            group=group,
            batch_shape=left.shape[:1],
            check=False,
        )
        return manifold.canonical_projection((wide(left), wide(right))).to(left.dtype)

    def _shared(self) -> Tensor:
        """The right factor of every query head."""
        return self.right.repeat_interleave(len(self.left) // len(self.right), dim=0)

    def __repr__(self) -> str:
        queries, _, n = self.left.shape
        return (
            f"FactoredInvariant({self.name!r}, {self.group!r}, query heads={queries}, "
            f"n={n}, m={self.right.shape[-1]})"
        )


def _frequency_by_frequency(group: PlaneCommutant, left: Tensor, right: Tensor) -> Tensor:
    """Real parts of ``aᴴ b`` of all frequencies, imaginary parts, and the passing rows'."""
    (a, own), (b, other) = (group.complex_rows(X) for X in (left, right))
    found = [x.mH @ y for x, y in zip(a, b, strict=True)]
    passing = [(own.mT @ other).unsqueeze(1)] if group.pass_rows else []
    return torch.cat([*(z.real for z in found), *(z.imag for z in found), *passing], dim=1)


def product_singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of AᴴB, ``(*batch, r)``, from the triangular factors of both.

    With ``Aᴴ = Q_A R_A`` and ``Bᴴ = Q_B R_B`` they are those of ``R_A R_Bᴴ``; a Gram matrix would
    lose half the digits of the small ones. Any rank is fine.
    """
    R_A, R_B = (_triangular(X) for X in (A, B))
    if not A.is_complex():
        R_A, R_B = wide(R_A), wide(R_B)
    return torch.linalg.svdvals((R_A @ R_B.mH).to(A.dtype))


def _triangular(X: Tensor) -> Tensor:
    return torch.linalg.qr(X.mH, mode="r").R


@torch.no_grad()
@outside_autocast()
def invariants(
    model: nn.Module,
    *,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    example_inputs: Any = None,
) -> dict[str, FactoredInvariant]:
    """The invariants of a model's factor pairs: what of their weights the model can see.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.
    example_inputs : Tensor, tuple or mapping, optional
        A batch, from which symmetries are found that the classes of the modules do not tell.

    Returns
    -------
    dict of str to FactoredInvariant
        By symmetry name; copies, in at least float32. Two gauges of one model have the same. At
        deficient rank what AᵀB does not see is left out: rows of zeros come last in both factors,
        a form that no group element may lead to (:func:`quotientopt.sections.section`).

    Raises
    ------
    ValueError
        If a pair is not finite; it is named.
    """
    symmetries = symmetries_of(model, symmetries, example_inputs)
    view = of_unit_length(symmetries)
    elements = elements_of(symmetries, "svd", view)
    shifts = effective_shifts(symmetries)
    found = {}
    for symmetry in symmetries.pairs:
        g, contragredient, _ = elements[symmetry.name]
        dtype = compute_dtype(symmetry.blocks[0].parameter.dtype)
        groups = [contragredient @ factor(blocks, view) for blocks in query_groups(symmetry)]
        left, right = without_unseen_rows(
            symmetry.group, torch.stack(groups, dim=1), g @ right_factor(symmetry, view)
        )
        bias = None
        if symmetry.translation is not None and symmetry.translation.sink is not None:
            sink = symmetry.translation.sink
            effective = wide(sink.parameter.detach()) + shifts[id(sink.parameter)]
            bias = sink.view(effective).flatten().to(dtype)
        found[symmetry.name] = FactoredInvariant(
            symmetry.name, symmetry.group, left.flatten(0, 1).to(dtype), right.to(dtype), bias
        )
    return found
