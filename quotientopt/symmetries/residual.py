"""The residual stream: the norms on it, its axes, what breaks O(d), how contributions add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quotientopt.groups import O, StabilizerOfOnes
from quotientopt.symmetries.block import is_sharded, refuse_values
from quotientopt.symmetries.exactness import Ownership
from quotientopt.symmetries.registry import (
    ByClass,
    Contribution,
    bare_modules,
    inside,
    plain,
    qualified,
)


@dataclass(frozen=True)
class Reader:
    """A matrix that reads vectors of the stream, ``W x`` or ``W x + c``.

    Attributes
    ----------
    weight : str
        Qualified name of the matrix.
    axis : int
        Its axis that is the residual stream.
    bias : str, optional
        Qualified name of ``c``, which is not in the stream.
    """

    weight: str
    axis: int
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """One norm of a model, ``x ↦ γ ∘ (x − mean) / scale + β``, without the mean for RMS norms.

    Attributes
    ----------
    name : str
        Qualified name of the module.
    centres : bool
        Whether the mean over the stream's axis is subtracted (LayerNorm). That fixes the all-ones
        vector and leaves only its stabiliser in O(d).
    gain, bias : str, optional
        Qualified names of the parameters of γ and β.
    neutral : float
        Value of the gain's parameter for which γ = 1; zero where γ = 1 + weight.
    readers : tuple of Reader, optional
        *All* that reads the norm's output. None where it is read otherwise too: by a skip
        connection (post-norm), or by something unknown.
    """

    name: str
    centres: bool
    gain: str | None = None
    bias: str | None = None
    neutral: float = 1.0
    readers: tuple[Reader, ...] | None = None


@dataclass(frozen=True)
class NormKind:
    """What a norm class computes: the attributes of :class:`Norm` of the same names."""

    centres: bool
    neutral: float


_kinds: ByClass[NormKind] = ByClass()


def register_norm(class_name: str, *, centres: bool = False, neutral: float = 1.0) -> None:
    """Make a norm class known, so that adapters can find its gain, bias and centring.

    Its gain is its parameter ``weight``, its bias its parameter ``bias``; either may be missing.

    Parameters
    ----------
    class_name : str
        Qualified name, ``"transformers.models.llama.modeling_llama.LlamaRMSNorm"``; nothing is
        imported.
    centres : bool
        Whether it subtracts the mean.
    neutral : float
        Value of ``weight`` that multiplies by one; zero where the norm multiplies by 1 + weight.

    Raises
    ------
    TypeError
        If the name is not qualified.
    """
    if not isinstance(class_name, str) or "." not in class_name:
        raise TypeError(
            f'register_norm needs a qualified class name such as "package.module.Norm", '
            f"got {class_name!r}"
        )
    _kinds[class_name] = NormKind(centres, neutral)


def norm_kind(norm: nn.Module) -> NormKind | None:
    """The kind of a module that computes what a registered norm class computes, else None."""
    return _kinds.find(norm)


register_norm("torch.nn.modules.normalization.LayerNorm", centres=True)
register_norm("torch.nn.modules.normalization.RMSNorm")
register_norm("quotientopt.symmetries.fold.UncentredLayerNorm")


SHOWN = 3


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a model and the orthogonal group acting on it.

    Q in O(d) acts by ``W ↦ W Qᵀ`` on every parameter, written with its residual axis last. That
    leaves the model's function unchanged only where nothing singles out a basis of the stream;
    ``broken_by`` lists what does. The axes serve as residual frames of the optimizer in both
    cases.

    Attributes
    ----------
    dimension : int
        Width d of the stream.
    axes : mapping of str to int
        Parameter name to the axis that is the residual stream.
    parameters : mapping of str to Tensor
        The same names to the parameters, in the order of the model.
    broken_by : tuple of str
        What breaks O(d); empty when the symmetry is exact.
    dropouts : tuple of str
        Dropout modules of the model that are not switched off. On the stream their masks single out
        a basis: the symmetry is one in evaluation.
    """

    dimension: int
    axes: Mapping[str, int]
    parameters: Mapping[str, Tensor]
    broken_by: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all of O(d) is a symmetry of the model, in evaluation."""
        return not self.broken_by

    @property
    def group(self) -> O | None:
        """The group that is a symmetry: O(d), or None where it is broken."""
        return O(self.dimension) if self.exact else None

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not a d×d orthogonal matrix, and any if O(d) is broken.

        Raises
        ------
        ValueError
            Naming what breaks the symmetry, the shape, or that the matrix is not orthogonal.
        """
        if self.broken_by:
            raise ValueError(
                "the residual stream has no O(d) symmetry, it is broken by "
                f"{', '.join(self.broken_by)}"
            )
        if tuple(element.shape) != (self.dimension, self.dimension):
            raise ValueError(
                f"the residual stream needs an element of shape {(self.dimension,) * 2}, "
                f"got {tuple(element.shape)}"
            )
        O(self.dimension).check_element(element)

    @torch.no_grad()
    def act_(self, element: Tensor) -> None:
        """Rotate every parameter in place, ``W ↦ W Qᵀ`` along its residual axis.

        Parameters
        ----------
        element : Tensor
            Q, shape ``(d, d)``, orthogonal.

        Raises
        ------
        ValueError
            If O(d) is broken, or the shape is wrong.
        """
        self.check_element(element)
        for name, parameter in self.parameters.items():
            if is_sharded(parameter):
                refuse_values(name)
        for name, axis in self.axes.items():
            rows = self.parameters[name].detach().movedim(axis, -1)
            q = element.to(device=rows.device, dtype=torch.float64)
            rows.copy_(rows.to(torch.float64) @ q.mT)

    def summary(self) -> str:
        """Width, number of parameters, and what of O(d) is exact, in one line."""
        state = f"broken by {', '.join(self.broken_by[:SHOWN])}" if self.broken_by else "exact"
        if len(self.broken_by) > SHOWN:
            state += f" and {len(self.broken_by) - SHOWN} more"
        if self.broken_by and self.group is not None:
            state += f"; {self.group} exact"
        if self.dropouts and self.group is not None:
            state += f" in evaluation, in training unless {self.dropouts[0]} or one of the "
            state += f"{len(self.dropouts)} dropouts is on the stream"
        d = self.dimension
        return f"d = {d}, {len(self.axes)} parameters, O({d}) {state}"


