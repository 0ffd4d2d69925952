"""How many of a model's parameters are gauge: counts per layer, per kind and in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quotientopt.canonical.reading import symmetries_of
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.census import KINDS, ROTATIONS
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION

REST = "outside the layers"
_SHOWN = 3


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
