"""The update of QuotientAdam: pure functions on stacked tensors.

    z = u ∂ Q                                   u: head frame, Q: residual frame
    m ← β₁ m + (1 − β₁) z,  v ← β₂ v + (1 − β₂) z²
    D = m̂ / (√v̂ + ε)
    W ← (1 − ηλ) W − η uᵀ p(D) Qᵀ          η: the learning rate times `update_scale`

The letters are those of docs/quotient_adam.md. In this order: when, covariances, Adam, sizes,
rounding; at the end torch's AdamW for parameters without frames. The polar factor p has its own
module, :mod:`quotientopt.optim.polar`, frames :mod:`quotientopt.optim.eigenframes`; the plain form,
one matrix at a time, is :mod:`quotientopt.optim.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quotientopt._linalg import compute_dtype

if TYPE_CHECKING:
    from quotientopt.optim.bookkeeping.slices import Slice

Product = Callable[[Tensor, Tensor], Tensor]

# The younger training is, the quicker gradients change: frames last an eighth of the steps so far.
PART_OF_AGE = 8
# Covariances remember twice as many steps as frames last, of these at most.
LONGEST = 10


class Sampling(NamedTuple):
    """How often covariances take gradients, and what they keep of themselves then."""

    every: int
    beta: float

    def takes(self, updates: int) -> bool:
        """Whether that of a slice with so many updates so far, counted by itself.

        By a common count one with gradients in every second step might never be taken.
        """
        return updates == 0 or (updates + 1) % self.every == 0


def interval_of(step: int, longest: int, part: int = PART_OF_AGE) -> int:
    """Steps between fresh frames at a step: K(t) = min(max(⌊t/part⌋, 1), longest)."""
    return min(max(step // part, 1), longest)


def sampling(most: int, group: Mapping[str, Any]) -> Sampling:
    """What covariances take in a step: R ← β R + (1 − β)(u∂)ᵀ(u∂), remembering 2 K(t) steps.

    At most twice `LONGEST`. There every second gradient is taken, which saves half of a product of
    the parameters' size, with β = 0.9. Steps that are to be alike (``capturable``) take every
    gradient, with β = 0.95 at any age. ``most``: updates, so far, of the slice that has most.
    """
    alike, longest = group["capturable"], min(group["refresh_every"], LONGEST)
    interval = LONGEST if alike else interval_of(most + 1, longest)
    every = 2 if interval == LONGEST and not alike else 1
    return Sampling(every, 1 - every / (2 * interval))


def two_sided(
    left: Tensor | None, middle: Tensor, right: Tensor | None, multiply: Product = torch.matmul
) -> Tensor:
    """``left @ middle @ right`` of a stack of slices; None is the identity.

    Parameters
    ----------
    left : Tensor, optional
        Shape ``(L, heads, r, r)``.
    middle : Tensor
        Shape ``(L, M, heads, r, n)``.
    right : Tensor, optional
        Shape ``(L, n, n)``.
    """
    if left is not None:
        middle = multiply(left.unsqueeze(1), middle)
    if right is None:
        return middle
    return multiply(middle.flatten(1, -2), right).unflatten(1, middle.shape[1:-1])


def ema_(average: Tensor, new: Tensor, beta: float, gate: Tensor | None = None) -> None:
    """Exponential moving average in place that starts at its first non-zero sample.

    ``average`` holds symmetric positive matrices, or images of frames under them; one that is zero
    has seen no gradient yet. With a ``gate`` of zero nothing changes.
    """
    if average.size(-1) == average.size(-2):
        size = average.diagonal(dim1=-2, dim2=-1).sum(-1)
    else:
        size = torch.linalg.matrix_norm(average)
    weight = torch.where(size == 0, 1.0, 1 - beta).to(average.dtype)
    if gate is not None:
        weight = weight * gate.to(weight)
    average.lerp_(new, weight[..., None, None])


def ema_at_(
    average: Tensor,
    samples: Tensor,
    places: Tensor,
    touched: Tensor | None,
    beta: float,
    gate: Tensor | None = None,
) -> None:
    """:func:`ema_` of some entries of a stack; samples of one entry (weight and bias) are summed.

    Parameters
    ----------
    average, samples : Tensor
        Shape ``(E, …)`` and ``(K, …)``.
    places : Tensor
        The entry of each sample, ``(K,)``.
    touched : Tensor, optional
        The entries that have samples; None for all.
    beta, gate
        As there.
    """
    total = torch.zeros_like(average).index_add_(0, places, samples)
    if touched is None:
        ema_(average, total, beta, gate)
        return
    part = average.index_select(0, touched)
    ema_(part, total.index_select(0, touched), beta, gate)
    average.index_copy_(0, touched, part)


def moments_(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    columns: Tensor | None = None,
    *,
    betas: tuple[float, float],
    plane_partner: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Update both moments in place, m ← β₁ m + (1−β₁) ∂, v ← β₂ v + (1−β₂) |∂|².

    A factored v keeps the means of its rows ρ and of its columns γ and is ρ γᵀ / mean(γ) (Shazeer &
    Stern 2018). Under a change of frames v ↦ (R∘R) v (S∘S) they go to (R∘R) ρ and γ (S∘S).

    Parameters
    ----------
    gradient : Tensor
        Dressed gradients, shape ``(…, r, n)``.
    exp_avg, exp_avg_sq : Tensor
        Moments in the same coordinates.
    columns : Tensor, optional
        γ, ``(…, 1, 1, n)``; ``exp_avg_sq`` is then ρ, ``(…, heads, r, 1)``.
    betas : tuple of float
    plane_partner : Tensor, optional
        Index of each row's partner in a rotated plane. Two real rows then share one second
        moment, half of |∂|² of their complex entry, which no phase changes. (Half, so that an
        update has the same size per real entry as elsewhere.)
    gate : Tensor, optional
        One, or zero where nothing may change; the gradient must then be zero.

    Returns
    -------
    Tensor
        v, whole.
    """
    mean_weight, square_weight = (gated(1 - beta, gate) for beta in betas)
    exp_avg.lerp_(gradient, mean_weight)
    if plane_partner is None and columns is None:
        exp_avg_sq.mul_(1 - square_weight).addcmul_(gradient, gradient, value=1 - betas[1])
        return exp_avg_sq
    square = gradient.square()
    if plane_partner is not None:
        square = square.add_(square.index_select(-2, plane_partner)).mul_(0.5)
    if columns is None:
        return exp_avg_sq.lerp_(square, square_weight)
    exp_avg_sq.lerp_(square.mean(-1, keepdim=True), square_weight)
    columns.lerp_(square.mean((-3, -2), keepdim=True), square_weight)
    tiny = torch.finfo(columns.dtype).tiny
    return exp_avg_sq * (columns / columns.mean(-1, keepdim=True).clamp_min(tiny))