@dataclass(frozen=True, eq=False)
class CentredStream(ResidualStream):
    """A residual stream that nothing but the centring of LayerNorms singles a vector out of.

    O(d) is broken, but the rotations and reflections that fix the all-ones vector, a copy of
    O(d − 1), are symmetries. :func:`quotientopt.fold_norms_` makes all of O(d) exact.
    """

    @property
    def group(self) -> StabilizerOfOnes:
        """The stabiliser of the all-ones vector in O(d)."""
        return StabilizerOfOnes(self.dimension)

    def check_element(self, element: Tensor) -> None:
        """Refuse what is not an orthogonal d×d matrix that fixes the all-ones vector.

        Raises
        ------
        ValueError
            Naming what is wrong.
        """
        if tuple(element.shape) != (self.dimension, self.dimension):
            raise ValueError(
                f"the residual stream needs an element of shape {(self.dimension,) * 2}, "
                f"got {tuple(element.shape)}"
            )
        try:
            self.group.check_element(element)
        except ValueError as error:
            raise ValueError(
                f"the residual stream is centred ({self.broken_by[0]}, …): {error}"
            ) from None


@dataclass
class Stream:
    """The residual stream as the adapters' contributions add up to it.

    Attributes
    ----------
    axes : dict of str to int
        First name of a parameter to its axis that is the stream.
    parameters : dict of str to Parameter
    writers : set of str
        Those that are added to the stream.
    norms : list of Norm
        One per norm module, its readers complete.
    raw_readers : list of str
        What reads hidden states that went through no norm.
    breakers : list of str
        What breaks O(d), apart from the norms.
    """

    axes: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    norms: list[Norm] = field(default_factory=list)
    raw_readers: list[str] = field(default_factory=list)
    breakers: list[str] = field(default_factory=list)

    @property
    def widths(self) -> set[int]:
        """Widths of the stream; several, if there are several streams."""
        return {self.parameters[name].shape[axis] for name, axis in self.axes.items()}


