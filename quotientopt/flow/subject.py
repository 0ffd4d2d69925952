"""What flows: a point of a manifold, or the parameters of a model, as a list of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt.canonical.reading import require_heads, symmetries_of
from quotientopt.flow.fibres import Fibre, Fibres, HeadFibre, PairFibre, PairGeometry, TokenFibre
from quotientopt.manifolds import (
    FactorQuotient,
    GramQuotient,
    ProductManifold,
    QuotientManifold,
)
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.pairs import refuse_scattered, shape_key


class FlowSubject(ABC):
    """A point as a list of tensors, a loss on it, and its factor pairs.

    Attributes
    ----------
    start : list of Tensor
        The point it was made with.
    fibres : Fibres
    """

    start: list[Tensor]
    fibres: Fibres

    @abstractmethod
    def structured(self, tensors: Sequence[Tensor]) -> Any:
        """The point as its user knows it; tensors may have more dimensions in front."""

    @abstractmethod
    def flat(self, point: Any) -> list[Tensor]:
        """The inverse of :meth:`structured`."""

    @abstractmethod
    def visit(self, tensors: Sequence[Tensor]) -> Any:
        """Go to a point; what loss and events are called with there."""

    @abstractmethod
    def restore(self) -> None:
        """Undo all visits."""

    def loss_and_gradient(
        self, loss: Callable[[Any], Tensor], tensors: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        """The loss at a point and its partial derivatives there."""
        with torch.enable_grad():
            argument = self.visit(tensors)
            value = loss(argument)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(
                    f"the loss must return a real tensor, got {type(value).__name__}"
                    f"{f' of {value.dtype}' if isinstance(value, Tensor) else ''}"
                )
            if not value.requires_grad:
                raise ValueError("the loss does not depend on the point, or was detached from it")
            total = value.sum()
            partials = torch.autograd.grad(total, self._inputs(), allow_unused=True)
        if all(partial is None for partial in partials):
            raise ValueError("the loss depends on other tensors, and not on the point")
        found = [
            torch.zeros_like(tensor) if partial is None else partial
            for tensor, partial in zip(tensors, partials, strict=True)
        ]
        return float(total.detach()), found

    @abstractmethod
    def _inputs(self) -> list[Tensor]:
        """The tensors that derivatives are taken by, after a visit."""


class ManifoldSubject(FlowSubject):
    """A point of a manifold.

    Parameters
    ----------
    manifold : FactorQuotient, GramQuotient or ProductManifold
        Its groups and shapes count; the metric is the flow's own.
    x : point
    metric : str

    Raises
    ------
    TypeError, ValueError
        If x is no point of the manifold or on the meta device, or the metric not there for it.
    """

    def __init__(self, manifold: QuotientManifold[Any], x: Any, metric: str) -> None:
        self._manifold = manifold
        tensors = list(_leaves(x))
        if any(tensor.device.type == "meta" for tensor in tensors):
            raise ValueError("x0 is on the meta device and has no values; move it to a real one")
        manifold.check_point(x)
        self.start = [tensor.clone() for tensor in self.flat(x)]
        self._now = self.start
        self.fibres = Fibres(list(_fibres(manifold, metric)))

    def structured(self, tensors: Sequence[Tensor]) -> Any:
        point, rest = _assemble(self._manifold, tensors)
        assert not rest
        return point

    def flat(self, point: Any) -> list[Tensor]:
        return [tensor.detach() for tensor in _in_order(self._manifold, point)]

    def visit(self, tensors: Sequence[Tensor]) -> Any:
        grad = torch.is_grad_enabled()
        self._now = [tensor.detach().clone().requires_grad_(grad) for tensor in tensors]
        return self.structured(self._now)

    def restore(self) -> None:
        self._now = self.start

    def _inputs(self) -> list[Tensor]:
        return self._now


class ModelSubject(FlowSubject):
    """The trainable parameters of a model.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found. Those with a frozen block are left out: what remains to be
        trained of such a pair has no orbit.
    metric : str
        On the pairs; Euclidean elsewhere.

    Raises
    ------
    ValueError
        If nothing is trainable, a pair is scattered over devices, no pair is known, or the metric
        is not there for a group.
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
        metric: str,
    ) -> None:
        self._model = model
        found = require_heads(model, symmetries_of(model, symmetries)).heads
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(f"{type(model).__name__} has no trainable parameter; unfreeze some")
        self._names, self._parameters = tuple(named), list(named.values())
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        alike: dict[Any, list[HeadSymmetry]] = defaultdict(list)
        for symmetry in found:
            if all(id(block.parameter) in places for block in symmetry.blocks):
                refuse_scattered(symmetry)
                alike[shape_key(symmetry)].append(symmetry)
        if not alike:
            raise ValueError(
                f"every known pair of {type(model).__name__} has a frozen parameter; unfreeze both "
                "sides of one"
            )
        self.fibres = Fibres(
            [
                HeadFibre(
                    members,
                    PairGeometry(members[0].group, metric, members[0].name),
                    lambda parameter: places[id(parameter)],
                )
                for members in alike.values()
            ]
        )
        self.start = self.now()
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def structured(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def flat(self, point: Any) -> list[Tensor]:
        if not isinstance(point, Mapping):
            raise TypeError(
                "a point of a model is a dict of parameter names to tensors, such as "
                f"state_dict(), got {type(point).__name__}"
            )
        missing = [name for name in self._names if name not in point]
        if missing:
            raise ValueError(f"parameter {missing[0]!r} is missing in a point of the trajectory")
        for name, own in zip(self._names, self._parameters, strict=True):
            if tuple(point[name].shape) != tuple(own.shape):
                raise ValueError(
                    f"parameter {name!r} must have shape {tuple(own.shape)}, "
                    f"got {tuple(point[name].shape)}"
                )
        return [point[name].detach() for name in self._names]

    def now(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def visit(self, tensors: Sequence[Tensor]) -> nn.Module:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.copy_(tensor)
        return self._model

    @torch.no_grad()
    def restore(self) -> None:
        self.visit(self.start)
        for buffer, value in self._buffers:
            buffer.copy_(value)

    def _inputs(self) -> list[Tensor]:
        return list(self._parameters)


def _leaves(point: Any) -> Iterator[Tensor]:
    if isinstance(point, Tensor):
        yield point
    elif isinstance(point, Mapping):
        for part in point.values():
            yield from _leaves(part)
    elif isinstance(point, (tuple, list)):
        for part in point:
            yield from _leaves(part)
    else:
        raise TypeError(f"x0 must be made of tensors, got {type(point).__name__}")


def _in_order(manifold: QuotientManifold[Any], point: Any) -> Iterator[Tensor]:
    """The tensors of a point in the manifold's order of factors."""
    if isinstance(manifold, ProductManifold):
        for key, factor in _factors(manifold):
            yield from _in_order(factor, point[key])
    else:
        yield from _leaves(point)


def _factors(manifold: ProductManifold) -> Iterator[tuple[Any, QuotientManifold[Any]]]:
    parts = manifold.manifolds
    yield from parts.items() if isinstance(parts, Mapping) else enumerate(parts)


def _size(manifold: QuotientManifold[Any]) -> int:
    """How many tensors a point is made of."""
    if isinstance(manifold, ProductManifold):
        return sum(_size(factor) for _, factor in _factors(manifold))
    return 2 if isinstance(manifold, FactorQuotient) else 1


def _fibres(
    manifold: QuotientManifold[Any], metric: str, name: str = "", place: int = 0
) -> Iterator[Fibre]:
    """Pairs of a manifold, named by the way to them; ``"point"`` if there is one."""
    label = name or "point"
    if isinstance(manifold, ProductManifold):
        for key, factor in _factors(manifold):
            yield from _fibres(factor, metric, f"{name}.{key}" if name else str(key), place)
            place += _size(factor)
    elif isinstance(manifold, FactorQuotient):
        yield PairFibre(PairGeometry(manifold.group, metric, label), place)
    elif isinstance(manifold, GramQuotient):
        yield TokenFibre(PairGeometry(manifold.group, metric, label, tokens=True), place)
    else:
        raise TypeError(
            "expected a FactorQuotient, GramQuotient, ProductManifold or torch.nn.Module, got "
            f"{type(manifold).__name__}"
        )


def _assemble(
    manifold: QuotientManifold[Any], tensors: Sequence[Tensor]
) -> tuple[Any, Sequence[Tensor]]:
    if isinstance(manifold, ProductManifold):
        parts: dict[Any, Any] = {}
        for key, factor in _factors(manifold):
            parts[key], tensors = _assemble(factor, tensors)
        named = isinstance(manifold.manifolds, Mapping)
        return (parts if named else tuple(parts.values())), tensors
    if isinstance(manifold, FactorQuotient):
        return (tensors[0], tensors[1]), tensors[2:]
    return tensors[0], tensors[1:]
