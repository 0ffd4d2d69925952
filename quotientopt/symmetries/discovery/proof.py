"""Proofs: a finite group element must leave the outputs alone, a larger group must move them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.groups import GL, O, RotaryPhases, Scale, StructureGroup
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.discovery.pairs import common_module
from quotientopt.symmetries.discovery.point import Call, GenericPoint
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry
from quotientopt.symmetries.verification import largest_deviation

COND = 5.0
# A proof deviates by at most this (or by what float32 inside the model leaves), a control by more.
PROVED, MOVED = 1e-9, 1e-6

Values = dict[str, Tensor]
Outputs = dict[str, Tensor]


class Prover:
    """Runs the smallest module around a symmetry's parameters, before and after acting.

    What does not change the outputs of a module inside a model does not change those of the model;
    only parameters used outside it need the whole, which :meth:`together` runs.

    Parameters
    ----------
    point : GenericPoint
    reference : dict of str to Tensor
        Outputs of the whole.
    precision : float
        Relative noise of the model's outputs.
    generator : torch.Generator
    """

    def __init__(
        self,
        point: GenericPoint,
        reference: Outputs,
        precision: float,
        generator: torch.Generator,
    ) -> None:
        self.point = point
        self.generator = generator
        self.proved = max(PROVED, precision)
        self.moved = max(MOVED, 100 * self.proved)
        self._whole = reference
        self._calls: dict[str, Call] = {}
        self._references: dict[str, Outputs | None] = {"": reference}
        # By name of a symmetry, the module whose outputs its element has left alone.
        self._places: dict[str, str] = {}
        self._last = ""

    def prepare(self, symmetries: Iterable[HeadSymmetry | ScaleSymmetry]) -> None:
        """Record the arguments of all modules that the proofs may run, in one run of the whole."""
        paths = {path: None for symmetry in symmetries for path in _outwards(symmetry) if path}
        self._calls |= self.point.calls([path for path in paths if path not in self._calls])

    def deviation(self, symmetry: HeadSymmetry | ScaleSymmetry) -> float:
        """Largest relative change of an output under a random element of the group."""
        element = symmetry.random_element(COND, generator=self.generator)
        if isinstance(symmetry.group, (O, RotaryPhases)):
            element = _reflected(symmetry.group, element)
        self._places.pop(symmetry.name, None)
        found = self._compare(symmetry, _elements(symmetry, element))
        if found <= self.proved:
            # Controls run there too: what does not move a module does not move the model.
            self._places[symmetry.name] = self._last
        return found

    def control(self, symmetry: HeadSymmetry | ScaleSymmetry) -> float:
        """The least change under a larger group: one factor moved alone, or both by GL(r)."""
        element = GL(symmetry.rank).random(
            (symmetry.heads,), cond=COND, generator=self.generator, dtype=torch.float64
        )
        if symmetry.rank == 1:
            # Of one sign and away from 1: a norm behind them takes out what units have in common.
            element = 2 * COND * element.abs()
        moved = []
        if isinstance(symmetry, HeadSymmetry):
            # One factor alone, or what is claimed of a pair holds of each of its factors.
            alone = element
            if not isinstance(symmetry.group, GL) and symmetry.rank > 1:
                alone = symmetry.random_element(COND, generator=self.generator)
            moved.append(self._compare(symmetry, {id(b): alone for b in symmetry.right_blocks}))
            if isinstance(symmetry.group, GL) or symmetry.rank == 1:
                return moved[0]
        return min(*moved, self._compare(symmetry, _elements(symmetry, element)), float("inf"))

    def signs(self, units: HeadSymmetry) -> float:
        """The change when every hidden unit is multiplied by −1 on both sides."""
        element = -torch.ones(units.heads, 1, 1, dtype=torch.float64)
        return self._compare(units, _elements(units, element))

    def translation(self, symmetry: HeadSymmetry, *, balanced: bool = True) -> float:
        """The change under a translation of the bias; unbalanced, the output bias stays."""
        assert symmetry.translation is not None
        t = symmetry.random_translation(generator=self.generator)
        values = self._copies([b.name for b in symmetry.translation.blocks])
        for block in symmetry.translation.blocks:
            view = block.view(values[block.name])
            view.add_(t.to(view.device).unsqueeze(-1))
        sink = symmetry.translation.sink
        if sink is not None and balanced:
            values[sink.name] = self.point.parameters[sink.name].clone()
            for left in symmetry.left_blocks:
                view = left.view(self.point.parameters[left.name])
                sink.view(values[sink.name]).sub_(
                    torch.einsum("hrd,hr->d", view, t.to(view.device))
                )
        return self._deviation(_outwards(symmetry) if balanced else [self._last], values)

    def together(self, symmetries: Iterable[HeadSymmetry | ScaleSymmetry]) -> float:
        """The change of the whole's outputs when all act at once, on the point itself."""
        members = list(symmetries)
        names = {block.name for symmetry in members for block in symmetry.blocks}
        try:
            for symmetry in members:
                element = symmetry.random_element(COND, generator=self.generator)
                self._act(symmetry.blocks, _elements(symmetry, element), self.point.parameters)
            return self._deviation([""], {})
        finally:
            self.point.restore(names)

    def _compare(
        self,
        symmetry: HeadSymmetry | ScaleSymmetry,
        elements: Mapping[int, Tensor],
    ) -> float:
        values: Values = {}
        self._act(symmetry.blocks, elements, values)
        return self._deviation(self._paths(symmetry), values)

    def _paths(self, symmetry: HeadSymmetry | ScaleSymmetry) -> list[str]:
        """The modules to run: where the proof has held, else all from the innermost outwards."""
        place = self._places.get(symmetry.name)
        return _outwards(symmetry) if place is None else [place]

    def _act(self, blocks: Iterable[Block], elements: Mapping[int, Tensor], values: Values) -> None:
        for block in blocks:
            if id(block) in elements:
                if block.name not in values:
                    values |= self._copies([block.name])
                view = block.view(values[block.name])
                element = elements[id(block)].to(view.device)
                # A single number per head may stand for a multiple of the identity.
                view.copy_(element * view if element.shape[-1] == 1 else element @ view)

    def _copies(self, names: Iterable[str]) -> Values:
        """Copies of parameters at the point, in their layout."""
        copies = {}
        for name in names:
            own = self.point.parameters[name]
            copies[name] = torch.empty_strided(
                own.shape, own.stride(), dtype=own.dtype, device=own.device
            ).copy_(own)
        return copies

    def _deviation(self, paths: Iterable[str], values: Values) -> float:
        """Change of the outputs of the first module whose outputs stay, else of the last one."""
        deviation = float("inf")
        for path in paths:
            if path not in self._references:
                self._references[path] = self._run_alone(path)
            reference = self._references[path]
            if not reference:
                continue
            with torch.no_grad():
                outputs = self.point.outputs(
                    path, self._calls.get(path), {**self.point.parameters, **values}
                )
            deviation = largest_deviation(outputs, reference)
            self._last = path
            if deviation <= self.proved:
                break
        return deviation

    def _run_alone(self, path: str) -> Outputs | None:
        call = self._calls.get(path)
        if call is None:
            return None
        try:
            with torch.no_grad():
                first, second = (self.point.outputs(path, call) for _ in range(2))
        except Exception:  # a module that needs what its parent prepares: the parent is run
            return None
        finite = all(bool(value.isfinite().all()) for value in first.values())
        return first if finite and largest_deviation(second, first) <= self.proved else None