def gated(value: float, gate: Tensor | None) -> float | Tensor:
    """A number, or zero on the device where a gate is closed."""
    return value if gate is None else gate * value


def gate_on(device: torch.device, gate: Tensor | None) -> Tensor | None:
    """The gate of a part of the model that may lie on another device."""
    return None if gate is None else gate.to(device)


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

    ``step`` is the number t of this update, from 1; a tensor that broadcasts against the gradient
    where its slices have seen different numbers of updates.
    """
    root, of_mean, of_gradient = corrections(step, betas, nesterov=nesterov)
    mean = exp_avg * of_mean
    if isinstance(of_gradient, Tensor):
        mean.addcmul_(gradient, of_gradient)
    elif nesterov:
        mean.add_(gradient, alpha=of_gradient)
    return mean.div_(exp_avg_sq.sqrt().add_(eps * root))


def corrections(step: Any, betas: tuple[float, float], *, nesterov: bool) -> tuple[Any, Any, Any]:
    """c = √(1 − β₂^t), and what m and ∂ are multiplied with in c m̂ of update t.

    As √v̂ + ε = (√v + ε c) / c, the direction is c m̂ / (√v + ε c), which saves a pass. With
    ``nesterov``, m̂ = β₁ m / (1 − β₁^{t+1}) + (1 − β₁) ∂ / (1 − β₁^t) (Dozat 2016).
    """
    beta1, beta2 = betas
    root = (1 - beta2**step) ** 0.5
    scale = root / (1 - beta1**step)
    if not nesterov:
        return root, scale, 0.0
    return root, root * beta1 / (1 - beta1 ** (step + 1)), scale * (1 - beta1)


# Of the stream, between which embeddings' updates shrink.
EMBEDDING_WIDTHS = (128, 1024)


def embedding_width_factor(width: int) -> float:
    """128/d of a stream of width d: 1 up to d = 128, 1/8 from d = 1024 on.

    A logit is a sum over d entries of the head, each of which Adam moves by the learning rate, and
    the best rates of embeddings and head fall about so from d = 128 to d = 512, where those of the
    polar updates stay (docs/learning_rate.md); beyond, it is continued.
    """
    return EMBEDDING_WIDTHS[0] / min(max(width, EMBEDDING_WIDTHS[0]), EMBEDDING_WIDTHS[1])


def scale_of(slice_: Slice, group: Mapping[str, Any]) -> float:
    """s, the size of a slice's updates over that of Adam's, under the options of its group."""
    if not slice_.takes_scale:
        return 1.0
    scale: float = group["update_scale"]
    if slice_.embedding or slice_.output:
        scale *= embedding_width_factor(slice_.shape[-1])
    return scale * group["embedding_scale"] if slice_.embedding else scale


def decay_scale_of(slice_: Slice, group: Mapping[str, Any]) -> float:
    """The same of its weight decay, which is one for a whole parameter."""
    return scale_of(slice_ if slice_.rest_of is None else slice_.rest_of, group)


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round wider values to one of the two nearest numbers of ``dtype``, so that the mean is kept.

    x between neighbours a < b becomes b with probability (x − a)/(b − a). Small updates of bfloat16
    weights, which rounding to nearest would lose, then count on average. What overflows or is not
    finite stays as rounding to nearest makes it; the random numbers are torch's global ones.
    """
    nearest = values.to(dtype)
    back = nearest.to(values.dtype)
    towards = torch.where(values > back, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.to(values.dtype) - back).abs()
    odds = (values - back).abs() / gap
    take = (torch.rand_like(values) < odds) & other.isfinite()
    return torch.where(take, other, nearest)


