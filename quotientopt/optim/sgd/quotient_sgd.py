"""QuotientSGD: Riemannian gradient descent with transported momentum.

Pairs are stepped in stacks by :mod:`quotientopt.optim.sgd.pairs`, in the metrics of
:mod:`quotientopt.optim.sgd.metrics`; what no symmetry covers steps as torch's SGD does,
:mod:`quotientopt.optim.sgd.plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from quotientopt._linalg import compute_dtype
from quotientopt.optim.bookkeeping.checks import (
    full_precision,
    gradients_of,
    loss_of,
    signature_of,
    takes_part,
)
from quotientopt.optim.bookkeeping.slices import Slice, find_slices
from quotientopt.optim.gauge import (
    Held,
    absorbed_biases,
    begin,
    finish,
    put_back,
    refuse_foreign_element,
    refuse_untaken_translations,
)
from quotientopt.optim.options import refuse_bad_options
from quotientopt.optim.sgd.metrics import refuse_unknown_geometry
from quotientopt.optim.sgd.pairs import (
    SymmetricPair,
    batches,
    largest_entries,
    refuse_nonfinite_entries,
    refuse_sparse_of_pairs,
)
from quotientopt.optim.sgd.plain import BUFFER, sgd_step, sgd_step_of_block
from quotientopt.optim.symmetric_optimizer import SymmetricOptimizer
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.block import any_sharded
from quotientopt.symmetries.map import RESIDUAL
from quotientopt.symmetries.pairs import refuse_scattered


class QuotientSGD(SymmetricOptimizer):
    r"""Gradient descent on the quotient of a model's head symmetries, with momentum.

    Every factor pair (A, B) of an attention head is a point of the quotient by its structure group,
    and steps against the Riemannian gradient of an invariant metric, with Grams
    :math:`S_A = AA^T`, :math:`S_B = BB^T`:

    .. math:: u \leftarrow μ\,P_x(u) + \mathrm{grad}, \quad
       \mathrm{grad} = (S_B^{-1} ∂_A,\ S_A^{-1} ∂_B), \quad x \leftarrow (1-ηλ)\,x - η\,u.

    The momentum u is a tangent vector; it is transported to the new point by the horizontal
    projection P there. From x and from g·x the losses are the same, momentum included. All other
    parameters get torch's SGD, which commutes with rotations of the residual stream; the
    Riemannian gradients do too.

    Parameters
    ----------
    model_or_params : Module or iterable
        A model, whose symmetries are found by :func:`quotientopt.find_symmetries`; or tensors,
        named tensors or param-group dicts, with ``symmetries`` from the caller.
    lr : float or Tensor
        Learning rate η.
    momentum : float
        Momentum μ.
    nesterov : bool
        Step along ``grad + μ u`` instead of u; needs a momentum above zero.
    weight_decay : float
        λ. For the parameters of a pair decoupled, ``W ← (1 − ηλ) W``, which is linear and hence
        equivariant (an L2 penalty in the gradient is not: it would be divided by S). For all
        others coupled to the gradient, as in torch.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        For a model, overrides what would be found.
    example_inputs : Tensor, tuple, list or mapping, optional
        A batch, with which the model is called once: what no class tells is then found and proved
        (see :func:`quotientopt.find_symmetries`).
    metric : {"preconditioned", "right-invariant"}
        ``"preconditioned"``: each factor is measured by what it does to ``AᵀB``; this is scaled
        gradient descent. ``"right-invariant"``: each factor is measured relative to itself, with
        gradient ``(S_A ∂_A, S_B ∂_B)``; not for the group O(r).
    maximize : bool
        Maximize the objective.
    foreach : bool, optional
        None and True: pairs of equal shape are stacked and updated at once, other parameters as
        torch chooses. False: one by one.

    Raises
    ------
    ValueError
        For an option out of range, a pair split over param groups, a parameter covered partly by
        symmetries, a group without a known metric; in :meth:`step` for a factor that is not finite
        (:class:`RankError`) and for gradients that are NaN or infinite (:class:`GradientError`).
        Parameters and state stay as they were.

    Notes
    -----
    State of a parameter, once momentum is used: ``momentum_buffer``, of the parameter's shape, in
    at least float32 for those of a pair. It moves with the parameters: ``g^{-T} u`` on the left
    and ``g u`` on the right factor, ``u Oᵀ`` on the residual axis (:meth:`move_state_`).

    Under a rotary commutant a rotated plane is one complex row; Grams and projections are those of
    the planes, and of the rows that pass.

    Biases that may be translated (``HeadSymmetry.translation``) are no part of a Gram. Output
    matrices step along their gradient at fixed effective bias ``b_O + Σ_h W_O b_V``, which steps
    as SGD steps b_O, so that a translation of the values' biases changes no loss either; it leaves
    the momentum as it is.

    A factor that is frozen, or has no gradient in a step, serves as geometry; its partner then has
    no vertical directions and its momentum is not projected.

    Sources: Mishra et al. 2012, Tong, Ma & Chi 2021 (scaled gradient descent); Absil, Mahony &
    Sepulchre 2008 (quotients, transport by projection); da Silva, Dangel & Oore, arXiv 2505.05409
    (metrics on attention); François & Ravera, arXiv 2602.18948.

    Examples
    --------
    >>> optimizer = QuotientSGD(model, lr=0.1, momentum=0.9)      # doctest: +SKIP
    """

    _torch_name = "torch.optim.SGD"
    _marks = ("metric", "momentum")
    _keys = (BUFFER,)

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
        example_inputs: Any = None,
        metric: Literal["preconditioned", "right-invariant"] = "preconditioned",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "metric": metric,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(model_or_params, defaults, symmetries, example_inputs)

    def _refuse_options(self, options: Mapping[str, Any]) -> None:
        refuse_bad_options(options)

    def _plan(self) -> None:
        """Tell pairs, rests of fused parameters and plain parameters apart."""
        self._refuse_replaced()
        if any_sharded(p for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "QuotientSGD steps whole parameters, and these are sharded over processes "
                "(DTensors); use QuotientAdam, which steps them where pairs are whole"
            )
        owners = {
            id(p): i
            for i, group in enumerate(self.param_groups)
            for p in group["params"]
            if takes_part(p)
        }
        pairs = []
        for symmetry in self.symmetries.heads:
            indices = tuple(owners.get(id(block.parameter)) for block in symmetry.blocks)
            if any(index is not None for index in indices):
                pair = SymmetricPair(symmetry, indices)
                refuse_scattered(symmetry)
                metric = self.param_groups[pair.owner]["metric"]
                refuse_unknown_geometry(symmetry.group, metric, symmetry.name)
                pairs.append(pair)
        taking_part = [
            {
                "params": [p for p in group["params"] if takes_part(p)],
                "head_frame": True,
                "residual_frame": None,
            }
            for group in self.param_groups
        ]
        slices = find_slices(taking_part, self.symmetries, self._names)
        for pair in pairs:
            pair.refuse_mixed_options(self.param_groups, self._name)
        self._pairs = pairs
        self._uncovered: list[Slice] = [
            slice_ for slice_ in slices.framed if slice_.symmetry is None
        ]
        self._framed = {id(slice_.parameter): slice_.name for slice_ in slices.framed}
        self._plain = slices.plain
        self._absorbed = absorbed_biases(self.symmetries.heads, self.param_groups)
        self._signature = self._current_signature()

    def _current_signature(self) -> tuple[Any, ...]:
        """What the plan depends on; it is made anew when this changes."""
        return signature_of(self.param_groups, ("metric",))

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
            For NaN or infinite gradients (names the parameter) and for factors that are not finite
            (names the symmetry); parameters and state stay as they were.
        """
        loss = loss_of(closure)
        gradients = gradients_of(self.param_groups)
        if gradients:
            with full_precision():
                if self._signature != self._current_signature():
                    self._plan()
                held = begin(self._absorbed, coupled=True)
                try:
                    self._step(gradients_of(self.param_groups), held)
                finally:
                    put_back(held)
        return loss

    def _step(self, gradients: dict[Tensor, Tensor], held: Sequence[Held]) -> None:
        """One step with the gradients of the parameters that have one."""
        named = ((self._framed[id(p)], g) for p, g in gradients.items() if id(p) in self._framed)
        refuse_sparse_of_pairs(named)
        for parameter in gradients:
            own = self.state.get(parameter, {})
            if getattr(own.get(BUFFER), "shape", parameter.shape) != parameter.shape:
                refuse_foreign_buffer(self._name(parameter), parameter, own)
        for pair in self._pairs:
            pair.refuse_mixed_options(self.param_groups, self._name)
        stacks = batches(self._pairs, self.param_groups)
        changes = [change for stack in stacks for change in stack.changes(self._momentum)]
        flags = [~largest.isfinite() for largest in largest_entries(list(gradients.values()))]
        flags += [flag for stack in stacks for flag in stack.flags()]
        if flags and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
            refuse_nonfinite_entries(gradients, self._name)
            for stack in stacks:
                stack.refuse()
        for change in changes:
            change.commit_(self._momentum_)
        for slice_ in self._uncovered:
            if slice_.parameter.grad is not None:
                sgd_step_of_block(
                    self.param_groups[slice_.group_index], slice_.blocks[0], self._momentum_
                )
        for group, parameters in zip(self.param_groups, self._plain, strict=True):
            sgd_step(group, [p for p in parameters if p.grad is not None], self.state)
        finish(held, self._absorbed, None, self.state)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter of a pair, zero where there is none yet."""
        buffer = self.state[parameter].get(BUFFER) if parameter in self.state else None
        if buffer is None:
            return torch.zeros_like(parameter, dtype=compute_dtype(parameter.dtype))
        return buffer

    def _momentum_(self, parameter: Tensor) -> Tensor:
        """The same, to be written to: filed in the state, laid out like the parameter.

        Blocks are views by strides, so that a buffer with others, loaded or made by hand, would be
        written to in a copy.
        """
        dtype = compute_dtype(parameter.dtype)
        buffer = self._momentum(parameter)
        if buffer.stride() != parameter.stride() or buffer.dtype != dtype:
            own = torch.empty_strided(
                parameter.size(), parameter.stride(), dtype=dtype, device=parameter.device
            )
            buffer = own.copy_(buffer)
        self.state[parameter][BUFFER] = buffer
        return buffer

    def _move_state_(self, element: Mapping[str, Tensor]) -> None:
        refuse_foreign_element(element, self.symmetries)
        absorbed = absorbed_biases(self.symmetries.heads, self.param_groups)
        refuse_untaken_translations(element, self.symmetries, absorbed)
        for symmetry in self.symmetries.heads:
            if symmetry.name not in element:
                continue
            g = element[symmetry.name].to(torch.float64)
            contragredient = symmetry.group.inverse(g).mT
            for blocks, matrix in (
                (symmetry.left_blocks, contragredient),
                (symmetry.right_blocks, g),
            ):
                for block in (b for b in blocks if BUFFER in self.state.get(b.parameter, {})):
                    view = block.view(self._momentum_(block.parameter))
                    view.copy_(matrix.to(view.device) @ view.to(torch.float64))
        stream = self.symmetries.residual
        if stream is None or RESIDUAL not in element:
            return
        for name, axis in stream.axes.items():
            buffer = self.state.get(stream.parameters[name], {}).get(BUFFER)
            if buffer is not None:
                rows = buffer.movedim(axis, -1)
                rotation = element[RESIDUAL].to(rows.device, torch.float64)
                rows.copy_(rows.to(torch.float64) @ rotation.mT)

    def _takes_states_of_torch(self) -> bool:
        return not self._framed

    def _settle(self, loaded: Mapping[str, Any]) -> None:
        """Check loaded state, and undo torch's cast of it to the parameter's dtype for pairs.

        All buffers are copied: torch keeps the given ones, which another optimizer may use on.
        """
        for group in self.param_groups:
            refuse_bad_options(group)
        self._plan()
        saved_order = [i for group in loaded["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(saved_order, parameters, strict=True):
            own = self.state.get(parameter, {})
            refuse_foreign_buffer(self._name(parameter), parameter, own)
            if own.get(BUFFER) is None:
                own.pop(BUFFER, None)
            elif id(parameter) in self._framed:
                own[BUFFER] = loaded["state"][i][BUFFER].detach().to(parameter.device, copy=True)
                self._momentum_(parameter)
            else:
                own[BUFFER] = own[BUFFER].detach().clone()


def refuse_foreign_buffer(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse saved state that is not a momentum of the parameter's shape.

    Raises
    ------
    ValueError
        Naming the parameter.
    """
    for value in state.values():
        if value is not None and torch.as_tensor(value).shape != parameter.shape:
            raise ValueError(
                f"the saved momentum of {name!r} has shape {tuple(torch.as_tensor(value).shape)}, "
                f"expected {tuple(parameter.shape)}: it is not the state of a QuotientSGD on this "
                "model"
            )