def _reflected(group: StructureGroup, element: Tensor) -> Tensor:
    """Elements of negative determinant, where the group has them.

    Rotations alone are a smaller group with the same algebra.
    """
    mirror = torch.ones(element.shape[-1], dtype=element.dtype)
    mirror[-1] = -1
    flipped = torch.where(torch.linalg.det(element)[:, None, None] > 0, element * mirror, element)
    try:
        group.check_element(flipped)
    except ValueError:
        return element
    return flipped


def _elements(symmetry: HeadSymmetry | ScaleSymmetry, element: Tensor) -> dict[int, Tensor]:
    """What the blocks of a symmetry are multiplied by, by block."""
    elements = {id(block): element for block in symmetry.blocks}
    if isinstance(symmetry, HeadSymmetry):
        contragredient = torch.linalg.inv(element).mT
        elements |= {id(block): contragredient for block in symmetry.left_blocks}
    return elements


def _outwards(symmetry: HeadSymmetry | ScaleSymmetry) -> list[str]:
    """Paths of the modules around all parameters of a symmetry, the innermost first."""
    names = [block.name for block in symmetry.blocks]
    translation = symmetry.translation if isinstance(symmetry, HeadSymmetry) else None
    if translation is not None and translation.sink is not None:
        names.append(translation.sink.name)
    path = common_module(names)
    paths = [path]
    while path:
        path = path.rpartition(".")[0]
        paths.append(path)
    return paths