def add_and_round(
    views: list[Tensor],
    update: Tensor,
    kept: float | Tensor,
    master: Tensor | None,
    *,
    stochastic: bool,
) -> None:
    """Narrow weights times ``kept`` less the update, rounded once.

    A decay of 1 − lr·wd alone would round to one in bfloat16. A ``master``, a wider copy in the
    shape of the update, takes the sum; weights written to in the meantime win over it.
    """
    stored = torch.stack(views).view(update.shape)
    weights = stored.to(update.dtype)
    if master is not None:
        weights = torch.where(master.to(stored.dtype) == stored, master, weights)
    weights = weights.mul_(kept).sub_(update)
    if master is not None:
        master.copy_(weights)
    elif stochastic:
        weights = round_stochastically(weights, stored.dtype)
    torch._foreach_copy_(views, list(weights.flatten(0, 1).unbind()))


def keeps_wide(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether to compute with, and keep state for, a wider copy of a parameter.

    Where options ask for it, and in float16, whose smallest number is above ε and g².
    """
    wanted = group["master_weights"] or group["stochastic_rounding"]
    wanted = wanted or parameter.dtype == torch.float16
    return bool(wanted) and compute_dtype(parameter.dtype) != parameter.dtype


def working_copy(parameter: Tensor, own: Mapping[str, Any]) -> Tensor:
    """The parameter's master; where it was written to in the meantime, or has none, itself."""
    wide = parameter.detach().to(compute_dtype(parameter.dtype))
    if "master" not in own:
        return wide
    master = own["master"]
    return torch.where(master.to(parameter.dtype) == parameter, master, wide)


def adamw_step(
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    scale: Tensor | None,
    gate: Tensor | None = None,
) -> None:
    """One step of torch's AdamW on ``parameters``, all of which have a gradient.

    Their state is made as torch makes it where it is missing. ``scale`` is a factor of the
    gradients, from clipping; a ``gate`` of zero, on an accelerator, leaves everything as it is.
    """
    if not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale is not None:
        gradients = [gradient * scale.to(gradient) for gradient in gradients]
    working = [
        working_copy(parameter, state[parameter]) if keeps_wide(group, parameter) else parameter
        for parameter in parameters
    ]
    gradients = [
        grad.to(copy.dtype)
        if grad.stride() == copy.stride()
        else torch.empty_like(copy).copy_(grad)
        for grad, copy in zip(gradients, working, strict=True)
    ]
    on_device = group["capturable"] or gate is not None
    for parameter, copy in zip(parameters, working, strict=True):
        own = state[parameter]
        if "exp_avg" not in own:
            double = torch.get_default_dtype() == torch.float64
            own["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                own[key] = torch.zeros_like(copy, memory_format=torch.preserve_format)
        for key in ("exp_avg", "exp_avg_sq"):
            # The parameter may have another dtype than it had.
            own[key] = own[key].to(copy.dtype)
        if on_device:  # As the fused form needs it; a state may have been loaded to the host.
            own["step"] = own["step"].to(parameter.device, torch.float32)
    states = [state[parameter] for parameter in parameters]
    on_host = parameters[0].device.type == "cpu"
    adamw(
        working,
        gradients,
        [own["exp_avg"] for own in states],
        [own["exp_avg_sq"] for own in states],
        [],
        [own["step"] for own in states],
        foreach=group["foreach"] if gate is None else None,
        # Only the fused form can be told on the device to leave everything as it is.
        fused=None if gate is None else True,
        found_inf=None if gate is None else (1 - gate).float(),
        capturable=group["capturable"] and not on_host,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        has_complex=any(torch.is_complex(p) for p in parameters),
    )
    for parameter, copy in zip(parameters, working, strict=True):
        if copy is parameter:
            continue
        if group["master_weights"]:
            state[parameter]["master"] = copy
        stochastic = group["stochastic_rounding"]
        parameter.copy_(round_stochastically(copy, parameter.dtype) if stochastic else copy)
