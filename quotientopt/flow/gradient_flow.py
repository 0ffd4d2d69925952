"""Projected gradient flow: ``ẋ = −P_H grad f`` on the total space, integrated by SciPy.

After the function itself: the field along the integrator's states, then what may be asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import wide
from quotientopt.flow.fibres import Decomposition, check_metric
from quotientopt.flow.subject import FlowSubject, ManifoldSubject, ModelSubject
from quotientopt.flow.trajectory import FlowEvent, FlowResult
from quotientopt.manifolds import QuotientManifold
from quotientopt.symmetries import HeadSymmetry, SymmetryMap

METHODS = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")
NOT_INVARIANT = ("raise", "warn", "ignore")
_LENGTHS = 2  # the horizontal and the vertical length, integrated along


def projected_gradient_flow(
    manifold_or_model: QuotientManifold[Any] | nn.Module,
    loss: Callable[[Any], Tensor],
    t_span: tuple[float, float],
    *,
    x0: Any = None,
    metric: str = "euclidean",
    project: bool = True,
    not_invariant: str = "raise",
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    method: str = "DOP853",
    rtol: float | None = None,
    atol: float | None = None,
    max_step: float = math.inf,
    max_evaluations: int = 20_000,
    t_eval: Sequence[float] | Tensor | None = None,
    dense_output: bool = False,
    events: Callable[[float, Any], float] | Sequence[Callable[[float, Any], float]] = (),
    move_to_end: bool = False,
) -> FlowResult:
    """Integrate ``ẋ = −P_H grad f`` with :func:`scipy.integrate.solve_ivp`.

    The third scheme of François & Ravera, arXiv 2602.18948: P_H is the orthogonal projection to the
    horizontal space, the complement of the orbits of the structure group. The gradient of an
    invariant function is horizontal, so for such a loss the projection changes nothing but rounding
    (``vertical_share`` of the result says so); it matters for a loss that is not invariant.

    What the flow conserves depends on the metric (``charges`` of the result, per head):

    ===================== ==========================================================================
    metric                conserved
    ===================== ==========================================================================
    ``"euclidean"``       the Noether charge ``A Aᵀ − B Bᵀ``, projected to the symmetric part of the
                          Lie algebra: all of it for GL(r), ``|a|² − |b|²`` of every rotary plane;
                          nothing for compact groups
    ``"preconditioned"``  ``log det(A Aᵀ) − log det(B Bᵀ)``; ``log |a|² − log |b|²`` of every plane;
    ``"right-invariant"`` nothing for compact groups
    ===================== ==========================================================================

    The Euclidean metric is that of the weights as they are, the flow that small steps of gradient
    descent follow; it depends on the gauge. The flows of the two other metrics, those of
    :class:`~quotientopt.manifolds.FactorQuotient`, are the same curve of invariants in every gauge.

    Parameters
    ----------
    manifold_or_model : FactorQuotient, GramQuotient, ProductManifold, or Module
        On a manifold the groups and shapes count, and not its own metric. Of a model the trainable
        parameters flow, those outside the pairs by their Euclidean gradient. Its head symmetries
        are divided out, rotations of its residual stream are not.
    loss : callable
        ``loss(x)`` of the point, one number or one per batch item (they are added), or
        ``loss(model)``. Differentiable by autograd, deterministic, and invariant. For a model it is
        usually the loss of one fixed batch, ``lambda model: criterion(model(inputs), targets)``.
    t_span : (float, float)
        Start and end, in this order.
    x0 : point, optional
        The start on a manifold. A model starts where it is.
    metric : {"euclidean", "preconditioned", "right-invariant"}
        Token matrices and groups of normalised heads other than O(r) have the first only.
    project : bool
        Whether to project. Without it the field is ``−grad f`` itself, and `not_invariant` is not
        looked at.
    not_invariant : {"raise", "warn", "ignore"}
        What to do when the vertical part of the gradient is more than rounding, √ε of the largest
        gradient so far: then the loss is not invariant, and the projected flow not the gradient
        flow of anything.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        Of the model, by default all that are found.
    method : str
        A method of ``solve_ivp``. Implicit ones find Jacobians by differences, one gradient per
        parameter.
    rtol, atol : float, optional
        Tolerances; by default 1e-8 and 1e-10, and 1e-4 and 1e-6 where anything is stored in
        float32.
    max_step : float
        Longest step in time.
    max_evaluations : int
        Of the gradient, before giving up. Where the curvature is large, as at the small embeddings
        that norms meet in a fresh model, a flow needs many small steps.
    t_eval : sequence of float, optional
        Increasing times to record within `t_span`; by default the integrator's steps.
    dense_output : bool
        Whether to keep the interpolant ``sol``.
    events : callable or sequence of callable
        ``event(t, x) -> float`` with the point, or the model at the point; where its sign changes
        is located. Attributes ``terminal`` and ``direction`` as in ``solve_ivp``.
    move_to_end : bool
        Leave the model at the end point, if the integration succeeded. By default, and after any
        error, parameters and buffers are as they were, bit for bit; gradients are not touched.

    Returns
    -------
    FlowResult

    Raises
    ------
    ModuleNotFoundError
        Without SciPy.
    TypeError
        If the first argument is neither a manifold nor a model, or the loss returns no real tensor.
    RuntimeError
        After more than `max_evaluations` evaluations.
    ValueError
        On half precision, the meta device, options that do not fit, a loss that is not finite, not
        deterministic, does not depend on the point, or is not invariant (`not_invariant="raise"`).
    """
    functions = (events,) if callable(events) else tuple(events)
    span = check_options(t_span, metric, method, not_invariant, max_step, max_evaluations)
    times = check_times(t_eval, span)
    solve_ivp = _solver()
    subject = _subject(manifold_or_model, x0, symmetries, metric, move_to_end)
    tolerances = tolerances_of(subject.start, rtol, atol)
    flow = _Flow(subject, loss, project, not_invariant, max_evaluations)
    done = False
    try:
        flow.check_start()
        solution = solve_ivp(
            flow.velocity,
            span,
            flow.state(subject.start),
            method=method,
            t_eval=times,
            # The end lies past the last of the times that are asked for.
            dense_output=dense_output or (move_to_end and times is not None),
            events=[flow.event(function) for function in functions] or None,
            max_step=max_step,
            rtol=tolerances[0],
            atol=tolerances[1],
        )
        result = flow.result(solution, dense_output, len(functions))
        done = move_to_end and result.success
        if done:
            end = solution.y[:, -1] if times is None else solution.sol(solution.sol.t_max)
            subject.visit(flow.tensors(end))
    finally:
        if not done:
            subject.restore()
    return result


class _Flow:
    """The field, and the way between points and the flat state of the integrator."""

    def __init__(
        self,
        subject: FlowSubject,
        loss: Callable[[Any], Tensor],
        project: bool,
        not_invariant: str,
        max_evaluations: int,
    ) -> None:
        self._subject, self._loss, self._project = subject, loss, project
        self._evaluations, self._most = 0, max_evaluations
        self._not_invariant = not_invariant if project else "ignore"
        self._largest = 0.0
        epsilon = max(torch.finfo(tensor.dtype).eps for tensor in subject.start)
        self._tolerance = epsilon**0.5

    def check_start(self) -> None:
        """Refuse a loss that is not finite or not deterministic."""
        first, second = (
            self._subject.loss_and_gradient(self._loss, self._subject.start)[0] for _ in range(2)
        )
        if not math.isfinite(first):
            raise ValueError(f"the loss is {first} at the start; choose another one")
        if first != second:
            raise ValueError(
                f"the loss is not deterministic ({first!r}, then {second!r} at the start); fix its "
                "batch and call model.eval()"
            )

    def state(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors and two lengths as a NumPy vector."""
        flat = [wide(tensor).reshape(-1).cpu().double() for tensor in tensors]
        return torch.cat([*flat, torch.zeros(_LENGTHS, dtype=torch.float64)]).numpy()

    def tensors(self, state: Any) -> list[Tensor]:
        """The tensors of a state, or of states along further dimensions in front."""
        flat = torch.from_numpy(state.copy())[..., : state.shape[-1] - _LENGTHS]
        start = self._subject.start
        parts = flat.split([tensor.numel() for tensor in start], dim=-1)
        return [
            part.reshape(*part.shape[:-1], *like.shape).to(like)
            for part, like in zip(parts, start, strict=True)
        ]

    def velocity(self, t: float, state: Any) -> Any:
        """Right-hand side of the differential equation; what is not finite makes steps shorter."""
        if not math.isfinite(state.sum()):
            return state * math.nan
        self._evaluations += 1
        if self._evaluations > self._most:
            raise RuntimeError(
                f"the flow took more than {self._most} evaluations to come to t = {t:.3g}: raise "
                "max_evaluations, loosen rtol and atol, or shorten t_span"
            )
        _, gradient, parts = self._gradient(self.tensors(state))
        self._check_invariance(parts)
        field = [wide(g) for g in gradient]
        if self._project:
            field = [g - v for g, v in zip(field, parts.vertical, strict=True)]
        velocity = self.state([-g for g in field])
        velocity[-2] = math.sqrt(parts.horizontal_square.item())
        velocity[-1] = math.sqrt(parts.vertical_square.item())
        return velocity

    def event(self, function: Callable[[float, Any], float]) -> Callable[[float, Any], float]:
        """An event function of the state."""

        @torch.no_grad()
        def event(t: float, state: Any) -> float:
            return float(function(t, self._subject.visit(self.tensors(state))))

        for attribute in ("terminal", "direction"):
            if hasattr(function, attribute):
                setattr(event, attribute, getattr(function, attribute))
        return event

    def result(self, solution: Any, dense_output: bool, events: int) -> FlowResult:
        """Everything along the recorded states."""
        states = solution.y.T
        if not len(states):
            raise ValueError(f"the flow ended before the first of t_eval: {solution.message}")
        stacked = self.tensors(states)
        rows = []
        for k in range(len(states)):
            tensors = [tensor[k] for tensor in stacked]
            loss, _, parts = self._gradient(tensors)
            size = math.sqrt((parts.horizontal_square + parts.vertical_square).item())
            share = math.sqrt(parts.vertical_square.item()) / size if size > 0 else 0.0
            fibres = self._subject.fibres
            rows.append((loss, size, share, fibres.charges(tensors), fibres.spectra(tensors)))
        losses, sizes, shares, charges, spectra = zip(*rows, strict=True)

        def vector(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        def over_time(records: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([r[name] for r in records]) for name in records[0]}

        return FlowResult(
            t=vector(solution.t.tolist()),
            loss=vector(losses),
            points=self._subject.structured(stacked),
            charges=over_time(charges),
            invariants=over_time(spectra),
            gradient_norm=vector(sizes),
            vertical_share=vector(shares),
            horizontal_length=vector(states[:, -2].tolist()),
            vertical_length=vector(states[:, -1].tolist()),
            sol=self._dense(solution.sol) if dense_output else None,
            events=tuple(
                FlowEvent(
                    vector(solution.t_events[k].tolist()),
                    [self._point(state) for state in solution.y_events[k]],
                )
                for k in range(events)
            ),
            success=bool(solution.success),
            message=str(solution.message),
            evaluations=int(solution.nfev),
        )

    def _point(self, state: Any) -> Any:
        return self._subject.structured(self.tensors(state))

    def _dense(self, sol: Any) -> Callable[[float], Any]:
        low, high = float(sol.t_min), float(sol.t_max)

        def at(t: float) -> Any:
            if not low <= t <= high:
                raise ValueError(f"t must lie between {low} and {high}, got {t}")
            return self._point(sol(float(t)))

        return at

    def _gradient(self, tensors: list[Tensor]) -> tuple[float, list[Tensor], Decomposition]:
        """Loss, gradient in the metric, and the parts of the gradient."""
        loss, partials = self._subject.loss_and_gradient(self._loss, tensors)
        gradient = self._subject.fibres.gradient(tensors, partials)
        return loss, gradient, self._subject.fibres.decompose(tensors, gradient)

    def _check_invariance(self, parts: Decomposition) -> None:
        vertical = math.sqrt(parts.vertical_square.item())
        size = math.hypot(math.sqrt(parts.horizontal_square.item()), vertical)
        self._largest = max(self._largest, size if math.isfinite(size) else 0.0)
        if self._not_invariant == "ignore" or not vertical > self._tolerance * self._largest:
            return
        squares = {name: square.sum().item() for name, square in parts.vertical_squares.items()}
        message = (
            f"the loss is not invariant: {vertical / size:.1e} of its gradient is vertical, most "
            f"of it at {max(squares, key=lambda name: squares[name])!r}; divide out other "
            "symmetries, or pass project=False or not_invariant='ignore'"
        )
        if self._not_invariant == "raise":
            raise ValueError(message)
        self._not_invariant = "ignore"
        warnings.warn(message, UserWarning, stacklevel=2)


def _solver() -> Callable[..., Any]:
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ModuleNotFoundError(
            "projected_gradient_flow needs SciPy: pip install scipy", name="scipy"
        ) from error
    return solve_ivp


def _subject(
    manifold_or_model: Any,
    x0: Any,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
    metric: str,
    move_to_end: bool,
) -> FlowSubject:
    if isinstance(manifold_or_model, nn.Module):
        if x0 is not None:
            raise ValueError("x0 is for manifolds; a model starts where it is: load x0 into it")
        return ModelSubject(manifold_or_model, symmetries, metric)
    if not isinstance(manifold_or_model, QuotientManifold):
        raise TypeError(
            "expected a quotient manifold or a torch.nn.Module, got "
            f"{type(manifold_or_model).__name__}"
        )
    if x0 is None:
        raise ValueError(
            "a flow on a manifold needs x0, for example manifold.random_point(dtype=torch.float64)"
        )
    if symmetries is not None or move_to_end:
        option = "symmetries" if symmetries is not None else "move_to_end"
        raise ValueError(f"{option} is for models; the manifold knows its groups, and has no state")
    return ManifoldSubject(manifold_or_model, x0, metric)


def check_options(
    t_span: Any,
    metric: str,
    method: str,
    not_invariant: str,
    max_step: float,
    max_evaluations: int,
) -> tuple[float, float]:
    """Start and end of the time, once all of these options fit; ``ValueError`` if one does not."""
    check_metric(metric)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not_invariant not in NOT_INVARIANT:
        raise ValueError(f"not_invariant must be one of {NOT_INVARIANT}, got {not_invariant!r}")
    if not max_step > 0:
        raise ValueError(f"max_step must be positive, got {max_step!r}")
    if not isinstance(max_evaluations, int) or max_evaluations < 1:
        raise ValueError(f"max_evaluations must be a positive integer, got {max_evaluations!r}")
    try:
        start, end = (float(t) for t in t_span)
    except (TypeError, ValueError):
        raise ValueError(f"t_span must be a pair (start, end) of numbers, got {t_span!r}") from None
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(
            f"t_span must be finite with start < end, got ({start}, {end}): the flow descends "
            "forwards in time"
        )
    return start, end


def check_times(t_eval: Any, span: tuple[float, float]) -> list[float] | None:
    """The times to record; ``ValueError`` unless they increase within the span."""
    if t_eval is None:
        return None
    times = [float(t) for t in t_eval]
    increasing = all(a < b for a, b in pairwise(times))
    if not times or not increasing or not (span[0] <= times[0] and times[-1] <= span[1]):
        raise ValueError(f"t_eval must be increasing times within t_span = {span}")
    return times


def tolerances_of(
    tensors: Sequence[Tensor], rtol: float | None, atol: float | None
) -> tuple[float, float]:
    """rtol and atol; ``ValueError`` if they, or the dtypes, are not fit for a flow."""
    coarsest = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    if coarsest not in (torch.float32, torch.float64):
        raise ValueError(
            f"a flow needs float32 or float64, got {coarsest}, whose rounding is larger than any "
            "useful tolerance; call .double()"
        )
    single = coarsest == torch.float32
    rtol = (1e-4 if single else 1e-8) if rtol is None else rtol
    atol = (1e-6 if single else 1e-10) if atol is None else atol
    least = 100 * torch.finfo(coarsest).eps
    if not rtol >= least or not math.isfinite(rtol):
        raise ValueError(
            f"rtol must be at least {least:.1e} for {coarsest}, got {rtol!r}"
            + ("; call .double() for less" if single else "")
        )
    if not 0 < atol < math.inf:
        raise ValueError(f"atol must be positive, got {atol!r}")
    return rtol, atol
