"""Adam's update as pure functions of dressed gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_scale(norms: Sequence[Tensor], limit: float | None) -> Tensor | None:
    """Factor that brings gradients down to a norm of ``limit``; None where there is no limit.

    Parameters
    ----------
    norms : sequence of Tensor
        Of the dressed gradients, one each.
    limit : float, optional
    """
    if limit is None:
        return None
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    # Not a number only where the step is refused, or gated with gradients of zero.
    return (limit / (total + 1e-6)).clamp(max=1.0).nan_to_num(0.0)


def moments_(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    plane_partner: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Update both moments in place, m ← β₁ m + (1−β₁) ∂, v ← β₂ v + (1−β₂) |∂|².

    Parameters
    ----------
    gradient : Tensor
        Dressed gradients, shape ``(…, r, n)``.
    exp_avg, exp_avg_sq : Tensor
        Moments in the same coordinates.
    betas : tuple of float
    plane_partner : Tensor, optional
        Index of each row's partner in a rotated plane. Two real rows then share one second
        moment, half of |∂|² of their complex entry, which no phase changes. (Half, so that an
        update has the same size per real entry as elsewhere.)
    gate : Tensor, optional
        One, or zero where nothing may change; the gradient must then be zero.
    """
    mean_weight, square_weight = (gated(1 - beta, gate) for beta in betas)
    exp_avg.lerp_(gradient, mean_weight)
    if plane_partner is None:
        exp_avg_sq.mul_(1 - square_weight).addcmul_(gradient, gradient, value=1 - betas[1])
        return
    square = gradient.square()
    square = square.add_(square.index_select(-2, plane_partner)).mul_(0.5)
    exp_avg_sq.lerp_(square, square_weight)


def gated(value: float, gate: Tensor | None) -> float | Tensor:
    """A number, or zero on the device where a gate is closed."""
    return value if gate is None else gate * value


def direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | int,
    *,
    betas: tuple[float, float],
    eps: float,
    nesterov: bool,
) -> Tensor:
    """Adam's direction m̂ / (√v̂ + ε) from updated moments.

    With ``nesterov``, m̂ = β₁ m / (1 − β₁^{t+1}) + (1 − β₁) ∂ / (1 − β₁^t) (Dozat 2016).

    Parameters
    ----------
    step : int or Tensor
        Number t of this update, starting at 1; a tensor that broadcasts against the gradient
        where its leaves have seen different numbers of updates.
    """
    beta1, beta2 = betas
    # √v̂ + ε = (√v + ε c) / c with c = √(1 − β₂^t); c goes into the numerator, which saves a pass.
    root = (1 - beta2**step) ** 0.5
    scale = root / (1 - beta1**step)
    if nesterov:
        mean = exp_avg * (root * beta1 / (1 - beta1 ** (step + 1)))
        fresh = scale * (1 - beta1)
        if isinstance(fresh, Tensor):
            mean.addcmul_(gradient, fresh)
        else:
            mean.add_(gradient, alpha=fresh)
    else:
        mean = exp_avg * scale
    return mean.div_(exp_avg_sq.sqrt().add_(eps * root))