def all_proved(
    prover: Prover, symmetries: Iterable[HeadSymmetry], others: Sequence[StructureGroup] = ()
) -> list[HeadSymmetry]:
    """Those that can be proved, under their own group or else under one of the others."""
    found = []
    for symmetry in symmetries:
        tried = (_proved(prover, _with(symmetry, group=g)) for g in (symmetry.group, *others))
        found.append(next((s for s in tried if s is not None), None))
    return [symmetry for symmetry in found if symmetry is not None]


def _proved(prover: Prover, symmetry: HeadSymmetry) -> HeadSymmetry | None:
    """The symmetry with the deviation of its proof as source; None if it fails, or its control."""
    if symmetry.rank == 1:
        symmetry = _with(symmetry, group=Scale(1))
    deviation = prover.deviation(symmetry)
    if deviation > prover.proved or prover.control(symmetry) <= prover.moved:
        return None
    if symmetry.rank == 1 and prover.signs(symmetry) <= prover.proved:
        symmetry = _with(symmetry, group=GL(1))
    if symmetry.translation is not None:
        moved = prover.translation(symmetry)
        balanced = symmetry.translation.sink is None
        if moved > prover.proved or not (
            balanced or prover.translation(symmetry, balanced=False) > prover.moved
        ):
            symmetry = _with(symmetry, translation=None)
        else:
            deviation = max(deviation, moved)
    return _with(symmetry, source=f"found, proved to {deviation:.0e}")


def proved_scale(prover: Prover, scale: ScaleSymmetry) -> ScaleSymmetry | None:
    deviation = prover.deviation(scale)
    if deviation > prover.proved or prover.control(scale) <= prover.moved:
        return None
    return ScaleSymmetry(scale.blocks, scale.name, source=f"found, proved to {deviation:.0e}")


def jointly(
    prover: Prover,
    heads: list[HeadSymmetry],
    units: list[HeadSymmetry],
    scales: list[ScaleSymmetry],
) -> tuple[list[HeadSymmetry], list[HeadSymmetry], list[ScaleSymmetry]]:
    """Those that leave the outputs of the whole alone, too; parameters may be used elsewhere."""
    everything: list[HeadSymmetry | ScaleSymmetry] = [*heads, *units, *scales]
    if not everything or prover.together(everything) <= prover.proved:
        return heads, units, scales
    good = {id(s) for s in everything if prover.together([s]) <= prover.proved}
    return (
        [s for s in heads if id(s) in good],
        [s for s in units if id(s) in good],
        [s for s in scales if id(s) in good],
    )


def _with(symmetry: HeadSymmetry, **changes: Any) -> HeadSymmetry:
    """The same symmetry but for some arguments."""
    given = {
        "left": symmetry.left_blocks,
        "right": symmetry.right_blocks,
        "group": symmetry.group,
        "name": symmetry.name,
        "translation": symmetry.translation,
        "source": symmetry.source,
    }
    return HeadSymmetry(**{**given, **changes})
