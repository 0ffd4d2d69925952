"""Trajectories: what a flow returns, and how much of any of them is gauge.

:class:`FlowResult` is that of a gradient flow. :func:`vertical_motion` gives the vertical and the
horizontal length of every step between given points, :class:`VerticalLog` of an optimizer's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import wide
from quotientopt.flow.fibres import Decomposition
from quotientopt.flow.subject import FlowSubject, ManifoldSubject, ModelSubject
from quotientopt.manifolds import QuotientManifold
from quotientopt.symmetries import HeadSymmetry, SymmetryMap


@dataclass(frozen=True, eq=False)
class FlowEvent:
    """Where an event function vanished.

    Attributes
    ----------
    times : Tensor
        Float64, ``(K,)``.
    points : list
        The points then, of the same structure as the start.
    """

    times: Tensor
    points: list[Any] = field(repr=False)


@dataclass(frozen=True, eq=False)
class FlowResult:
    """A trajectory of a projected gradient flow, on T recorded times.

    Attributes
    ----------
    t : Tensor
        Times, float64, ``(T,)``: those of `t_eval`, or the steps of the integrator.
    loss : Tensor
        Float64, ``(T,)``.
    points : point
        As the start is structured, with the time axis in front of every tensor; for a model a dict
        of parameter names to tensors. In the dtype of the start.
    charges : dict of str to Tensor
        What the flow conserves, ``(T, *batch, …)`` by the name of the pair; see
        :func:`~quotientopt.flow.projected_gradient_flow`.
    invariants : dict of str to Tensor
        Numbers that no change of gauge changes, ``(T, *batch, r)`` by the name of the pair: for
        GL(r) the singular values of AᵀB, for rotary planes ``|a| |b|``, for compact groups the
        singular values of [A B] (of the token matrix).
    gradient_norm : Tensor
        Norm of the gradient, ``(T,)``.
    vertical_share : Tensor
        Norm of the vertical part of the gradient over that of the gradient, ``(T,)``: rounding, if
        the loss is invariant.
    horizontal_length, vertical_length : Tensor
        Lengths of both parts of the gradient, integrated over time by the integrator itself, hence
        to its tolerances, ``(T,)``. The first is the length of the trajectory in the quotient. The
        second has been taken out if the flow is projected, and is moved along the orbits if not.
    sol : callable or None
        Time to point, with ``dense_output=True``.
    events : tuple of FlowEvent
        One for each event function.
    success : bool
        Whether the end, or a terminal event, was reached.
    message : str
        The integrator's own words.
    evaluations : int
        How often the integrator asked for the gradient.
    """

    t: Tensor
    loss: Tensor = field(repr=False)
    points: Any = field(repr=False)
    charges: dict[str, Tensor] = field(repr=False)
    invariants: dict[str, Tensor] = field(repr=False)
    gradient_norm: Tensor = field(repr=False)
    vertical_share: Tensor = field(repr=False)
    horizontal_length: Tensor = field(repr=False)
    vertical_length: Tensor = field(repr=False)
    sol: Callable[[float], Any] | None = field(repr=False)
    events: tuple[FlowEvent, ...] = field(repr=False)
    success: bool
    message: str
    evaluations: int

    def charge_drift(self) -> dict[str, Tensor]:
        """``‖C(t) − C(0)‖`` over all heads, ``(T,)`` by the name of the pair."""
        return {
            name: (charge - charge[0]).flatten(1).norm(dim=1)
            for name, charge in self.charges.items()
        }


@dataclass(frozen=True, eq=False)
class VerticalMotion:
    """Lengths of the vertical and the horizontal parts of K steps, in one metric.

    A step ``u = x_{k+1} − x_k`` is divided at x_k: ``u = u_vertical + u_horizontal``, the first
    along the orbit, where nothing that the model computes changes to first order, the second
    orthogonal to it.

    Attributes
    ----------
    vertical, horizontal : dict of str to Tensor
        Lengths by the name of the pair, ``(K, *batch)``, per head, float64.
    outside : Tensor
        Euclidean lengths of the motion of parameters outside the pairs, ``(K,)``.
    isotropic_share : dict of str to float
        dim G over the number of entries of a pair: the mean :attr:`share` of directions drawn
        evenly, in the Euclidean metric.
    """

    vertical: dict[str, Tensor] = field(repr=False)
    horizontal: dict[str, Tensor] = field(repr=False)
    outside: Tensor = field(repr=False)
    isotropic_share: dict[str, float] = field(repr=False)

    @property
    def vertical_length(self) -> Tensor:
        """Length of the vertical part of every step over all pairs, ``(K,)``."""
        return _over_pairs(self.vertical, self.outside)

    @property
    def horizontal_length(self) -> Tensor:
        """Length of the horizontal part of every step over all pairs, ``(K,)``."""
        return _over_pairs(self.horizontal, self.outside)

    @property
    def share(self) -> Tensor:
        """Squared vertical length over squared length, of every step over all pairs, ``(K,)``."""
        return _share(self.vertical_length, self.horizontal_length)

    def share_of(self, name: str) -> Tensor:
        """The share of every step and head of one pair, ``(K, *batch)``."""
        return _share(self.vertical[name], self.horizontal[name])

    @property
    def total_share(self) -> float:
        """Sum over all steps of the squared vertical lengths over that of the squared lengths."""
        vertical, horizontal = self.vertical_length.norm(), self.horizontal_length.norm()
        return float(_share(vertical, horizontal))

    @property
    def cumulative_vertical(self) -> Tensor:
        """Vertical length of the path so far, ``(K,)``."""
        return self.vertical_length.cumsum(0)

    @property
    def cumulative_horizontal(self) -> Tensor:
        """Horizontal length of the path so far, ``(K,)``."""
        return self.horizontal_length.cumsum(0)

    def __str__(self) -> str:
        lines = [f"{'pair':<32} {'vertical':>10} {'horizontal':>11} {'share':>7} {'isotropic':>10}"]
        for name, vertical in self.vertical.items():
            lengths = [_over_batch(part) for part in (vertical, self.horizontal[name])]
            share = float(_share(lengths[0].norm(), lengths[1].norm()))
            lines.append(
                f"{name:<32} {lengths[0].sum().item():10.3e} {lengths[1].sum().item():11.3e} "
                f"{share:7.1%} {self.isotropic_share[name]:10.1%}"
            )
        return "\n".join([*lines, f"{self.total_share:.1%} of the motion of the pairs is gauge"])


def vertical_motion(
    manifold_or_model: QuotientManifold[Any] | nn.Module,
    trajectory: Iterable[Any] | FlowResult,
    *,
    metric: str = "euclidean",
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
) -> VerticalMotion:
    """Vertical and horizontal lengths of the steps between the points of a trajectory.

    Parameters
    ----------
    manifold_or_model : FactorQuotient, GramQuotient, ProductManifold, or Module
        Groups and shapes; the values of a model do not matter and are not changed.
    trajectory : iterable of points, or FlowResult
        At least two. Points of a model are dicts of parameter names to tensors, such as copies of
        ``state_dict()``; they need all its trainable parameters, and anything else is ignored.
    metric : {"euclidean", "preconditioned", "right-invariant"}
        As for :func:`~quotientopt.flow.projected_gradient_flow`.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        Of the model, by default all that are found.

    Returns
    -------
    VerticalMotion

    Raises
    ------
    TypeError, ValueError
        On something else than a manifold or a model, fewer than two points, points of another
        structure, points of a model that were not copied, or a metric that is not there for a
        group.
    """
    points = list(_points(trajectory))
    if len(points) < 2:
        raise ValueError(f"a trajectory needs at least two points, got {len(points)}")
    subject = _subject(manifold_or_model, points[0], symmetries, metric)
    tensors = [_checked(subject, manifold_or_model, point) for point in points]
    if isinstance(manifold_or_model, nn.Module):
        _refuse_aliases(tensors)
    parts = [_step(subject, x, y) for x, y in pairwise(tensors)]
    return _motion(parts, subject.fibres.isotropic_shares(tensors[0]))


class VerticalLog:
    """Logs how much of every step of an optimizer is gauge.

    Attached at construction, through ``register_step_pre_hook`` and ``register_step_post_hook``;
    detached by :meth:`remove`, or at the end of a ``with`` block. A measured step keeps a copy of
    the parameters while it runs.

    Parameters
    ----------
    model : Module
    optimizer : torch.optim.Optimizer
        Any of torch's, or one with the same hooks.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.
    metric : {"euclidean", "preconditioned", "right-invariant"}
    every : int
        Measure one step in so many, the first one included.

    Attributes
    ----------
    steps : list of int
        Numbers of the measured steps, from 1.

    Raises
    ------
    TypeError
        If the optimizer has no such hooks.
    ValueError
        If `every` is no positive integer, the model has no head symmetry, the optimizer none of
        its parameters, or the metric is not there for a group.

    Examples
    --------
    >>> with qo.flow.VerticalLog(model, optimizer) as log:      # doctest: +SKIP
    ...     train(model, optimizer)
    >>> print(log.motion)                                        # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
        metric: str = "euclidean",
        every: int = 1,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}")
        hooks: list[Callable[..., Any] | None] = [
            getattr(optimizer, f"register_step_{when}_hook", None) for when in ("pre", "post")
        ]
        if hooks[0] is None or hooks[1] is None:
            raise TypeError(
                f"{type(optimizer).__name__} has no register_step_pre_hook and "
                "register_step_post_hook; pass a torch optimizer"
            )
        self._subject = ModelSubject(model, symmetries, metric)
        own = {id(parameter) for parameter in model.parameters()}
        groups = getattr(optimizer, "param_groups", None)
        if groups is not None and not any(id(p) in own for g in groups for p in g["params"]):
            raise ValueError(
                f"this {type(optimizer).__name__} trains no parameter of this "
                f"{type(model).__name__}; pass the optimizer of the model"
            )
        self._every = every
        self._count = 0
        self._before: list[Tensor] | None = None
        self._parts: list[Decomposition] = []
        self._shares = self._subject.fibres.isotropic_shares(self._subject.start)
        self.steps: list[int] = []
        self._handles = [hooks[0](self._before_step), hooks[1](self._after_step)]

    @property
    def motion(self) -> VerticalMotion:
        """Lengths of the measured steps.

        Raises
        ------
        ValueError
            Before the first one.
        """
        if not self._parts:
            raise ValueError("no step has been logged yet")
        return _motion(self._parts, self._shares)

    def remove(self) -> None:
        """Detach from the optimizer; the records stay."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, *_: Any) -> None:
        if self._count % self._every == 0:
            self._before = self._subject.now()

    def _after_step(self, *_: Any) -> None:
        self._count += 1
        if self._before is None:
            return
        parts = _step(self._subject, self._before, self._subject.now())
        # The lengths alone: the vertical part is as large as the model.
        self._parts.append(parts.without_vectors())
        self._before = None
        self.steps.append(self._count)

    def __enter__(self) -> VerticalLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


@torch.no_grad()
def _step(subject: FlowSubject, x: Sequence[Tensor], y: Sequence[Tensor]) -> Decomposition:
    difference = [wide(b) - wide(a) for a, b in zip(x, y, strict=True)]
    return subject.fibres.decompose(x, difference)


def _motion(parts: Sequence[Decomposition], shares: dict[str, float]) -> VerticalMotion:
    def lengths(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([record[name].cpu().double() for record in records]).sqrt()
            for name in records[0]
        }

    return VerticalMotion(
        lengths([p.vertical_squares for p in parts]),
        lengths([p.horizontal_squares for p in parts]),
        torch.stack([p.rest.double() for p in parts]).sqrt(),
        shares,
    )


def _points(trajectory: Any) -> Iterable[Any]:
    if not isinstance(trajectory, FlowResult):
        return trajectory

    def at(part: Any, k: int) -> Any:
        if isinstance(part, Tensor):
            return part[k]
        if isinstance(part, dict):
            return {name: at(entry, k) for name, entry in part.items()}
        return tuple(at(entry, k) for entry in part)

    return [at(trajectory.points, k) for k in range(len(trajectory.t))]


def _subject(
    manifold_or_model: Any,
    first: Any,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
    metric: str,
) -> FlowSubject:
    if isinstance(manifold_or_model, nn.Module):
        return ModelSubject(manifold_or_model, symmetries, metric)
    if not isinstance(manifold_or_model, QuotientManifold):
        raise TypeError(
            "expected a quotient manifold or a torch.nn.Module, got "
            f"{type(manifold_or_model).__name__}"
        )
    if symmetries is not None:
        raise ValueError("symmetries is for models; the manifold knows its groups")
    return ManifoldSubject(manifold_or_model, first, metric)


def _checked(subject: FlowSubject, manifold_or_model: Any, point: Any) -> list[Tensor]:
    if isinstance(manifold_or_model, QuotientManifold):
        manifold_or_model.check_point(point)
    return subject.flat(point)


def _refuse_aliases(points: Sequence[Sequence[Tensor]]) -> None:
    """A ``state_dict()`` follows the model: points that share memory all are its last one."""
    for k, (x, y) in enumerate(pairwise(points)):
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(x, y, strict=True)):
            raise ValueError(
                f"points {k} and {k + 1} of the trajectory share their memory, so that nothing "
                "moves between them; copy every state_dict(), as copy.deepcopy does"
            )


def _over_batch(part: Tensor) -> Tensor:
    """Lengths ``(K, *batch)`` as those of all items of the batch together, ``(K,)``."""
    return part.reshape(len(part), -1).norm(dim=1)


def _over_pairs(lengths: dict[str, Tensor], like: Tensor) -> Tensor:
    squares = [_over_batch(part).square() for part in lengths.values()]
    return torch.stack([torch.zeros_like(like), *squares]).sum(dim=0).sqrt()


def _share(vertical: Tensor, horizontal: Tensor) -> Tensor:
    squares = vertical.square() + horizontal.square()
    return vertical.square() / torch.where(squares > 0, squares, 1)
