"""Buckets: leaves of equal shape, with their state stacked and updated at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.adam import direction, moments_
from quotientopt.optim.averages import ema_
from quotientopt.optim.head_frames import HeadFrames
from quotientopt.optim.leaves import Leaf
from quotientopt.optim.polar import even_out
from quotientopt.optim.residual_frame import SharedResidualFrame, residual_eigenframe


class Bucket:
    """L leaves of the same shape ``(M, heads, r, n)``, group, dtype and device.

    The state is dressed: moments are written in the frame (head frame u from the left, residual
    frame Q from the right), so that a change of gauge moves frames alone. ``exp_avg`` and
    ``exp_avg_sq`` have shape ``(L, M, heads, r, n)``; the residual covariance
    R = EMA(Σ (u∂)ᵀ(u∂)) and its frame Q have shape ``(L, n, n)`` and go to ``O R Oᵀ`` and ``O Q``
    under an orthogonal ``W ↦ W Oᵀ``.

    Parameters
    ----------
    leaves : sequence of Leaf
    heads : HeadFrames, optional
        Where the leaves' head frames are kept.
    shared : SharedResidualFrame, optional
        One residual frame for the whole model, instead of one per leaf.
    dtype : torch.dtype
        Of the state and of the computation.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        heads: HeadFrames | None,
        shared: SharedResidualFrame | None,
        dtype: torch.dtype,
    ) -> None:
        self.leaves = tuple(leaves)
        self.heads = heads
        self.shared = shared
        self.dtype = dtype
        self.device = leaves[0].parameter.device
        self.group_index = leaves[0].group_index
        self.residual = leaves[0].residual
        self.steps = [0] * len(leaves)
        shape = (len(leaves), *leaves[0].shape)
        self.state = {"exp_avg": self._zeros(*shape), "exp_avg_sq": self._zeros(*shape)}
        if self.residual and shared is None:
            for key in ("residual_covariance", "residual_frame"):
                self.state[key] = self._zeros(len(leaves), shape[-1], shape[-1])
        self.places = [heads.place(leaf) for leaf in leaves] if heads is not None else []
        self._index = torch.tensor(self.places, device=self.device)

    @property
    def framed(self) -> bool:
        """Whether there is any frame; a rest of a fused parameter has none."""
        return self.heads is not None or self.residual

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def subset(self, rows: Sequence[int]) -> Bucket:
        """A bucket of some of the leaves, with copies of their state (see :meth:`absorb`)."""
        part = Bucket([self.leaves[i] for i in rows], self.heads, self.shared, self.dtype)
        part.steps = [self.steps[i] for i in rows]
        index = torch.tensor(rows, device=self.device)
        part.state = {key: value.index_select(0, index) for key, value in self.state.items()}
        return part

    def absorb(self, part: Bucket, rows: Sequence[int]) -> None:
        """Take back the state of a :meth:`subset`."""
        index = torch.tensor(rows, device=self.device)
        for key, value in part.state.items():
            self.state[key].index_copy_(0, index, value)
        for i, step in zip(rows, part.steps, strict=True):
            self.steps[i] = step

    def views(self) -> list[Tensor]:
        """Views of the parameters, block after block."""
        return [block.view() for leaf in self.leaves for block in leaf.blocks]

    def weights(self) -> Tensor:
        """The parameters, stacked, ``(L, M, heads, r, n)``, in the bucket's dtype."""
        return self._stack(self.views())

    def gradients(self) -> Tensor:
        """The gradients, stacked like :meth:`weights`."""
        return self._stack(
            [block.view(leaf.parameter.grad) for leaf in self.leaves for block in leaf.blocks]
        )

    def _stack(self, views: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(views)).to(self.dtype)
        return stacked.unflatten(0, (len(self.leaves), -1))

    def of_heads(self, stack: Tensor) -> Tensor:
        """Entries of a stack kept by the head frames, one per leaf, ``(L, 1, heads, r, r)``."""
        whole = len(self.places) == len(stack) and self.places == list(range(len(stack)))
        entries = stack if whole else stack.index_select(0, self._index)
        return entries.to(self.dtype).unsqueeze(1)

    def residual_frames(self) -> Tensor | None:
        """Residual frames Q, ``(L, n, n)``, or None."""
        if not self.residual:
            return None
        if self.shared is not None:
            return self.shared.frame.expand(len(self.leaves), -1, -1)
        return self.state["residual_frame"]

    def head_covariance(self, dressed: Tensor) -> Tensor:
        """Σ u∂ (u∂)ᵀ of every leaf, ``(L, heads, r, r)``."""
        return (dressed @ dressed.mT).sum(1)

    def accumulate_residual(self, dressed: Tensor, beta: float) -> None:
        """Add Σ (u∂)ᵀ(u∂) to the residual covariance."""
        if not self.residual:
            return
        rows = dressed.flatten(1, -2)
        gram = rows.mT @ rows
        if self.shared is not None:
            self.shared.add(gram.sum(0))
        elif min(self.steps) > 0:
            self.state["residual_covariance"].lerp_(gram, 1 - beta)
        else:
            ema_(self.state["residual_covariance"], gram, beta)

    def dressed_weights_gram(self, contragredient: Tensor | None) -> Tensor:
        """WᵀW of the dressed weights of every leaf, ``(L, n, n)``."""
        weights = self.weights()
        if contragredient is not None:
            weights = self.of_heads(contragredient) @ weights
        rows = weights.flatten(1, -2)
        return rows.mT @ rows

    def refresh(self, change: Tensor | None, contragredient: Tensor | None) -> None:
        """Move the moments to fresh frames.

        Parameters
        ----------
        change : Tensor, optional
            u_new u_old^{-1} of all entries of the head frames.
        contragredient : Tensor, optional
            Fields that dress the factors, for breaking ties.
        """
        left = None if change is None else self.of_heads(change).squeeze(1)
        right = None
        if self.residual:
            if self.shared is not None:
                right = self.shared.change.expand(len(self.leaves), -1, -1)
            else:
                frame = residual_eigenframe(
                    self.state["residual_covariance"], self.dressed_weights_gram(contragredient)
                )
                right = self.state["residual_frame"].mT @ frame
                self.state["residual_frame"].copy_(frame)
        self.transport_(left, right)

    def transport_(self, left: Tensor | None, right: Tensor | None) -> None:
        """Carry the moments to other frames, m ← R m S and v ← (R∘R) v (S∘S).

        Parameters
        ----------
        left : Tensor, optional
            R = u_new u_old⁻¹, ``(L, heads, r, r)``.
        right : Tensor, optional
            S = Q_oldᵀ Q_new, ``(L, n, n)``.
        """
        mean, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        mean.copy_(self._two_sided(left, mean, right))
        square.copy_(
            self._two_sided(
                None if left is None else left.square(),
                square,
                None if right is None else right.square(),
            )
        )

    def _two_sided(self, left: Tensor | None, middle: Tensor, right: Tensor | None) -> Tensor:
        """``left @ middle @ right`` with ``(L, heads, r, r)``, ``(L, n, n)``; None is identity."""
        if left is not None:
            middle = left.unsqueeze(1) @ middle
        if right is None:
            return middle
        return (middle.flatten(1, -2) @ right).unflatten(1, middle.shape[1:-1])

    def update_(self, dressed: Tensor, group: Mapping[str, Any]) -> None:
        """One step of Adam in the frame.

        Parameters
        ----------
        dressed : Tensor
            u∂, ``(L, M, heads, r, n)``.
        group : mapping
            The param group's hyperparameters.
        """
        frames = self.residual_frames()
        framed = self._two_sided(None, dressed, frames)
        self.steps = [step + 1 for step in self.steps]
        step: int | Tensor = self.steps[0]
        if len(set(self.steps)) > 1:
            step = torch.tensor(self.steps, dtype=self.dtype, device=self.device)
            step = step[:, None, None, None, None]
        mean, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        partner = None if self.heads is None else self.heads.partner
        moments_(framed, mean, square, betas=group["betas"], plane_partner=partner)
        update = direction(
            framed,
            mean,
            square,
            step,
            betas=group["betas"],
            eps=group["eps"],
            nesterov=group["nesterov"] and self.framed,
        )
        right = None if frames is None else frames.mT
        if group["polar"] and self.framed and update.size(-1) > 1:
            shape = update.shape
            update = even_out(update.flatten(1, -2), right).view(shape)
        else:
            update = self._two_sided(None, update, right)
        if self.heads is not None:
            update = self.of_heads(self.heads.frame).mT @ update
        self._add_to_parameters(update, group["lr"], group["weight_decay"])

    def _add_to_parameters(self, update: Tensor, lr: float | Tensor, weight_decay: float) -> None:
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
        views = self.views()
        if views[0].dtype != self.dtype:
            # One rounding of the sum: in bfloat16 a decay of 1 - lr·wd alone would round to one.
            weights = self.weights()
            weights = weights.mul_(1 - lr * weight_decay).sub_(update.mul_(lr))
            torch._foreach_copy_(views, list(weights.flatten(0, 1).unbind()))
            return
        torch._foreach_mul_(views, 1 - lr * weight_decay)
        updates = list(update.flatten(0, 1).unbind())
        if isinstance(lr, Tensor):
            torch._foreach_mul_(updates, lr)
            torch._foreach_sub_(views, updates)
        else:
            torch._foreach_add_(views, updates, alpha=-lr)