def add_up(
    model: nn.Module, contributions: Mapping[str, Contribution], ownership: Ownership
) -> Stream:
    """Add up the contributions of all modules, by module name, that know part of the stream."""
    stream = Stream()
    breakers: dict[str, None] = {}
    declared: set[str] = set()
    for contribution in contributions.values():
        breakers |= dict.fromkeys(contribution.residual_breakers)
        for name, axis in contribution.residual_axes.items():
            declared.add(name)
            first = ownership.first_name(name)
            if stream.axes.setdefault(first, axis) != axis:
                breakers[f"two different axes of {first}"] = None
            if name in contribution.writers:
                stream.writers.add(first)
    stream.parameters = {name: ownership.parameter(name) for name in stream.axes}
    breakers |= dict.fromkeys(_close(stream, model, contributions.values()))
    declared |= {norm.gain for norm in stream.norms if norm.gain is not None}
    gains = [ownership.parameter(norm.gain) for norm in stream.norms if norm.gain is not None]
    for name in ownership.used_elsewhere([*stream.parameters.values(), *gains], declared):
        breakers[f"another use of {name}"] = None
    outside = [
        name
        for name, _ in model.named_parameters()
        if not any(not root or plain(name).startswith(f"{root}.") for root in contributions)
    ]
    if outside:
        breakers[f"parameters outside the recognised stream ({outside[0]}, …)"] = None
    stream.breakers = list(breakers)
    return stream


def unknown_layers(model: nn.Module, contributions: Mapping[str, Contribution]) -> Iterable[str]:
    """Names of layers in the lists of a model that use the stream in a way nobody knows."""
    # Who hands hidden states on knows its embeddings and norms, and not what lies between.
    whole = [
        root
        for root, contribution in contributions.items()
        if not contribution.outputs
        and not contribution.consumers
        and not any(other != root and inside(other, root) for other in contributions)
    ]
    modules = list(bare_modules(model))
    for path, layers in modules:
        if not isinstance(layers, nn.ModuleList):
            continue
        for index, layer in layers.named_children():
            name = qualified(path, index)
            known = any(inside(name, root) for root in whole)
            known |= any(inside(root, name) for root in contributions)
            if not known and next(layer.parameters(), None) is not None:
                yield name


def norm_breakers(norm: Norm, ownership: Ownership) -> list[str]:
    """How a norm breaks O(d); empty for one that neither centres nor has a gain other than one."""
    breakers = [f"centring of {norm.name}"] if norm.centres else []
    if norm.gain is not None:
        gain = ownership.parameter(norm.gain)
        if gain.requires_grad:
            breakers.append(f"trainable gain {norm.gain}")
        elif not bool((gain == norm.neutral).all()):
            neutral = "one" if norm.neutral == 1 else f"{norm.neutral:g}"
            breakers.append(f"gain {norm.gain}, which is not {neutral}")
    return breakers


def _close(
    stream: Stream, model: nn.Module, contributions: Iterable[Contribution]
) -> Iterable[str]:
    """Collect the norms, join hidden states that modules return to what reads them.

    Returns what breaks O(d) because nothing is known to read it.
    """
    consumers: dict[str, tuple[Reader, ...]] = {}
    outputs: dict[str, str | None] = {}
    norms: dict[int, Norm] = {}
    for contribution in contributions:
        outputs |= contribution.outputs
        for name, readers in contribution.consumers.items():
            consumers[name] = (*consumers.get(name, ()), *readers)
    returned: dict[str, list[str]] = {}
    for module_name, norm_name in outputs.items():
        if norm_name is not None:
            returned.setdefault(norm_name, []).append(module_name)
        elif module_name in consumers:
            stream.raw_readers += [reader.weight for reader in consumers[module_name]]
    for contribution in contributions:
        for norm in contribution.norms:
            parts = [norm.readers]
            parts += [consumers.get(name) for name in returned.get(norm.name, ())]
            # A module in several places is one norm, read in all of them.
            key = id(model.get_submodule(norm.name))
            if key in norms:
                norm = norms[key]
                parts.append(norm.readers)
            known = [part for part in parts if part is not None]
            complete = tuple(reader for part in known for reader in part)
            # A norm that nobody is known to read is read by somebody unknown.
            whole = len(known) == len(parts) and bool(complete)
            norms[key] = replace(norm, readers=complete if whole else None)
    stream.norms = list(norms.values())
    return [
        f"hidden states that {name or 'the model'} returns"
        for name in outputs
        if name not in consumers
    ]
