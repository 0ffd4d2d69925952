"""Branches of layers: what reads the stream, what writes to it, hidden units, norms beside them.

A module that is a branch, an attention or a feed-forward layer, is described once per class by a
:class:`Sublayer`; layers are lists of such branches with their norms, whatever their classes are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from quotientopt.groups import GL, Scale, StructureGroup
from quotientopt.symmetries.adapters.layers import (
    IDENTITY,
    LINEAR,
    OUTPUT_AXIS,
    add_consumer,
    add_embedding,
    add_norm,
    add_reader,
    add_vectors,
    add_writer,
    blocks_of,
    consecutive,
    input_heads,
    output_heads,
    own_parameter,
    present_parameter,
    transformers_classes,
)
from quotientopt.symmetries.head import HeadSymmetry
from quotientopt.symmetries.registry import (
    Adapter,
    ByClass,
    Contribution,
    NotUnderstoodError,
    follows,
    lookup,
    qualified,
    unwrapped,
)
from quotientopt.symmetries.residual import Reader


@dataclass(frozen=True)
class Units:
    """Hidden units of a feed-forward layer that can be scaled, and scaled back by what reads them.

    Attributes
    ----------
    writer, reader : str
        Paths of the affine layers that write the units and that read them.
    part, parts : int
        Where the writer is fused: which of how many equal parts of its outputs.
    activation : str, optional
        Path of an activation on the units. None where they are multiplied by a function of others,
        as in a gated layer: they have GL(1) then, and positive factors behind a ReLU.
    """

    writer: str
    reader: str
    part: int = 0
    parts: int = 1
    activation: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """The matrices of a module that is a branch of a layer, ``x + f(x)``.

    Attributes
    ----------
    readers, writers : tuple of str
        Paths of affine layers in the module that read the stream, and that write to it. Those of an
        attention are its queries, keys and values, in this order.
    kind : str
        Class of these layers.
    parts : tuple of str
        Paths of sublayers in the module, and of linear layers, that read what the module reads;
        those that are None are left out.
    reading, writing : mapping of str to int
        Names of parameters of the module itself to their axis that is the stream.
    biases : mapping of str to str
        Name of such a parameter to the name of its bias.
    units : Units, optional
        Its hidden units, where they have a gauge.
    """

    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    kind: str = LINEAR
    parts: tuple[str, ...] = ()
    reading: Mapping[str, int] = field(default_factory=dict)
    writing: Mapping[str, int] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    units: Units | None = None


def dense(up: str, down: str, activation: str, *, kind: str = LINEAR) -> Sublayer:
    """A feed-forward layer of two matrices with an activation, given by its path, between them."""
    return Sublayer((up,), (down,), kind, units=Units(up, down, activation=activation))


# Per class a sublayer, or a function of the module where it depends on the configuration.
_sublayers: ByClass[Sublayer | Callable[[Any], Sublayer]] = ByClass()


def register_sublayer(form: Sublayer | Callable[[Any], Sublayer], *names: str) -> None:
    """Make modules of those classes, and copies of them, known as branches of layers.

    Parameters
    ----------
    form : Sublayer or callable
        A callable takes the module.
    *names : str
        See :func:`transformers_classes`.
    """
    for class_name in transformers_classes(*names):
        _sublayers[class_name] = form


def sublayer_of(module: nn.Module) -> Sublayer:
    """The registered form of a module; NotUnderstoodError if there is none."""
    form = _sublayers.find(module)
    if form is None:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NotUnderstoodError(f"a {found} in the place of an attention or feed-forward layer")
    return form if isinstance(form, Sublayer) else form(unwrapped(module))


def add_sublayer(
    contribution: Contribution,
    module: nn.Module,
    name: str,
    form: Sublayer | None = None,
    *,
    cross: bool = False,
) -> list[Reader]:
    """Add what a branch reads the stream with and writes to it with.

    Parameters
    ----------
    contribution : Contribution
    module : Module
    name : str
        Its qualified name.
    form : Sublayer, optional
        By default the one registered for the module's class.
    cross : bool
        Whether keys and values read another stream.

    Returns
    -------
    list of Reader
        All that reads what the module reads.
    """
    form = sublayer_of(module) if form is None else form
    readers = [
        add_reader(contribution, module.get_submodule(path), qualified(name, path), form.kind)
        for path in (form.readers[:1] if cross else form.readers)
    ]
    for parameter, axis in form.reading.items():
        present_parameter(module, parameter)
        bias = form.biases.get(parameter)
        if bias is not None and own_parameter(module, bias) is None:
            bias = None
        weight = qualified(name, parameter)
        contribution.residual_axes[weight] = axis
        readers.append(Reader(weight, axis, None if bias is None else qualified(name, bias)))
    for path in form.parts:
        part = getattr(module, path, None)
        if part is None:
            continue
        if follows(part, LINEAR):
            readers.append(add_reader(contribution, part, qualified(name, path)))
        else:
            readers += add_sublayer(contribution, part, qualified(name, path))
    for path in form.writers:
        add_writer(contribution, module.get_submodule(path), qualified(name, path), form.kind)
    for parameter, axis in form.writing.items():
        present_parameter(module, parameter)
        add_vectors(contribution, qualified(name, parameter), axis)
    if form.units is not None:
        add_units(contribution, module, name, form.units, form.kind)
    return readers


def add_units(
    contribution: Contribution, module: nn.Module, name: str, units: Units, kind: str = LINEAR
) -> None:
    """Add the scales of hidden units, ``u ↦ c u``; nothing behind an activation but ReLU."""
    group: StructureGroup = GL(1)
    if units.activation is not None:
        if not _is_relu(_at(module, units.activation)):
            return
        group = Scale(1)
    writer, reader = module.get_submodule(units.writer), module.get_submodule(units.reader)
    rows = present_parameter(writer, "weight").shape[OUTPUT_AXIS[kind]]
    count = rows // units.parts
    pick = consecutive(count, units.part, units.parts)
    right = output_heads(writer, qualified(name, units.writer), rows, pick, kind)
    left = input_heads(reader, qualified(name, units.reader), count, consecutive(count), kind)
    contribution.hidden_units.append(
        HeadSymmetry(blocks_of(left), blocks_of(right), group, qualified(name, "units"))
    )


def _is_relu(activation: Any) -> bool:
    if isinstance(activation, nn.Module):
        return follows(activation, "torch.nn.modules.activation.ReLU")
    return activation in (functional.relu, torch.relu)


def _at(module: Any, path: str) -> Any:
    """What an attribute path leads to, a module or a function."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


