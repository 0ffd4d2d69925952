"""Buckets: slices of equal shape, with their state stacked and updated at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.bookkeeping.slices import Slice, stream_of
from quotientopt.optim.eigenframes import (
    embedding_frames,
    hidden_eigenframes,
    residual_eigenframes,
    rotate_,
)
from quotientopt.optim.frames import HeadFrames, SharedResidualFrame, state_sizes, transport_
from quotientopt.optim.leading import along_and_rest, begin_, turn_
from quotientopt.optim.polar import orthogonalise, polar_direction, products_at, row_polar_factor
from quotientopt.optim.update import (
    Product,
    add_and_round,
    decay_scale_of,
    direction,
    ema_,
    gated,
    moments_,
    scale_of,
    two_sided,
)

# Elements of a chunk of an update on a CPU: few products at a time cost calls, many cost cache.
CHUNK = 262144


class Bucket:
    """L slices of the same shape ``(M, heads, r, n)``, group, dtype and device.

    The state is dressed: moments are written in the frame (head frame u from the left, residual
    frame Q from the right), so that a change of gauge moves frames alone. ``exp_avg`` and
    ``exp_avg_sq`` have shape ``(L, M, heads, r, n)``, a factored one ``(L, M, heads, r, 1)``
    and ``(L, M, 1, 1, n)``; the residual covariance R = EMA(Σ (u∂)ᵀ(u∂)) and its frame Q have
    shape ``(L, n, n)`` and go to ``O R Oᵀ`` and ``O Q`` under an orthogonal ``W ↦ W Oᵀ``. With
    ``hidden_frame``, slices without head frames have the like of their rows,
    ``hidden_covariance`` and ``hidden_frame``, ``(L, rows, rows)``; or of k ``leading`` directions
    E alone, ``hidden_frame`` and ``hidden_image``, EMA(∂∂ᵀE), ``(L, rows, k)``, and moments along
    them, ``hidden_exp_avg`` and ``hidden_exp_avg_sq``, ``(L, 1, 1, k, n)``, beside which the
    others hold what is orthogonal to E.

    Parameters
    ----------
    slices : sequence of Slice
    heads : HeadFrames, optional
        Where the slices' head frames are kept.
    shared : SharedResidualFrame, optional
        One residual frame for the whole model, instead of one per slice.
    dtype : torch.dtype
        Of the state and of the computation.
    options : mapping
        The param group's ``hidden_frame``, ``second_moment``, ``master_weights`` and
        ``capturable``, on which the tensors of the state depend, and ``polar``.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        heads: HeadFrames | None,
        shared: SharedResidualFrame | None,
        dtype: torch.dtype,
        options: Mapping[str, Any],
    ) -> None:
        self.slices = tuple(slices)
        self.heads = heads
        self.shared = shared
        self.dtype = dtype
        self.options = options
        self.device = slices[0].parameter.device
        self.group_index = slices[0].group_index
        self.residual, self.embedding = slices[0].residual, slices[0].embedding
        self.output = slices[0].output
        self.stream = stream_of(slices[0])
        self.steps = [0] * len(slices)
        shape = (len(slices), *slices[0].shape)
        if not slices[0].stacked if heads is None else heads.joint:
            shape = (*shape[:2], 1, shape[2] * shape[3], shape[4])
        self.shape = shape
        self.rows, self.columns = shape[1] * shape[2] * shape[3], shape[4]
        matrices = self.framed and min(self.rows, self.columns) > 1
        self.factored = options["second_moment"] == "factored" and matrices
        directions = slices[0].hidden_directions(options)
        self.leading = 0 < directions < self.rows
        own_frames = self.residual and shared is None
        sizes = state_sizes(
            shape, directions, factored=self.factored, framed=own_frames, fixed=self.embedding
        )
        zeros = partial(torch.zeros, dtype=dtype, device=self.device)
        self.state = {key: zeros(size) for key, size in sizes.items()}
        self.device_steps: Tensor | None = None
        if options["capturable"]:
            self.device_steps = torch.zeros(len(slices), device=self.device)
        if options["master_weights"] and slices[0].parameter.dtype != dtype:
            self.state["master"] = self.weights()
        self.oriented = [False] * len(slices)
        self.places = [] if heads is None else [heads.place(slice_) for slice_ in slices]
        self._index = torch.tensor(self.places, device=self.device)
        self._views: list[Tensor] = []
        self._pointers: tuple[int, ...] = ()

    @property
    def framed(self) -> bool:
        """Whether there is any frame; a rest of a fused parameter has none."""
        return self.heads is not None or self.residual

    @property
    def orthogonalises(self) -> bool:
        """Whether the singular values of updates are made nearly equal."""
        matrices = self.framed and not (self.embedding or self.output) and self.columns > 1
        return bool(self.options["polar"]) and matrices

    @property
    def has_frames(self) -> bool:
        """Whether every slice has a residual frame to go on from."""
        return all(self.oriented) if self.shared is None else self.shared.oriented

    def subset(self, rows: Sequence[int]) -> Bucket:
        """A bucket of some of the slices, with copies of their state (see :meth:`absorb`)."""
        slices = [self.slices[i] for i in rows]
        part = Bucket(slices, self.heads, self.shared, self.dtype, self.options)
        part.steps = [self.steps[i] for i in rows]
        index = torch.tensor(rows, device=self.device)
        part.state = {key: value.index_select(0, index) for key, value in self.state.items()}
        if self.device_steps is not None:
            part.device_steps = self.device_steps.index_select(0, index)
        return part

    def absorb(self, part: Bucket, rows: Sequence[int]) -> None:
        """Take back the state of a :meth:`subset`."""
        index = torch.tensor(rows, device=self.device)
        for key, value in part.state.items():
            self.state[key].index_copy_(0, index, value)
        if self.device_steps is not None and part.device_steps is not None:
            self.device_steps.index_copy_(0, index, part.device_steps)
        for i, step in zip(rows, part.steps, strict=True):
            self.steps[i] = step

    def views(self) -> list[Tensor]:
        """Views of the parameters, block after block."""
        pointers = tuple(slice_.parameter.data_ptr() for slice_ in self.slices)
        if pointers != self._pointers:
            self._views = [block.view() for slice_ in self.slices for block in slice_.blocks]
            self._pointers = pointers
        return self._views

    def weights(self) -> Tensor:
        """The parameters, stacked, ``(L, M, heads, r, n)``, in the bucket's dtype."""
        return self._stack([block.view() for slice_ in self.slices for block in slice_.blocks])

    def gradients(self) -> Tensor:
        """The gradients, stacked like :meth:`weights`, as :meth:`Block.view` reads them.

        Whether parameters still fit their blocks is looked at where slices are found.
        """
        views = []
        for block in (block for slice_ in self.slices for block in slice_.blocks):
            gradient = block.parameter.grad
            if gradient is not None and gradient.stride() == block.layout:
                offset = gradient.storage_offset() + block.offset
                views.append(gradient.as_strided(block.size, block.stride, offset))
            else:
                views.append(block.view(gradient))
        return self._stack(views)

    def _stack(self, views: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(views)).to(self.dtype).view(self.shape)

    def of_heads(self, stack: Tensor) -> Tensor:
        """Entries of a stack kept by the head frames, one per slice, ``(L, 1, heads, r, r)``."""
        whole = len(self.places) == len(stack) and self.places == list(range(len(stack)))
        entries = stack if whole else stack.index_select(0, self._index)
        return entries.to(self.dtype).unsqueeze(1)

    def residual_frames(self) -> Tensor | None:
        """Residual frames Q, ``(L, n, n)``, or None."""
        if not self.residual:
            return None
        if self.shared is not None:
            return self.shared.frame.expand(len(self.slices), -1, -1)
        return self.state["residual_frame"]

    def head_covariance(self, dressed: Tensor) -> Tensor:
        """Σ u∂ (u∂)ᵀ of every slice, ``(L, heads, r, r)``."""
        return (dressed @ dressed.mT).sum(1)

    def accumulate(self, dressed: Tensor, beta: float, gate: Tensor | None = None) -> None:
        """Add Σ (u∂)ᵀ(u∂) to the residual covariance and ∂∂ᵀ to that of hidden units.

        Unless the gate is zero.
        """
        if not self.residual or self.embedding:
            return
        rows = dressed.flatten(1, -2)
        if self.leading:
            image = rows @ (rows.mT @ self.state["hidden_frame"])
            ema_(self.state["hidden_image"], image, beta, gate)
        elif "hidden_covariance" in self.state:
            ema_(self.state["hidden_covariance"], rows @ rows.mT, beta, gate)
        gram = rows.mT @ rows
        if self.shared is not None:
            self.shared.add(gram.sum(0))
        elif min(self.steps) > 0:
            self.state["residual_covariance"].lerp_(gram, gated(1 - beta, gate))
        else:
            ema_(self.state["residual_covariance"], gram, beta, gate)

    def dressed_weights_gram(self, contragredient: Tensor | None) -> Tensor:
        """WᵀW of the dressed weights of every slice, ``(L, n, n)``."""
        weights = self.weights()
        if contragredient is not None:
            weights = self.of_heads(contragredient) @ weights
        rows = weights.flatten(1, -2)
        return rows.mT @ rows

    def refresh(
        self, change: Tensor | None, weights_gram: Tensor | None, pooled_gram: Tensor | None
    ) -> None:
        """Move the moments to fresh frames.

        Parameters
        ----------
        change : Tensor, optional
            u_new u_old^{-1} of all entries of the head frames.
        weights_gram, pooled_gram : Tensor, optional
            WᵀW of the dressed weights, of every slice and summed over the whole stream, for
            breaking ties of the first residual frames; None where all slices are oriented.
        """
        left = None if change is None else self.of_heads(change).squeeze(1)
        if self.leading:
            frames = self.residual_frames()
            turn_(self.state, lambda: two_sided(None, self.weights(), frames).flatten(1, -2))
        elif "hidden_frame" in self.state:
            old, new = self.state["hidden_frame"], [step == 0 for step in self.steps]
            norms = self.weights().flatten(1, -2).square().sum(-1) if any(new) else None
            hidden = hidden_eigenframes(self.state["hidden_covariance"], old, norms, new)
            left = (hidden.mT @ old)[:, None]
            old.copy_(hidden)
        right = None
        if self.shared is not None:
            right = self.shared.change.expand(len(self.slices), -1, -1)
        elif self.embedding:
            if weights_gram is not None and pooled_gram is not None:
                frame = self.state["residual_frame"]
                frame.copy_(embedding_frames(frame, weights_gram, pooled_gram, self.oriented))
                self.oriented = [True] * len(self.slices)
            return
        elif self.residual:
            covariance, old = self.state["residual_covariance"], self.state["residual_frame"]
            frame = residual_eigenframes(covariance, old, weights_gram, pooled_gram, self.oriented)
            right = old.mT @ frame
            old.copy_(frame)
            self.oriented = [True] * len(self.slices)
        transport_(self.state, left, right)

    def rotate_(self, rotation: Tensor) -> None:
        """Move frames and covariances along with ``W ↦ W Oᵀ``."""
        if self.residual and self.shared is None:
            rotate_(self.state["residual_frame"], self.state.get("residual_covariance"), rotation)

    def update_(
        self, dressed: Tensor, group: Mapping[str, Any], gate: Tensor | None = None
    ) -> None:
        """One step of Adam in the frame; on a CPU of a few slices at a time, which its cache holds.

        Parameters
        ----------
        dressed : Tensor
            u∂, ``(L, M, heads, r, n)``.
        group : mapping
            The param group's hyperparameters.
        gate : Tensor, optional
            One, or zero for a step that may change nothing; ``dressed`` is then zero.
        """
        if self.leading and 0 in self.steps:
            new = torch.tensor([step == 0 for step in self.steps], device=self.device)
            begin_(self.state, dressed.flatten(1, -2), self.weights().flatten(1, -2), new)
        self.steps = [step + 1 for step in self.steps]
        if self.device_steps is not None:
            self.device_steps.add_(1 if gate is None else gate)
        frames = self.residual_frames()
        hidden = None if self.leading else self.state.get("hidden_frame")
        heads = None if self.heads is None else self.of_heads(self.heads.frame).mT
        if hidden is not None:
            heads = hidden[:, None, None]
        with products_at(group["precision"], self.dtype, self.device) as multiply:
            for rows in self._chunks():
                frame = None if frames is None else frames[rows]
                left = None if heads is None else heads[rows]
                into = None if hidden is None else hidden[rows, None].mT
                framed = two_sided(into, dressed[rows], frame, multiply)
                if self.leading:
                    adam = partial(self._direction, rows, group=group, gate=gate)
                    own = self.state["hidden_frame"][rows, None, None]
                    update = along_and_rest(own, framed, adam, multiply)
                else:
                    update = self._direction(rows, framed, group=group, gate=gate)
                update = self._turn_back(update, left, frame, multiply)
                self._add_to_parameters(rows, update, group, gate)

    def _chunks(self) -> list[slice]:
        count = size = len(self.slices)
        if self.device.type == "cpu":
            size = max(1, CHUNK // max(1, self.rows * self.columns))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _direction(
        self,
        rows: slice,
        framed: Tensor,
        part: str = "",
        *,
        group: Mapping[str, Any],
        gate: Tensor | None,
    ) -> Tensor:
        """Update both moments and return Adam's direction in the frame, of a part of the state."""
        steps = self.steps[rows]
        step: int | Tensor = steps[0]
        if self.device_steps is not None:
            # Behind a closed gate a first step is not counted.
            step = self.device_steps[rows].clamp_min(1).to(self.dtype)[:, None, None, None, None]
        elif len(set(steps)) > 1:
            step = torch.tensor(steps, dtype=self.dtype, device=self.device)
            step = step[:, None, None, None, None]
        mean = self.state[f"{part}exp_avg"][rows]
        whole = not self.factored or part
        keys = [f"{part}exp_avg_sq"] if whole else ["exp_avg_sq_rows", "exp_avg_sq_columns"]
        squares = [self.state[key][rows] for key in keys]
        partner = None if self.heads is None else self.heads.partner
        square = moments_(
            framed, mean, *squares, betas=group["betas"], plane_partner=partner, gate=gate
        )
        return direction(
            framed,
            mean,
            square,
            step,
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"] and self.framed,
        )

    def _turn_back(
        self, update: Tensor, left: Tensor | None, frame: Tensor | None, multiply: Product
    ) -> Tensor:
        """Turn an update back from its frames, its singular values made nearly equal.

        Those of the whole matrix, of each one of a stack, or with ``polar="step"`` of each head.
        ``left`` is uᵀ of frames of rows, ``(L, 1, heads, r, r)``, ``frame`` is Q, ``(L, n, n)``.
        """
        back = None if frame is None else frame.mT
        step = self.options["polar"] == "step"
        polar = orthogonalise if step else polar_direction
        if not self.orthogonalises:
            update = update if left is None else multiply(left, update)
        elif self.slices[0].stacked:
            update = polar(update.flatten(0, 2), None, multiply).view(update.shape)
        elif step and left is not None:
            update = multiply(multiply(left, row_polar_factor(update)), update)
        else:
            whole = polar(update.flatten(1, -2), back, multiply).view(update.shape)
            return whole if left is None else multiply(left, whole)
        return two_sided(None, update, back, multiply)

    def _add_to_parameters(
        self, rows: slice, update: Tensor, group: Mapping[str, Any], gate: Tensor | None
    ) -> None:
        lr, weight_decay = group["lr"], group["weight_decay"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        if gate is not None:
            lr = gate * lr
        first = self.slices[0]
        rate = lr * scale_of(first, group)
        kept = 1 - lr * decay_scale_of(first, group) * weight_decay
        blocks = len(first.blocks)
        views = self.views()[rows.start * blocks : rows.stop * blocks]
        update = update.reshape(-1, blocks, *first.shape[1:])
        if views[0].dtype != self.dtype:
            own = "master" in self.state
            master = self.state["master"][rows].view(update.shape) if own else None
            stochastic = self.options["stochastic_rounding"]
            add_and_round(views, update.mul_(rate), kept, master, stochastic=stochastic)
            return
        torch._foreach_mul_(views, kept)
        updates = list(update.flatten(0, 1).unbind())
        if isinstance(rate, Tensor):
            torch._foreach_mul_(updates, rate)
            torch._foreach_sub_(views, updates)
        else:
            torch._foreach_add_(views, updates, alpha=-rate)
