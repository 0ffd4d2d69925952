"""The symmetries of a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast
from quotientopt.symmetries import census
from quotientopt.symmetries.block import Block, HeadBlocks, any_sharded, refuse_values
from quotientopt.symmetries.census import Direction, Further
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry, head_blocks
from quotientopt.symmetries.orbits import length_dimension, orbit_dimension, rotation_dimension
from quotientopt.symmetries.registry import plain
from quotientopt.symmetries.residual import ResidualStream
from quotientopt.symmetries.verification import (
    deviations,
    require_same_model,
    unchanged_outputs,
)

RESIDUAL = "residual"
# After the name of a head symmetry: its translations, elements of shape (heads, r).
TRANSLATION = ".translation"


class SymmetryMap:
    """What :func:`quotientopt.find_symmetries` knows about a model.

    Parameters
    ----------
    heads : sequence of HeadSymmetry
        Symmetries of the attention heads, with distinct names.
    residual : ResidualStream, optional
        The residual stream, if it was recognised.
    residual_reason : str
        Why ``residual`` is None.
    unrecognized : sequence of str
        Names of attention modules that are not understood. They have no head frames.
    gauge_free : sequence of str
        Names of attention modules that hold or read invariants: no group acts on their heads.
    hidden_units : sequence of HeadSymmetry
        Scales of hidden units of gated and ReLU MLPs: pairs with r = 1, one "head" per unit, the
        left factor the columns of the matrix that reads the units, the right factor the rows (and
        bias) of the one that writes them.
    scales : sequence of ScaleSymmetry
        Lengths of normalised queries and keys.
    left_alone : mapping of str to str
        Name of a pair on which no group acts to what stands in the way.
    not_exercised : sequence of str
        Names of modules that the example inputs did not reach, and of parameters that did not fit
        into memory: nothing is known of them.
    overlapping : sequence of str
        Names and groups of pairs that are exact as well, on weights of those listed.
    further : Further
        Gauge directions that none of these acts along, for :meth:`redundancy` alone.

    Notes
    -----
    A group element of the whole model is a mapping from symmetry name to a tensor:
    ``(heads, r, r)`` per head symmetry; under its name with ``".translation"`` appended ``(heads,
    r)`` where a bias may be translated; ``(units, 1, 1)`` per scale; under ``"residual"``, an
    orthogonal ``(d, d)``. Linear parts act before translations.
    """

    def __init__(
        self,
        heads: Sequence[HeadSymmetry] = (),
        residual: ResidualStream | None = None,
        *,
        residual_reason: str = "",
        unrecognized: Sequence[str] = (),
        gauge_free: Sequence[str] = (),
        hidden_units: Sequence[HeadSymmetry] = (),
        scales: Sequence[ScaleSymmetry] = (),
        not_exercised: Sequence[str] = (),
        overlapping: Sequence[str] = (),
        left_alone: Mapping[str, str] | None = None,
        further: Further | None = None,
    ) -> None:
        self.heads = tuple(heads)
        self.hidden_units = tuple(hidden_units)
        self.scales = tuple(scales)
        self.not_exercised = tuple(not_exercised)
        self.overlapping = tuple(overlapping)
        self.left_alone = dict(left_alone or {})
        self.residual = residual
        self.residual_reason = residual_reason
        self.further = Further() if further is None else further
        self.unrecognized = tuple(unrecognized)
        self.gauge_free = tuple(gauge_free)
        names = [*(pair.name for pair in self.pairs), *(scale.name for scale in self.scales)]
        if len(set(names)) != len(names):
            raise ValueError(f"two head symmetries share a name: {sorted(names)}")

    @property
    def pairs(self) -> tuple[HeadSymmetry, ...]:
        """All factor pairs: those of heads, then those of hidden units."""
        return self.heads + self.hidden_units

    @property
    def linear(self) -> tuple[HeadSymmetry | ScaleSymmetry, ...]:
        """All but the translations and the residual stream: the pairs, then the scales."""
        return (*self.pairs, *self.scales)

    @property
    def names(self) -> tuple[str, ...]:
        """What a group element of the model may name; ``"residual"`` also where O(d) is broken."""
        translated = [symmetry.name + TRANSLATION for symmetry in self._translated()]
        residual = [] if self.residual is None else [RESIDUAL]
        return (*self._actors(), *translated, *residual)

    def parameters_of(self, name: str) -> list[Tensor]:
        """The parameters that the symmetry of that name (as in a group element) acts on."""
        if name == RESIDUAL and self.residual is not None:
            return list(self.residual.parameters.values())
        symmetry = self._actors()[name.removesuffix(TRANSLATION)]
        if not name.endswith(TRANSLATION):
            return [block.parameter for block in symmetry.blocks]
        translation = getattr(symmetry, "translation", None)
        assert translation is not None, name
        sink = () if translation.sink is None else (translation.sink,)
        return [block.parameter for block in (*translation.blocks, *sink)]

    def _actors(self) -> dict[str, HeadSymmetry | ScaleSymmetry]:
        return {symmetry.name: symmetry for symmetry in self.linear}

    @torch.no_grad()
    def directions(self) -> tuple[Direction, ...]:
        """The gauge directions of the model as it is, kind by kind.

        Of every group the dimension of the orbit, which is that of the group where pairs have full
        rank; then what :mod:`quotientopt.symmetries.census` counts around norms and embeddings.
        """
        further = self.further
        means = [parameter for found in further.directions for parameter in found.parameters]
        found = [Direction(census.HEADS, s.name, orbit_dimension(s, means)) for s in self.heads]
        found += [
            Direction(census.TRANSLATIONS, s.name + TRANSLATION, s.heads * s.rank)
            for s in self._translated()
        ]
        found += [Direction(census.UNITS, s.name, orbit_dimension(s)) for s in self.hidden_units]
        found += [
            Direction(census.LENGTHS, scale.name, length_dimension(scale)) for scale in self.scales
        ]
        stream = self.residual
        if stream is not None and (stream.group is not None or further.rotations):
            group, full, centred = stream.group, further.rotations, further.centred
            if group is not None:
                full, centred = group.dim, stream.broken_by != ()
            axes = [(stream.parameters[name], axis) for name, axis in stream.axes.items()]
            count = rotation_dimension(axes, centred, full)
            found.append(Direction(census.ROTATIONS, RESIDUAL, count))
        return (*found, *further.directions)

    def units_as_heads(self) -> SymmetryMap:
        """The same symmetries with the hidden units among the heads."""
        return self._with(heads=self.pairs, hidden_units=())

    def on(self, parameters: Mapping[int, Tensor]) -> SymmetryMap:
        """The same symmetries on other parameters of the same shapes and strides.

        Parameters
        ----------
        parameters : mapping of int to Tensor
            ``id`` of a parameter to the one that takes its place; others stay.
        """

        def moved(tensor: Tensor) -> Tensor:
            return parameters.get(id(tensor), tensor)

        def change(block: Block) -> Block:
            return replace(block, parameter=moved(block.parameter))

        stream = self.residual
        if stream is not None:
            own = {name: moved(parameter) for name, parameter in stream.parameters.items()}
            stream = replace(stream, parameters=own)
        directions = [
            replace(found, parameters=tuple(map(moved, found.parameters)))
            for found in self.further.directions
        ]
        return self._with(
            heads=[symmetry.with_blocks(change) for symmetry in self.heads],
            residual=stream,
            hidden_units=[symmetry.with_blocks(change) for symmetry in self.hidden_units],
            scales=[
                ScaleSymmetry([change(b) for b in scale.blocks], scale.name, source=scale.source)
                for scale in self.scales
            ],
            further=replace(self.further, directions=tuple(directions)),
        )

    def _with(self, **changes: Any) -> SymmetryMap:
        """The same map but for some arguments."""
        given = {name: getattr(self, name) for name in inspect.signature(SymmetryMap).parameters}
        return SymmetryMap(**{**given, **changes})

    def within(self, parameters: Iterable[Tensor]) -> SymmetryMap:
        """The symmetries of heads and the part of the stream on some parameters alone.

        Raises
        ------
        ValueError
            If a pair has one factor among them and the other elsewhere.
        """
        own = {id(parameter) for parameter in parameters}
        heads = []
        for symmetry in self.heads:
            inside = [id(block.parameter) in own for block in symmetry.blocks]
            if all(inside):
                heads.append(symmetry)
            elif any(inside):
                names = [block.name for block in symmetry.blocks]
                raise ValueError(
                    f"symmetry {symmetry.name!r}: {names[inside.index(True)]!r} is among the "
                    f"parameters, {names[inside.index(False)]!r} is not"
                )
        stream = self.residual
        if stream is not None:
            names = [name for name, p in stream.parameters.items() if id(p) in own]
            stream = replace(
                stream,
                axes={name: stream.axes[name] for name in names},
                parameters={name: stream.parameters[name] for name in names},
            )
        nothing = dict.fromkeys(("hidden_units", "scales", "not_exercised", "overlapping"), ())
        return self._with(heads=heads, residual=stream, further=None, **nothing)

    def for_model(self, model: nn.Module) -> SymmetryMap:
        """The same symmetries on the parameters of the same names of another copy of the model.

        For symmetries that are found from example inputs, which takes whole parameters: find them,
        shard the model with ``fully_shard``, and pass ``symmetries.for_model(model)``.

        Raises
        ------
        ValueError
            If the model has no parameter of a name, or one of another shape.
        """
        named = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        found: dict[int, Tensor] = {}
        owned = [block for symmetry in self.linear for block in symmetry.blocks]
        owned += [sink for s in self._translated() for sink in s._sinks()]
        used = [(block.name, block.parameter) for block in owned]
        used += [] if self.residual is None else list(self.residual.parameters.items())
        for name, parameter in used:
            other = named.get(plain(name))
            if other is None or other.shape != parameter.shape:
                shape = "no such parameter" if other is None else f"shape {tuple(other.shape)}"
                raise ValueError(
                    f"the symmetries act on {name!r} of shape {tuple(parameter.shape)}, and the "
                    f"model has {shape}: they belong to another model"
                )
            found[id(parameter)] = other
        return self.on(found)

    def head_blocks(self) -> list[HeadBlocks]:
        """Views ``(heads, r, n)`` of every query, key, value and output matrix of an attention.

        For optimizers that work head by head, whatever the layout: fused, grouped, transposed. See
        :class:`~quotientopt.symmetries.block.HeadBlocks`.

        Examples
        --------
        >>> for heads in symmetries.head_blocks():  # doctest: +SKIP
        ...     update = heads.block.view(momentum[heads.parameter])
        ...     update.copy_(orthogonalise(update))  # every head by itself
        """
        return head_blocks(self.heads)

    def redundancy(self) -> dict[str, int]:
        """Count the directions in parameter space along which the model computes the same.

        The census: at weights in general position the total is the dimension of the null space of
        the derivative of all outputs with respect to all weights, frozen ones included.

        Returns
        -------
        dict
            ``"<name>"``: dimension of the orbit under each symmetry's group (heads · dim G for
            pairs of full rank); ``"<name>.translation"``: heads · r; ``"residual"``: rotations of
            the residual stream, behind the gains of norms where :func:`quotientopt.fold_norms_`
            would make them exact, d(d − 1)/2, or (d − 1)(d − 2)/2 where it is centred;
            ``"<parameter> (<kind>)"`` for what no group here acts along; ``"total"``, their sum.
        """
        counts = {direction.key: direction.count for direction in self.directions()}
        return counts | {"total": sum(counts.values())}

    def random_element(
        self, cond: float = 10.0, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A random element of the model's structure group, float64 on the CPU.

        Parameters
        ----------
        cond : float
            Condition number of every head's element.
        generator : torch.Generator, optional
            Source of randomness.
        """
        element = {
            name: symmetry.random_element(cond, generator=generator)
            for name, symmetry in self._actors().items()
        }
        for symmetry in self._translated():
            translation = symmetry.random_translation(generator=generator)
            element[symmetry.name + TRANSLATION] = translation
        if self.residual is not None and self.residual.group is not None:
            element[RESIDUAL] = self.residual.group.random(generator=generator, dtype=torch.float64)
        return element

    @outside_autocast()
    def act_(
        self,
        element: Mapping[str, Tensor],
        *,
        model: nn.Module | None = None,
        example_inputs: Any = None,
    ) -> None:
        """Act on the model's parameters in place; symmetries not named stay as they are.

        Parameters
        ----------
        element : mapping of str to Tensor
        model : Module, optional
            The model these symmetries were found in, for `example_inputs`.
        example_inputs : Tensor, tuple or mapping, optional
            Arguments of the model: its outputs on them are compared before and after.

        Raises
        ------
        ValueError
            If a name is unknown, an element has the wrong shape or is not in its group, the
            symmetries are not those of `model`, or the outputs on `example_inputs` change. Nothing
            is changed then.
        """
        if model is not None:
            require_same_model(self, model)
        if example_inputs is not None:
            if model is None:
                raise ValueError(
                    "example_inputs needs the model that they are arguments of: model="
                )
            with unchanged_outputs(model, example_inputs, "this group element"):
                self.act_(element)
            return
        self.refuse_sharded()
        unknown = [name for name in element if name not in self.names]
        if unknown:
            raise ValueError(f"no symmetry called {unknown[0]!r}; known: {sorted(self.names)}")
        actors: dict[str, Any] = {RESIDUAL: self.residual, **self._actors()}
        translated = {symmetry.name + TRANSLATION: symmetry for symmetry in self._translated()}
        linear = [(actors[name], g) for name, g in element.items() if name not in translated]
        shifts = [(translated[name], t) for name, t in element.items() if name in translated]
        for actor, g in linear:
            actor.check_element(g)
            if isinstance(actor, HeadSymmetry):
                actor.refuse_overflow(g)
        for symmetry, t in shifts:
            symmetry.check_translation(t)
        for actor, g in linear:
            actor.act_(g)
        for symmetry, t in shifts:
            symmetry.translate_(t)

    def refuse_sharded(self) -> None:
        """Refuse what needs values of parameters that are sharded over processes (ValueError)."""
        for name in self.names:
            if any_sharded(self.parameters_of(name)):
                refuse_values(name)

    def _translated(self) -> list[HeadSymmetry]:
        """The head symmetries with an affine part."""
        return [symmetry for symmetry in self.heads if symmetry.translation is not None]

    def verify(
        self,
        model: nn.Module,
        *inputs: Any,
        cond: float = 10.0,
        generator: torch.Generator | None = None,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> dict[str, float]:
        """Act with random group elements and compare the model's outputs in float64.

        Parameters
        ----------
        model : Module
            The model these symmetries were found in.
        *inputs, **kwargs
            Passed to the model; floating-point tensors are cast to float64.
        cond : float
            Condition number of the random elements.
        generator : torch.Generator, optional
            Source of randomness; a fixed seed by default.
        train_mode : bool
            Run in training mode, with the same dropout masks throughout, instead of in evaluation
            mode. What is called exact is so in evaluation: dropout on the residual stream breaks
            O(d), on attention weights the translations of value biases.

        Returns
        -------
        dict
            Symmetry name to the largest deviation of an output, relative to the largest output; NaN
            where the outputs do not depend on what a symmetry acts on, so that nothing is verified.
            The parameters and buffers are restored bit for bit.
        """
        return deviations(
            self, model, inputs, kwargs, cond=cond, generator=generator, train_mode=train_mode
        )

    def __str__(self) -> str:
        header = ("symmetry", "group", "heads", "left", "right", "redundant", "known by")
        rows: list[tuple[str, ...]] = [header if self.pairs else ("no head symmetries",)]
        for symmetry in self.pairs:
            affine = symmetry.rank if symmetry.translation is not None else 0
            group = f"{symmetry.group} ⋉ R^{affine}" if affine else str(symmetry.group)
            sides = map(_columns, (symmetry.left_blocks, symmetry.right_blocks))
            count = str(symmetry.heads * (symmetry.group.dim + affine))
            rows.append((symmetry.name, group, str(symmetry.heads), *sides, count, symmetry.source))
        for scale in self.scales:
            name, heads = scale.name, str(scale.heads)
            rows.append(
                (name, str(scale.group), heads, _columns(scale.blocks), "", heads, scale.source)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        none = f"none, {self.residual_reason or 'not looked for'}"
        stream = none if self.residual is None else self.residual.summary()
        lines.append(f"residual stream: {stream}")
        if self.gauge_free:
            lines.append("heads without a gauge, plain Adam: " + ", ".join(self.gauge_free))
        if self.overlapping:
            lines.append("exact too, on the same weights: " + ", ".join(self.overlapping))
        for why in dict.fromkeys(self.left_alone.values()):
            first, *more = [name for name, reason in self.left_alone.items() if reason == why]
            others = f" and {len(more)} more" if more else ""
            lines.append(f"left alone: {first}{others}, {why}")
        if self.not_exercised:
            lines.append("not exercised by the example inputs: " + ", ".join(self.not_exercised))
        if self.unrecognized:
            lines.append("not understood, without head frames: " + ", ".join(self.unrecognized))
        return "\n".join(lines)


def _columns(blocks: Iterable[Block]) -> str:
    return " + ".join(str(block.size[2]) for block in blocks)
