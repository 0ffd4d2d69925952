"""Adam's update as pure functions of dressed gradients."""

from __future__ import annotations

from torch import Tensor


def moments_(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    plane_partner: Tensor | None = None,
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
    """
    square = gradient.square()
    if plane_partner is not None:
        square = square.add_(square.index_select(-2, plane_partner)).mul_(0.5)
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.lerp_(square, 1 - betas[1])


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
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    if nesterov:
        mean = exp_avg * (beta1 / (1 - beta1 ** (step + 1)))
        mean = mean.add_(gradient * ((1 - beta1) / (1 - beta1**step)))
    else:
        mean = exp_avg / (1 - beta1**step)
    return mean.div_(denominator)
