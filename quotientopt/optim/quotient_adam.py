"""QuotientAdam: Adam on dressed fields.

:mod:`quotientopt.optim.reference` has it in its plainest form, :mod:`quotientopt.optim.update` its
formulas. A step here is prepared, refused or not (``bookkeeping.checks``), and taken: over all
framed parameters by the :mod:`~quotientopt.optim.engine`, on stacks by its
:mod:`~quotientopt.optim.buckets`, with those formulas and :mod:`~quotientopt.optim.polar`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from quotientopt.optim.bookkeeping.checks import (
    NonfiniteGate,
    clip_scale,
    full_precision,
    gradients_of,
    kept_from_overflow,
    loss_of,
    norms_of,
    refuse_changed_options,
    refuse_nonfinite,
    refuse_replaced,
    refuse_sparse,
    signature_of,
    takes_part,
)
from quotientopt.optim.bookkeeping.slices import Slices, find_slices
from quotientopt.optim.bookkeeping.stacking import planned_groups
from quotientopt.optim.bookkeeping.state import (
    KEYS,
    PLAIN_KEYS,
    follow_version,
    refuse_framed_state,
    settle,
)
from quotientopt.optim.engine import Engine, Peers, PreparedStep
from quotientopt.optim.gauge import (
    Held,
    absorbed_biases,
    begin,
    finish,
    move_,
    put_back,
    refuse_unmovable,
    refuse_untaken_translations,
)
from quotientopt.optim.options import OPTIONS, refuse_bad_hyperparameters, refuse_mixed_groups
from quotientopt.optim.symmetric_optimizer import SymmetricOptimizer
from quotientopt.optim.update import adamw_step
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.block import any_sharded

if TYPE_CHECKING:
    from quotientopt.optim.sharded.step import Sharded


class QuotientAdam(SymmetricOptimizer):
    r"""AdamW on dressed fields: an Adam that cannot see a Transformer's gauge.

    Adam's own symmetry group is the signed permutations. Where a model has a larger one, GL(r) on
    every attention head or O(d) on the residual stream, a dressing field u reduces it to signed
    permutations, and Adam runs on the dressed gradients u∂, with both moments in the frame:

    .. math:: m \leftarrow β_1 m + (1-β_1)\, u∂Q, \quad v \leftarrow β_2 v + (1-β_2) (u∂Q)^2,
       \quad D = \frac{\hat m}{\sqrt{\hat v} + ε},
       \quad W \leftarrow (1 - ηsλ) W - ηs\, u^T p(D) Q^T,

    p(D) the polar factor of D at the size of D and s = ``update_scale``. Head frames u = O g₀ come
    from a section g₀ of the pair and the eigenvectors O of the covariance of dressed gradients,
    residual frames Q from those along the residual axis. Frames are made afresh every
    ``refresh_every`` steps, at first more often, and the moments move with them. The trajectory is
    exactly equivariant: from x and from g·x the losses are the same, moments included. Parameters
    without a symmetry get torch's AdamW.

    Parameters
    ----------
    model_or_params : Module or iterable
        A model, whose symmetries are found by :func:`quotientopt.find_symmetries`; or tensors,
        named tensors or param-group dicts, with ``symmetries`` from the caller.
    lr : float or Tensor
        Learning rate, on AdamW's scale.
    betas, eps : tuple of float, float
        Decay of the moments, and what is added to the denominator, in dressed coordinates.
    weight_decay : float
        λ of decoupled weight decay, at the rate of the update; it is linear and hence equivariant.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        Of a model, in place of what would be found.
    example_inputs : Tensor, tuple, list or mapping, optional
        A batch, from which what no class tells is found (:func:`quotientopt.find_symmetries`).
    hidden_units : bool
        Dress the scales of hidden units (``symmetries.hidden_units``: gated, ReLU layers) as well;
        these units have no ``hidden_frame`` then. Meant for ``polar=True``; else units are apart.
    head_frame : {"balanced", "orthonormal", "svd"} or None
        Of attention heads. ``"balanced"``: the section with AAᵀ = BBᵀ, turned into the eigenframe
        of the dressed covariance; ``"orthonormal"``: coordinates of the partner, also turned;
        ``"svd"``: singular vectors of AᵀB. For groups of rotations: eigenframes.
    row_frame : {"per_matrix", "per_head"}
        What an eigenframe turns: the rows of all heads of a matrix together, framed on both sides
        then as by SOAP, by orthogonal iteration; or each head's, by r × r eigen-decompositions.
    hidden_frame : {"leading", "per_matrix"} or None
        Of hidden units, the other axis of the stream's matrices without heads, but experts': frames
        of d/2 leading directions of their gradients' covariance, or eigenframes of all, as SOAP has
        them, at the cost of the rest of a step. No symmetry asks for them.
    residual_frame : {"per_matrix", "shared"} or None
        One frame for each matrix, or stack of experts, on the residual stream; one for all; none.
    embedding_frame : {"fixed", "fixed_but_head", "per_matrix"}
        Of tables, heads outside the numbered layers. ``"fixed"``: coordinates of the stream made
        once, from weights, and no polar step; or the same, but frames of an untied head follow.
    refresh_every : int
        Steps between fresh frames; an eighth of the steps so far, while that is shorter.
    max_grad_norm : float, optional
        Clips the norm of all dressed gradients together, which no gauge changes.
    nesterov, maximize : bool
        Nesterov momentum, for the framed parameters; maximize the objective.
    second_moment : {"full", "factored"}
        Of framed matrices: by entry, or from means of rows and columns (as in Adafactor).
    polar : bool or "step"
        True: a framed matrix's update becomes its polar factor at the same norm, heads together, by
        polynomials, within 7.5 %. "step": one, head by head, as in version 0.1.0. False: Adam's.
    update_scale : float
        Size s of the update of a framed matrix over that of Adam's, ‖ΔW‖_F = ηs ‖D‖_F, and of its
        weight decay, ηsλ. Its singular values being nearly equal, its spectral norm is several
        times smaller: with four AdamW's learning rate is right. Biases, LoRA pairs: Adam's size.
    embedding_scale : float
        The same of embeddings in fixed frames, over others'; of width d > 128 128/d of it, or ⅛.
    precision : {"highest", "high", "fast"}
        Of rotations and polar steps in float32: as they are, in TF32 on CUDA devices, or of factors
        rounded to bfloat16. Twins part by the rounding. No switch of torch's changes the rest.
    lora_frame : {"transported", "orthonormal", "balanced", "svd"} or None
        Of LoRA pairs (:mod:`quotientopt.peft`). ``"transported"``: each factor in orthonormal
        coordinates of its partner, which moments follow; defined where a factor is zero. Else as
        ``head_frame``; None is AdamW.
    lora_polar : bool
        ``polar`` for LoRA pairs with ``lora_frame="transported"``.
    foreach : bool, optional
        False: slices of equal shape are not stacked. Plain parameters as torch chooses.
    master_weights, stochastic_rounding : bool
        Keep float32 copies of narrower parameters in the state; round them to one of their two
        neighbours at odds that keep the mean.
    capturable : bool
        Steps that are alike, to be recorded as a CUDA graph: counts on the device, covariances of
        every gradient, frames made in steps taken directly and by :meth:`refresh_frames`.

    Raises
    ------
    ValueError
        For an unknown option, a pair split over param groups, a parameter covered in part; in
        :meth:`step` for gradients and factors that are not finite. Nothing has changed then.

    Notes
    -----
    The state is dressed (:mod:`quotientopt.optim.bookkeeping.state`). Only frames change with the
    gauge: u to ``u g^{-1}`` on the left and ``u gᵀ`` on the right side, Q to ``O Q``.

    Sources: François & Ravera, arXiv 2602.18948 (dressing fields); Kingma & Ba 2015; Loshchilov &
    Hutter 2019; Vyas et al., arXiv 2409.11321 (Adam in an eigenbasis).
    """

    _torch_name = "torch.optim.AdamW"
    _marks = ("head_frame", "betas")
    _keys = KEYS

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
        example_inputs: Any = None,
        hidden_units: bool = False,
        head_frame: Literal["balanced", "orthonormal", "svd"] | None = "balanced",
        row_frame: Literal["per_matrix", "per_head"] = "per_matrix",
        hidden_frame: Literal["leading", "per_matrix"] | None = None,
        residual_frame: Literal["per_matrix", "shared"] | None = "per_matrix",
        embedding_frame: Literal["fixed", "fixed_but_head", "per_matrix"] = "fixed",
        refresh_every: int = 10,
        max_grad_norm: float | None = None,
        nesterov: bool = True,
        second_moment: Literal["full", "factored"] = "full",
        polar: bool | Literal["step"] = True,
        update_scale: float = 4.0,
        embedding_scale: float = 2.0,
        precision: Literal["highest", "high", "fast"] = "highest",
        lora_frame: Literal["transported", "balanced", "orthonormal", "svd"] | None = "transported",
        lora_polar: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        arguments = dict(locals())
        defaults = {option: arguments[option] for option in OPTIONS}
        self._engine: Engine | None = None
        self._peers = Peers()
        self._sharded: Sharded | None = None  # the step of sharded parameters
        self._slices = Slices()
        self._nonfinite = NonfiniteGate()
        self._checked_options: list[list[Any]] = []
        self._hidden_units = hidden_units
        super().__init__(model_or_params, defaults, symmetries, example_inputs)

    def _refuse_options(self, options: Mapping[str, Any]) -> None:
        refuse_bad_hyperparameters(options)

    def _dressed(self, symmetries: SymmetryMap) -> SymmetryMap:
        return symmetries.units_as_heads() if self._hidden_units else symmetries

    def _plan(self) -> None:
        """Cut the parameters into slices; state is allocated at the next step."""
        refuse_mixed_groups(self.param_groups)
        self._refuse_replaced()
        if any_sharded(self._parameters()):
            # Only here: torch.distributed is not there on every platform.
            from quotientopt.optim.sharded.step import planned

            self._sharded, self._absorbed = planned(self, self._sharded), []
        else:
            if self._engine is not None:  # A new one could not tell.
                self._asked |= self._engine.were_written()
            self._slices, self._engine = self._find_slices(), None
            self._absorbed = absorbed_biases(self.symmetries.heads, self.param_groups)
        self._signature = signature_of(self.param_groups)

    def _current_sharded(self) -> Sharded | None:
        """The step of sharded parameters as they are now; None for whole ones."""
        if self._signature != signature_of(self.param_groups) and any_sharded(self._parameters()):
            self._plan()
        return self._sharded

    def _find_slices(self, also: Container[Tensor] = ()) -> Slices:
        """Slices of the parameters that are trained, and of those in ``also``."""
        groups = planned_groups(self.param_groups, also)
        return find_slices(groups, self.symmetries, self._names, self._peers.outside)

    def _current_engine(self) -> Engine:
        """The engine for the parameters and the state as they are now."""
        if self._signature != signature_of(self.param_groups):
            self._plan()
        if self._engine is None or not self._engine.holds(self.state):
            self._engine = self._engine_of(self._slices)
        return self._engine

    def _engine_of(self, slices: Slices) -> Engine:
        refuse_framed_state((p for own in slices.plain for p in own), self.state, self._name)
        return Engine(slices, self.param_groups, self.state, self._peers)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        ValueError
            For NaN or infinite gradients (names the parameter) and for factors that are not finite;
            nothing has changed then. On an accelerator it comes with the next fresh frames.
        """
        loss = loss_of(closure)
        sharded = self._current_sharded()
        with full_precision():
            if sharded is not None:
                sharded.step()
            elif gradients_of(self.param_groups):
                if self._signature != signature_of(self.param_groups):
                    self._plan()  # Which output biases are trained may have changed.
                held = begin(self._absorbed) if self._absorbed else []
                try:
                    self._step(gradients_of(self.param_groups), held)
                finally:
                    if held:
                        put_back(held)
        return loss

    def _step(self, gradients: dict[Tensor, Tensor], held: Sequence[Held]) -> None:
        """One step with the gradients of the parameters that have one."""
        prepared = self._prepare(gradients)
        norms, limit = list(prepared.norms), self.param_groups[0]["max_grad_norm"]
        gate = None
        if self._nonfinite.is_needed(norms):
            gate = self._nonfinite.close_on_nonfinite(norms, prepared.dressed_stacks)
        else:
            norms, limit = kept_from_overflow(norms, prepared.measured, limit)
            refuse_nonfinite(norms, gradients, self._name)
        self._take(prepared, clip_scale(norms, limit), gate, held)

    def _prepare(self, gradients: dict[Tensor, Tensor]) -> PreparedStep:
        """Frames that are due and dressed gradients; changes nothing."""
        refuse_sparse(gradients, self._name)
        self._checked_options = refuse_changed_options(self.param_groups, self._checked_options)
        engine = self._current_engine()
        for own in self._slices.plain:
            refuse_replaced(own, self.state, PLAIN_KEYS, self._name)
        # Where it need not wait for the device, the host looks at more.
        look = not self._nonfinite.is_needed(list(gradients.values()))
        if self._asked:
            engine.ask()
        prepared = engine.prepare(self._nonfinite.refuse_earlier, look=look)
        plain = [p.grad for own in self._slices.plain for p in own if p.grad is not None]
        measured = [*prepared.dressed_stacks, *plain]
        clipped = self.param_groups[0]["max_grad_norm"] is not None
        return prepared._replace(norms=norms_of(measured, clipped=clipped), measured=measured)

    def _take(
        self,
        prepared: PreparedStep,
        scale: Tensor | None,
        gate: Tensor | None,
        held: Sequence[Held],
    ) -> None:
        """Take a prepared step, its gradients times ``scale``."""
        prepared.engine.take(prepared, scale, gate)
        for group, own in zip(self.param_groups, self._slices.plain, strict=True):
            adamw_step(group, [p for p in own if p.grad is not None], self.state, scale, gate)
        if held:
            finish(held, self._absorbed, gate, self.state)
        prepared.engine.mark(prepared.look)
        self._asked = False

    @torch.no_grad()
    @full_precision()
    def refresh_frames(self) -> None:
        """Make frames afresh, between steps.

        :meth:`step` does so by itself every ``refresh_every`` steps, but not when it is replayed
        as a CUDA graph: call this between replays.

        Raises
        ------
        ValueError
            For factors that are not finite, and where an earlier gradient was not finite.
        """
        sharded = self._current_sharded()
        if sharded is not None:
            sharded.refresh_frames()
        elif self.state:
            engine = self._current_engine()
            self._nonfinite.refuse_earlier()
            engine.refresh(engine.fresh_dressings())

    def _move_state_(self, element: Mapping[str, Tensor]) -> None:
        self.symmetries.refuse_sharded()
        # Frozen parameters may have state too, which must not be left behind.
        slices = self._find_slices(also=self.state)
        refuse_unmovable(element, self.symmetries, slices)
        absorbed = absorbed_biases(self.symmetries.heads, self.param_groups)
        refuse_untaken_translations(element, self.symmetries, absorbed)
        if self.state and all(takes_part(parameter) for parameter in self.state):
            # In place, as recorded CUDA graphs need it.
            move_(self._current_engine(), element)
        elif self.state:
            move_(self._engine_of(slices), element)
            self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        if self._sharded is not None:
            self._sharded.refuse_copies()
        return super().__getstate__()

    def _takes_states_of_torch(self) -> bool:
        return True  # framed parameters miss their frames there

    def _settle(self, loaded: Mapping[str, Any]) -> None:
        """Undo torch's cast of the state of slices and of wide copies, and take it over."""
        for group in self.param_groups:
            self._refuse_options(group)
        slices = self._find_slices(also=self.state)
        settle(self.state, self.param_groups, loaded, slices, self._name)
        self._engine = None
        self._plan()
        if self.state:
            self._current_engine()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._nonfinite = NonfiniteGate()
        self.__dict__.setdefault("_peers", Peers())
        self.__dict__.setdefault("_sharded", None)
        self._engine, self._checked_options = None, []
        for group in state.get("param_groups", ()):
            follow_version(group)
        super().__setstate__(state)
