"""The parameters of an :class:`InvariantAttention`: two points, as pairs or as coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt._linalg import Pair, standard_normal, wide
from quotientopt.canonical import dress_
from quotientopt.canonical.elements import SectionKind
from quotientopt.manifolds import FactorQuotient
from quotientopt.nn.invariant_chart import ChartLinear, condition, to_chart, to_rotary_chart
from quotientopt.nn.invariant_conversion import Matrices, Shape
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, find_symmetries

FIXED_RANK, CHART = "fixed-rank", "chart"
SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


class InvariantPoints(nn.Module):
    """The points G_QK and G_VO of an attention; base class of :class:`InvariantAttention`.

    Attributes
    ----------
    query, key, value, output : nn.Linear
        The representative; in the chart `key` and `value` are ``ChartLinear``.
    shape : Shape
        Sizes and settings.
    """

    def _build(
        self,
        shape: Shape,
        parametrization: str,
        section: str,
        chart_scale: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the modules; nothing is written to their parameters."""
        if parametrization not in (FIXED_RANK, CHART):
            raise ValueError(
                f"parametrization must be {FIXED_RANK!r} or {CHART!r}, got {parametrization!r}"
            )
        if section not in SECTIONS:
            raise ValueError(f"section must be one of {SECTIONS}, got {section!r}")
        if chart_scale is not None and not 0 < chart_scale < math.inf:
            raise ValueError(f"chart_scale must be a positive number, got {chart_scale}")
        super().__init__()
        self.shape = shape
        self.parametrization = parametrization
        self.section = section
        self.chart_scale = chart_scale
        self.came_from: str | None = None
        rows, shared_rows = (
            count * shape.head_width for count in (shape.heads, shape.key_value_heads)
        )
        device = torch.get_default_device() if device is None else torch.device(device)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.utils.skip_init(
                nn.Linear, inputs, outputs, bias=bias, device=device, dtype=dtype
            )

        def right(inputs: int, bias: bool, rotary: bool = False) -> nn.Linear | ChartLinear:
            if parametrization == FIXED_RANK:
                return linear(inputs, shared_rows, bias)
            sizes = (inputs, shape.key_value_heads, shape.head_width, bias)
            return ChartLinear(*sizes, rotary=rotary, device=device, dtype=dtype)

        self.query = linear(shape.width, rows, shape.bias)
        self.key = right(shape.key_width, shape.key_bias, shape.rotary)
        self.value = right(shape.value_width, shape.value_bias)
        self.output = linear(rows, shape.width, shape.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new points: normal weights of standard deviation 1 / √fan_in, biases zero.

        Parameters
        ----------
        generator : torch.Generator, optional
            Default: the global generator.
        """
        device = self.query.weight.device
        if device.type == "meta":
            return
        matrices = []
        for rows, columns, fan_in in self.shape.matrix_sizes():
            weight = standard_normal((rows, columns), generator=generator, device=device)
            matrices.append(weight / fan_in**0.5)
        biases = (self.shape.bias, self.shape.key_bias, self.shape.value_bias)
        matrices[:3] = [
            functional.pad(matrix, (0, 1)) if bias else matrix
            for matrix, bias in zip(matrices[:3], biases, strict=True)
        ]
        output_bias = matrices[0].new_zeros(self.shape.width) if self.shape.bias else None
        query, key, value, output = matrices
        self._set_points(Matrices(query, key, value, output, output_bias))

    # ---- points --------------------------------------------------------------------------------

    def manifolds(self) -> dict[str, FactorQuotient]:
        """The manifolds of both points, ``"qk"`` and ``"vo"``, key-value heads as batch."""
        rank, shared = self.shape.head_width, self.shape.key_value_heads
        groups = self.shape.groups()
        return {
            name: FactorQuotient(rank, n, m, group=groups[name], batch_shape=(shared,))
            for name, (n, m) in self.shape.columns().items()
        }

    @property
    def dim(self) -> int:
        """Dimension of both points together, over all key-value heads."""
        return sum(self.shape.key_value_heads * m.dim for m in self.manifolds().values())

    @torch.no_grad()
    def points(self) -> dict[str, Pair]:
        """The representatives (A, B) of ``"qk"`` and ``"vo"``, copied.

        ``(key_value_heads, r, n)`` and ``(key_value_heads, r, m)``, with a bias as last column of
        each head's block where it is seen.
        """
        pairs = self._read().pairs(self.shape)
        return {name: (A.clone(), B.clone()) for name, (A, B) in pairs.items()}

    def gradients(self) -> dict[str, Pair]:
        """Euclidean gradients (∂_A, ∂_B) at :meth:`points`, from ``.grad``; fixed-rank only.

        Raises
        ------
        ValueError
            In the chart, or if there are no gradients yet.
        """
        self._require_pair("gradients")
        parameters = list(self.parameters())
        if any(parameter.grad is None for parameter in parameters):
            raise ValueError("there are no gradients yet; call backward() first")
        gradients = self._read(gradients=True)
        return {
            name: (A.clone(), B.clone()) for name, (A, B) in gradients.pairs(self.shape).items()
        }

    @torch.no_grad()
    def retract_(
        self, steps: Mapping[str, Pair], *, second_order: bool = False, optimizer: Any = None
    ) -> None:
        """Move both points along tangent vectors at :meth:`points`, and dress them again.

        The fixed-rank retraction is ``(A + ξ_A, B + ξ_B)``, or that of second order for horizontal
        steps; then :meth:`to_section_`. It commutes with the group: Riemannian gradients, and other
        steps that move with the representative, reach the same points from all of them.

        Parameters
        ----------
        steps : mapping of str to tuple of Tensor
            ``"qk"``, ``"vo"`` or both, shaped like :meth:`points`.
        second_order : bool
            :meth:`quotientopt.manifolds.FactorQuotient.retract_second_order`.
        optimizer : optional
            Whose state moves along with the dressing.

        Raises
        ------
        ValueError
            In the chart, for unknown names or wrong shapes, or if a point loses its rank. Nothing
            is changed then.
        """
        self._require_pair("retract_")
        before, manifolds = self.points(), self.manifolds()
        unknown = sorted(set(steps) - set(before))
        if unknown:
            raise ValueError(f"no point called {unknown[0]!r}; there are 'qk' and 'vo'")
        moved = dict(before)
        for name, step in steps.items():
            manifold = manifolds[name]
            move = manifold.retract_second_order if second_order else manifold.retract
            moved[name] = move(before[name], step)
            manifold.check_point(moved[name])
        self._write(moved)
        try:
            self.to_section_(optimizer=optimizer)
        except (ValueError, TypeError):
            self._write(before)
            raise

    def to_section_(self, section: str | None = None, *, optimizer: Any = None) -> None:
        """Take both pairs back to a section of their orbits, in place; fixed-rank only.

        Parameters
        ----------
        section : str, optional
            Default: that of the module.
        optimizer : optional
            A QuotientAdam of this module or of a model around it: its state moves along.

        Raises
        ------
        TypeError
            If the optimizer's state cannot be moved (see :func:`quotientopt.dress_`).
        ValueError
            In the chart, or if a pair is rank-deficient. Nothing is changed then.
        """
        self._require_pair("to_section_")
        for name, (A, B) in self._read().pairs(self.shape).items():
            try:
                self._require_full_rank(name, A, B)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        redress_(self, self.section if section is None else section, optimizer)

    def chart_condition(self) -> dict[str, Tensor]:
        """``‖[I, F]‖₂`` of every head, ``"qk"`` and ``"vo"`` to ``(key_value_heads,)``; chart only.

        One over the smallest singular value of the chosen columns of an orthonormal basis of the
        rows of B: 1 in the middle of the chart, infinite on its boundary.
        """
        key, value = self._chart_layers("chart_condition")
        return {
            name: condition(layer.free.detach(), layer.columns, layer.scale)
            for name, layer in (("qk", key), ("vo", value))
        }

    @torch.no_grad()
    def rechart_(self, columns: Mapping[str, Tensor] | None = None) -> None:
        """Change to the best conditioned chart, or to that of the given columns; chart only.

        What the module computes stays the same. The state of an optimizer belongs to the old
        coordinates: make it anew.

        Parameters
        ----------
        columns : mapping of str to Tensor, optional
            As for :meth:`from_attention`.

        Raises
        ------
        ValueError
            Without a chart, for unknown names, or columns that make none. Nothing is changed then.
        """
        self._chart_layers("rechart_")
        if unknown := sorted(set(columns or {}) - set(self.manifolds())):
            raise ValueError(f"no point called {unknown[0]!r}; there are 'qk' and 'vo'")
        self._set_points(self._read(), columns)

    # ---- reading and writing the parameters ----------------------------------------------------

    def _require_pair(self, method: str) -> None:
        if isinstance(self.key, ChartLinear):
            raise ValueError(
                f"{method} moves pairs, and the chart holds none: its parameters are coordinates "
                "of the points; use parametrization='fixed-rank'"
            )

    def _chart_layers(self, method: str) -> tuple[ChartLinear, ChartLinear]:
        if not isinstance(self.key, ChartLinear) or not isinstance(self.value, ChartLinear):
            raise ValueError(f"{method} needs parametrization='chart', this is 'fixed-rank'")
        return self.key, self.value

    def _read(self, *, gradients: bool = False) -> Matrices:
        """Detached matrices of all heads, or the gradients in their place."""

        def value(parameter: Tensor) -> Tensor:
            chosen = parameter.grad if gradients else parameter
            assert chosen is not None
            return chosen.detach()

        def augmented(layer: nn.Linear | ChartLinear) -> Tensor:
            if isinstance(layer, ChartLinear):
                return layer.factor().detach().flatten(0, 1)
            if layer.bias is None:
                return value(layer.weight)
            return torch.cat((value(layer.weight), value(layer.bias)[:, None]), dim=1)

        bias = None if self.output.bias is None else value(self.output.bias)
        query, key, right = (augmented(layer) for layer in (self.query, self.key, self.value))
        return Matrices(query, key, right, value(self.output.weight).mT, bias)

    def _set_points(self, matrices: Matrices, columns: Mapping[str, Tensor] | None = None) -> None:
        """Write the points that ordinary weights stand for, and the output's bias."""
        pairs, charts = matrices.pairs(self.shape), {}
        dtype = self.query.weight.dtype
        for name, (A, B) in pairs.items():
            try:
                if self.parametrization == CHART:
                    coordinates = (
                        to_chart if name == "vo" or not self.shape.rotary else to_rotary_chart
                    )
                    charts[name] = coordinates(
                        A,
                        B,
                        (columns or {}).get(name),
                        scale=self.chart_scale,
                        dtype=dtype,
                        name=name,
                    )
                    pairs[name] = (charts[name].left, B)
                else:
                    self._require_full_rank(name, A, B)
                    manifold = self.manifolds()[name]
                    pairs[name] = manifold.section((wide(A), wide(B)), self.section)[0]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self._write(pairs, matrices.output_bias)
        for layer, chart in zip((self.key, self.value), charts.values(), strict=False):
            assert isinstance(layer, ChartLinear)
            layer.free.copy_(chart.free)
            layer.columns.copy_(chart.columns)
            layer.scale.copy_(chart.scale)

    def _require_full_rank(self, name: str, A: Tensor, B: Tensor) -> None:
        """Refuse pairs that are no points of fixed rank: the SVD section knows lower ranks too."""
        self.manifolds()[name].section((wide(A), wide(B)), "balanced")

    def _write(self, pairs: Mapping[str, Pair], output_bias: Tensor | None = None) -> None:
        matrices = Matrices.of_pairs(pairs, self.shape, output_bias)
        layers = (self.query, self.key, self.value)
        for layer, matrix in zip(layers, matrices[:3], strict=True):
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(matrix[:, : layer.in_features])
                if layer.bias is not None:
                    layer.bias.copy_(matrix[:, -1])
        self.output.weight.copy_(matrices.output.mT)
        if output_bias is not None:
            self.output.bias.copy_(output_bias)


def redress_(attention: nn.Module, section: str, optimizer: Any = None) -> None:
    """Take both pairs of an attention to a section, and the optimizer's state along.

    Parameters
    ----------
    attention : Module
    section : str
    optimizer : optional
        Of the attention or of a model around it; see :func:`quotientopt.dress_`.

    Raises
    ------
    TypeError
        If the optimizer's state cannot be moved.
    ValueError
        If the optimizer does not know the pairs, or they cannot be dressed. Nothing is changed
        then.
    """
    heads = find_symmetries(attention).heads
    known = getattr(optimizer, "symmetries", None)
    if isinstance(known, SymmetryMap):
        heads = tuple(symmetry for symmetry in known.heads if _lies_in(symmetry, attention))
        if len(heads) != 2:
            raise ValueError(
                f"{type(optimizer).__name__} does not know the pairs of this "
                f"{type(attention).__name__}; make it anew from the model that it trains"
            )
    kind = cast("SectionKind", section)  # dress_ refuses another one
    dress_(attention, kind, symmetries=SymmetryMap(heads), optimizer=optimizer)


def _lies_in(symmetry: HeadSymmetry, module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters()}
    return all(id(block.parameter) in own for block in symmetry.blocks)
