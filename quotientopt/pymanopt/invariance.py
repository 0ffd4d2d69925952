"""Whether a cost is a function on the quotient at all."""

from collections.abc import Sequence
from typing import Any

import torch
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from quotientopt._linalg import standard_normal
from quotientopt.pymanopt.autodiff import Cost, check_loss
from quotientopt.pymanopt.base import QuotientAdapter


def check_invariance(factors: Sequence[Manifold], cost: Cost, tensors: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` if the gradient of `cost` has a vertical part near a point.

    A function is constant along (connected) orbits if and only if its gradient is horizontal. The
    test is made where every coordinate is moved at random by about a tenth of its size: at the
    point itself the gradient may vanish, and then rounding alone would decide.

    Parameters
    ----------
    factors : sequence of pymanopt manifolds
        The factors of the product, in order.
    cost : callable
        Function of the sequence of all tensors of a point.
    tensors : sequence of Tensor
        A point of the product, flattened.
    """
    generator = torch.Generator().manual_seed(0)
    nearby = [_moved(tensor, generator).requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        loss = cost(nearby)
    check_loss(loss)
    partials = torch.autograd.grad(loss, nearby, materialize_grads=True)
    if not all(bool(torch.isfinite(partial).all()) for partial in partials):
        return
    start = 0
    for factor in factors:
        part = slice(start, start + factor.num_values)
        if isinstance(factor, QuotientAdapter):
            _check_factor(factor, nearby[part], partials[part])
        start += factor.num_values


def _check_factor(
    factor: QuotientAdapter[Any], point: Sequence[Tensor], partials: Sequence[Tensor]
) -> None:
    quotient = factor.quotient
    x: Any = tuple(tensor.detach() for tensor in point)
    partial: Any = tuple(partials)
    if len(x) == 1:
        x, partial = x[0], partial[0]
    gradient = quotient.gradient(x, partial)
    whole = quotient.norm(x, gradient)
    vertical = quotient.norm(x, quotient.vertical_component(x, gradient))
    tolerance = torch.finfo(whole.dtype).eps ** 0.4
    if bool((vertical > tolerance * whole).any()):
        ratio = (vertical / whole).nan_to_num(0).max().item()
        raise ValueError(
            f"cost is not invariant under {quotient.group!r}: the vertical part of its gradient is "
            f"{ratio:.0e} of the whole; use a smaller group, an invariant cost, or "
            "check_invariance=False"
        )


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = standard_normal(tensor.shape, generator=generator, device=tensor.device)
    size = tensor.square().mean().sqrt()
    return tensor + (0.1 * size * noise).to(tensor.dtype)
