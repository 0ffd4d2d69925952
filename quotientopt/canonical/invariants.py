"""What a model sees of its weights: the invariants of its pairs. And how much it does not.

In reading order: :func:`invariants` of orbits, kept as thin factors (:class:`FactoredInvariant`),
and how many parameters are gauge, per layer, per kind and in all (:func:`redundancy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import (
    Pair,
    compute_dtype,
    outside_autocast,
    wide,
)
from quotientopt.canonical.elements import elements_of
from quotientopt.canonical.reading import (
    effective_shifts,
    factor,
    is_compact,
    joint,
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
from quotientopt.symmetries.census import KINDS, ROTATIONS
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION

_BALANCED = 1e-6
REST = "outside the layers"
_SHOWN = 3


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


def without_unseen_rows(group: StructureGroup, left: Tensor, right: Tensor) -> Pair:
    """Factors in the SVD section without the rows that ``Aᵀ B`` does not see.

    Rows that it sees are equally long on both sides; the others have a partner of zeros.

    Parameters
    ----------
    group : StructureGroup
    left, right : Tensor
        ``(heads, query heads of one, r, n)`` and ``(heads, r, m)``.
    """
    if is_compact(group):
        return left, right
    one = torch.linalg.vector_norm(left, dim=(-3, -1))
    two = torch.linalg.vector_norm(right, dim=-1)
    if isinstance(group, RotaryCommutant | PlaneCommutant):
        for plane in group.planes:
            for lengths in (one, two):
                rows = list(plane)
                lengths[:, rows] = torch.linalg.vector_norm(lengths[:, rows], dim=-1, keepdim=True)
    unequal = torch.minimum(one, two) <= _BALANCED * torch.maximum(one, two)
    unseen = unequal.unsqueeze(-1)
    return torch.where(unseen.unsqueeze(-3), 0, left), torch.where(unseen, 0, right)


@dataclass(frozen=True)
class Count:
    """Parameters, and how many directions among them are gauge.

    Attributes
    ----------
    parameters : int
        Numbers stored; shared ones count once.
    redundant : int
        Dimension of the orbit of the group that acts on them.
    """

    parameters: int
    redundant: int

    @property
    def dimension(self) -> int:
        """Dimension of the quotient, ``parameters − redundant``."""
        return self.parameters - self.redundant


@dataclass(frozen=True)
class Redundancy:
    """Counts of a model.

    Attributes
    ----------
    layers : dict of str to Count
        By layer, such as ``"blocks.0"``; parameters of no layer under ``"outside the layers"``.
        Directions count in the layer of their first parameter.
    residual : int
        Dimension of the residual stream's rotations, d(d − 1)/2 where O(d) is exact or becomes so
        by folding norms, 0 where the stream has no symmetry: it belongs to no layer.
    total : Count
        Of the whole model, `residual` included.
    kinds : dict of str to int
        Directions by kind: those of heads, translations of biases, gains of norms, …
    unknown : tuple of str
        What was not understood, so that nothing is counted there.
    """

    layers: dict[str, Count]
    residual: int
    total: Count
    kinds: dict[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [(name, count) for name, count in self.layers.items()]
        if self.residual:
            rows.append((RESIDUAL, Count(0, self.residual)))
        rows.append(("total", self.total))
        width = max(
            len("layer"), *(len(name) for name in [name for name, _ in rows] + [*self.kinds])
        )
        lines = [f"{'layer':<{width}}  {'parameters':>12}  {'redundant':>10}  {'dimension':>12}"]
        for name, count in rows:
            lines.append(
                f"{name:<{width}}  {count.parameters:>12,}  {count.redundant:>10,}  "
                f"{count.dimension:>12,}"
            )
        if self.kinds:
            lines += ["", f"{'kind':<{width}}  {'':>12}  {'redundant':>10}"]
            lines += [f"{name:<{width}}  {'':>12}  {n:>10,}" for name, n in self.kinds.items()]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        """The share that is gauge, and what was not understood."""
        unknown = ", ".join(self.unknown[:_SHOWN])
        if len(self.unknown) > _SHOWN:
            unknown += f" and {len(self.unknown) - _SHOWN} more"
        if not self.total.redundant:
            if not unknown:
                return "no parameter is gauge"
            return f"how many parameters are gauge is not known, not understood: {unknown}"
        share = f"{self.total.redundant / max(self.total.parameters, 1):.2%} of the parameters"
        if not unknown:
            return f"{share} are gauge"
        return f"at least {share} are gauge; not understood: {unknown}"


def redundancy(
    model: nn.Module,
    *,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    example_inputs: Any = None,
) -> Redundancy:
    """Count parameters, gauge directions and the dimension of the quotient, per layer and in all.

    The census of :meth:`SymmetryMap.redundancy`: at weights in general position the total is the
    dimension of the null space of the derivative of all outputs with respect to all weights.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.
    example_inputs : Tensor, tuple or mapping, optional
        A batch, from which symmetries are found that the classes of the modules do not tell.

    Returns
    -------
    Redundancy
        Prints as a table. Discrete symmetries (orders of heads, signs) have dimension zero.
    """
    symmetries = symmetries_of(model, symmetries, example_inputs)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        parameters[layer] = parameters.get(layer, 0) + parameter.numel()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    firsts = {s.name: names[id(s.blocks[0].parameter)] for s in symmetries.linear}
    redundant: dict[str, int] = {}
    kinds = dict.fromkeys(KINDS, 0)
    directions = symmetries.directions()
    for direction in directions:
        kinds[direction.kind] += direction.count
        if direction.kind != ROTATIONS:
            name = direction.name
            layer = layer_of(firsts.get(name.removesuffix(TRANSLATION), name))
            redundant[layer] = redundant.get(layer, 0) + direction.count
    layers = {layer: Count(count, redundant.get(layer, 0)) for layer, count in parameters.items()}
    # Layers in their order, what belongs to none last.
    if REST in layers:
        layers[REST] = layers.pop(REST)
    total = Count(sum(parameters.values()), sum(direction.count for direction in directions))
    return Redundancy(
        layers,
        kinds[ROTATIONS],
        total,
        {kind: count for kind, count in kinds.items() if count},
        _unknown(model, symmetries, total.redundant),
    )


def _unknown(model: nn.Module, symmetries: SymmetryMap, redundant: int) -> tuple[str, ...]:
    """Attentions that are not understood, and why the stream is not."""
    unknown = list(symmetries.unrecognized)
    if not symmetries.gauge_free or redundant:
        unknown += symmetries.further.uncounted
    if not unknown and not redundant and not symmetries.gauge_free:
        unknown.append(f"{type(model).__name__} ({symmetries.residual_reason or 'no symmetry'})")
    return tuple(dict.fromkeys(unknown))


def layer_of(name: str) -> str:
    """``"blocks.0"`` of ``"blocks.0.attention.query.weight"``: up to the first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return REST