class Branch(NamedTuple):
    """One branch of a layer.

    Attributes
    ----------
    sublayer : str or Sublayer
        Path of a module that is one, or paths in the layer itself.
    before : str, optional
        Path of the norm in front, whose output is read by nothing but branches of this layer.
    after : str, optional
        Path of a norm whose output is the stream, or is added to it.
    scale : str, optional
        Path of a module that multiplies the branch by a trainable diagonal.
    cross : bool
        Whether it is an attention whose keys and values read another stream.
    """

    sublayer: str | Sublayer
    before: str | None = None
    after: str | None = None
    scale: str | None = None
    cross: bool = False

    @classmethod
    def beside(
        cls, norm: str, sublayer: str | Sublayer, *, first: bool, cross: bool = False
    ) -> Branch:
        """A branch with its norm in front, or else behind."""
        before, after = (norm, None) if first else (None, norm)
        return cls(sublayer, before, after, cross=cross)


def layer_adapter(*branches: Branch, parallel: bool = False) -> Adapter:
    """The adapter of layers made of those branches; a branch whose module is None is left out.

    Parameters
    ----------
    *branches : Branch
    parallel : bool
        Whether all branches read the stream as it comes in, and are added to it together.
    """

    def adapter(module: Any, name: str) -> Contribution:
        contribution = Contribution()
        add_branches(contribution, module, name, *branches)
        if parallel and all(branch.after is None for branch in branches):
            vectors = dict(module.named_parameters(prefix=name))
            biases = sorted(n for n in contribution.writers if n in vectors)
            biases = [name for name in biases if vectors[name].ndim == 1]
            contribution.added_at_once.append(tuple(biases))
        return contribution

    return adapter


def add_branches(contribution: Contribution, module: Any, name: str, *branches: Branch) -> None:
    """Add branches of a layer, with the norms in front of them and behind them."""
    norms: dict[str, list[Reader]] = {}
    for branch in branches:
        if isinstance(branch.sublayer, str):
            part = module.get_submodule(branch.sublayer)
            path = qualified(name, branch.sublayer)
            readers = add_sublayer(contribution, part, path, cross=branch.cross)
        else:
            readers = add_sublayer(contribution, module, name, branch.sublayer, cross=branch.cross)
        if branch.before is not None and not follows(module.get_submodule(branch.before), IDENTITY):
            norms.setdefault(branch.before, []).extend(readers)
        if branch.after is not None:
            norm = module.get_submodule(branch.after)
            add_norm(contribution, norm, qualified(name, branch.after))
        if branch.scale is not None and not follows(module.get_submodule(branch.scale), IDENTITY):
            contribution.residual_breakers.append(f"layer scale {qualified(name, branch.scale)}")
    for path, readers in norms.items():
        add_norm(contribution, module.get_submodule(path), qualified(name, path), readers)


def add_embeddings(contribution: Contribution, module: nn.Module, name: str, *paths: str) -> None:
    """Add embeddings whose rows are added to the stream; those that are None are left out."""
    for path in paths:
        head, _, last = path.rpartition(".")
        embedding = getattr(module.get_submodule(head), last)
        if embedding is not None:
            add_embedding(contribution, embedding, qualified(name, path))


def stack_adapter(*embeddings: str, norm: str | None, first: str | None = None) -> Adapter:
    """The adapter of a model that returns hidden states: embeddings, layers and a last norm.

    Another norm, behind the embeddings (`first`), writes to the stream.
    """

    def adapter(module: Any, name: str) -> Contribution:
        last = None if norm is None else qualified(name, norm)
        contribution = Contribution(outputs={name: last})
        add_embeddings(contribution, module, name, *embeddings)
        if norm is not None and last is not None:
            add_norm(contribution, module.get_submodule(norm), last, [])
        if first is not None:
            add_norm(contribution, module.get_submodule(first), qualified(name, first))
        return contribution

    return adapter


def head_adapter(source: str, *paths: str) -> Adapter:
    """The adapter of a model around one that returns hidden states, and of what reads them."""

    def adapter(module: Any, name: str) -> Contribution:
        contribution = Contribution()
        require_known(module.get_submodule(source))
        add_consumer(contribution, module, name, source, *paths)
        return contribution

    return adapter


def require_known(module: nn.Module) -> nn.Module:
    """Return the module if there is an adapter for its class; NotUnderstoodError otherwise."""
    if lookup(unwrapped(module)) is None:
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise NotUnderstoodError(f"{found} is not known")
    return module
