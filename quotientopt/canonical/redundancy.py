"""How many of a model's parameters are gauge: counts per layer and in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from quotientopt.canonical.reading import symmetries_of
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL

REST = "outside the layers"


@dataclass(frozen=True)
class Count:
    """Parameters, and how many directions among them are gauge.

    Attributes
    ----------
    parameters : int
        Numbers stored; shared ones count once.
    redundant : int
        Dimension of the group that acts on them.
    """

    parameters: int
    redundant: int

    @property
    def dimension(self) -> int:
        """Dimension of the quotient, ``parameters − redundant``, at weights of full rank."""
        return self.parameters - self.redundant


@dataclass(frozen=True)
class Redundancy:
    """Counts of a model.

    Attributes
    ----------
    layers : dict of str to Count
        By layer, such as ``"blocks.0"``; parameters of no layer under ``"outside the layers"``.
        Groups of head pairs count in the layer of their first block.
    residual : int
        Dimension of the residual stream's group, d(d − 1)/2 where O(d) is exact, 0 where the
        stream has no symmetry: it belongs to no layer.
    total : Count
        Of the whole model, `residual` included.
    """

    layers: dict[str, Count]
    residual: int
    total: Count

    def __str__(self) -> str:
        rows = [(name, count) for name, count in self.layers.items()]
        if self.residual:
            rows.append((RESIDUAL, Count(0, self.residual)))
        rows.append(("total", self.total))
        width = max(len("layer"), *(len(name) for name, _ in rows))
        lines = [f"{'layer':<{width}}  {'parameters':>12}  {'redundant':>10}  {'dimension':>12}"]
        for name, count in rows:
            lines.append(
                f"{name:<{width}}  {count.parameters:>12,}  {count.redundant:>10,}  "
                f"{count.dimension:>12,}"
            )
        share = self.total.redundant / max(self.total.parameters, 1)
        return "\n".join([*lines, f"{share:.2%} of the parameters are gauge"])


def redundancy(
    model: nn.Module, *, symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None
) -> Redundancy:
    """Count parameters, gauge directions and the dimension of the quotient, per layer and in all.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.

    Returns
    -------
    Redundancy
        Prints as a table. Discrete symmetries (orders of heads, signs) have dimension zero.
    """
    symmetries = symmetries_of(model, symmetries)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        parameters[layer] = parameters.get(layer, 0) + parameter.numel()
    counts = symmetries.redundancy()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    redundant: dict[str, int] = {}
    for symmetry in symmetries.heads:
        layer = layer_of(names[id(symmetry.blocks[0].parameter)])
        redundant[layer] = redundant.get(layer, 0) + counts[symmetry.name]
    layers = {layer: Count(count, redundant.get(layer, 0)) for layer, count in parameters.items()}
    # Layers in their order, what belongs to none last.
    if REST in layers:
        layers[REST] = layers.pop(REST)
    total = Count(sum(parameters.values()), counts["total"])
    return Redundancy(layers, counts.get(RESIDUAL, 0), total)


def layer_of(name: str) -> str:
    """``"blocks.0"`` of ``"blocks.0.attention.query.weight"``: up to the first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return REST
