"""Leading directions of hidden units: a frame E of k of them, moments along them and of the rest.

Along E Adam works in the eigenframe of ∂∂ᵀ, elsewhere unit by unit,

    D = E D_E + D_rest,

D_E from Eᵀ z and D_rest from (1 − E Eᵀ) z, z = ∂Q. A frame of all units (`hidden_frame=
"per_matrix"`) costs products of rows × rows; here all products are rows × k, and instead of the
covariance C = EMA(∂∂ᵀ) its image C E is kept. Permutations of the units move E along, E ↦ P E;
nothing else here changes with them, or with rotations of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

from quotientopt.optim.eigenframes import SHIFT, orthonormalise
from quotientopt.optim.update import Product

# Share of the weights in the first leading frames, which the first gradient alone would make such
# that it is diagonal in them (see `ROW_TIES`).
LEADING_TIES = 0.1


def first_leading_frame(gradient: Tensor, weights: Tensor, directions: int) -> Tensor:
    """Leading left singular vectors of a gradient and a tenth of the weights, each of norm one.

    Permutations of the rows move them along, rotations of the columns leave them. Directions that
    both lack are zero.

    Parameters
    ----------
    gradient, weights : Tensor
        Shape ``(L, rows, d)``.
    directions : int
        k, at most d.

    Returns
    -------
    Tensor
        Shape ``(L, rows, k)``.
    """
    both = _gradient_and_weights(gradient, weights)
    return _leading_directions(both, both, directions)


def _gradient_and_weights(gradient: Tensor, weights: Tensor) -> Tensor:
    tiny = torch.finfo(weights.dtype).tiny
    gradient, weights = (
        x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny) for x in (gradient, weights)
    )
    return gradient + LEADING_TIES * weights


def _leading_directions(matrix: Tensor, whole: Tensor, directions: int) -> Tensor:
    """Leading left singular vectors; zero where its Gram, or the whole, does not resolve them."""
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    rounding = vectors.size(-1) * torch.finfo(values.dtype).eps
    of_whole = rounding**2 * whole.square().sum((-2, -1))[..., None]
    least = torch.maximum(rounding * values[..., -1:], of_whole)
    leading = torch.where((values > least)[..., None, :], matrix @ vectors, 0)
    return orthonormalise(leading[..., -directions:].flip(-1))


def completed(frame: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """A frame with directions in place of those that are missing: what leads beside it.

    A gradient of few rows beside weights of zero (an output projection at its start) tells fewer
    than k directions, and the Gram of a wide matrix resolves no small ones beside large ones.
    ``mean``, of the gradients, and ``weights`` are ``(L, rows, d)``.
    """
    both = _gradient_and_weights(mean, weights)
    beside = _leading_directions(both - frame @ (frame.mT @ both), both, frame.size(-1))
    missing = (frame == 0).all(-2, keepdim=True)
    places = (missing.cumsum(-1) - 1).clamp_min(0).expand_as(frame)
    filled = orthonormalise(torch.where(missing, beside.gather(-1, places), frame))
    return torch.where(missing.any(-1, keepdim=True), filled, frame)


def next_leading_frame(image: Tensor, frame: Tensor) -> Tensor:
    """One step of orthogonal iteration from C E, as :func:`next_eigenframe` takes it from C.

    Parameters
    ----------
    image, frame : Tensor
        C E and E, shape ``(L, rows, k)``. Where the image is zero the frame stays.
    """
    rayleigh = (frame * image).sum(-2, keepdim=True)
    total = rayleigh.sum(-1, keepdim=True)
    order = rayleigh.argsort(dim=-1, descending=True, stable=True).expand_as(frame)
    turned = image / total.clamp_min(torch.finfo(image.dtype).tiny)
    turned = turned.add(frame, alpha=SHIFT / frame.size(-1)).gather(-1, order)
    return torch.where(total <= 0, frame, orthonormalise(turned))


def begin_(
    state: MutableMapping[str, Tensor], gradient: Tensor, weights: Tensor, new: Tensor
) -> None:
    """First frames of the slices that have none.

    Parameters
    ----------
    state : mapping
        Of a bucket; its ``hidden_frame`` is written to.
    gradient, weights : Tensor
        Shape ``(L, rows, d)``.
    new : Tensor
        Which slices have none, ``(L,)``.
    """
    frame = state["hidden_frame"]
    first = first_leading_frame(gradient, weights, frame.size(-1))
    first = completed(first, gradient, weights)
    frame.copy_(torch.where(new[:, None, None], first, frame))


def turn_(state: MutableMapping[str, Tensor], weights: Callable[[], Tensor]) -> None:
    """Turn the frame, and divide the moments anew into what is along it and the rest.

    The second moment goes along as (R∘R) v_E with R = E_newᵀ E; what is new along E takes the mean
    of the rest's over the rows.

    Parameters
    ----------
    state : mapping
        Of a bucket.
    weights : callable
        Returns the weights in the frame of the columns, ``(L, rows, d)``.
    """
    frame, image = state["hidden_frame"], state["hidden_image"]
    mean, along = state["exp_avg"].flatten(1, -2), state["hidden_exp_avg"].flatten(1, -2)
    whole = mean + frame @ along
    fresh = next_leading_frame(image, frame)
    if bool((fresh == 0).all(-2).any()):
        fresh = completed(fresh, whole, weights())
    change = fresh.mT @ frame
    along.copy_(fresh.mT @ whole)
    mean.copy_(whole - fresh @ along)
    rest = state["exp_avg_sq_columns" if "exp_avg_sq_columns" in state else "exp_avg_sq"]
    rest = rest.flatten(1, -2).mean(1, keepdim=True)
    square, kept = state["hidden_exp_avg_sq"].flatten(1, -2), change.square()
    square.copy_(kept @ square + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * rest)
    image.copy_(image @ change.mT)
    frame.copy_(fresh)


def along_and_rest(
    frame: Tensor, framed: Tensor, adam: Callable[[Tensor, str], Tensor], multiply: Product
) -> Tensor:
    """Adam's direction E D_E + D_rest.

    Parameters
    ----------
    frame : Tensor
        E, shape ``(L, 1, 1, rows, k)``.
    framed : Tensor
        z, shape ``(L, 1, 1, rows, n)``.
    adam : callable
        Updates the moments whose keys begin as given, by a part of z, and returns the direction.
    multiply : callable
    """
    along = multiply(frame.mT, framed)
    rest = adam(framed - multiply(frame, along), "")
    return rest.add_(multiply(frame, adam(along, "hidden_")))
