"""The norm of a model's gradient that no gauge changes: :func:`invariant_grad_norm`."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quotientopt._linalg import compute_dtype
from quotientopt.optim.bookkeeping.checks import full_precision
from quotientopt.optim.bookkeeping.slices import find_slices
from quotientopt.optim.gauge import gradient_at_fixed_bias, seen_weights
from quotientopt.optim.options import HEAD_FRAMES, PAIR_METRICS
from quotientopt.optim.sgd.metrics import (
    dressed_gradient,
    heads_without_metric,
    measure,
    refuse_unknown_geometry,
    without_metric,
)
from quotientopt.symmetries import (
    Block,
    HeadSymmetry,
    SymmetryMap,
    find_symmetries,
    warn_of_gaps,
)
from quotientopt.symmetries.block import any_sharded
from quotientopt.symmetries.pairs import in_order, refuse_scattered, shape_key, stack_factors

_uncovered: WeakKeyDictionary[SymmetryMap, dict[int, list[Block]]] = WeakKeyDictionary()


@torch.no_grad()
@full_precision()
def invariant_grad_norm(
    model_or_optimizer_or_params: nn.Module | Optimizer | Iterable[Any],
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    *,
    metric: str = "preconditioned",
) -> Tensor:
    r"""Norm of the current gradients, the same from every point of an orbit.

    For factor pairs it is the norm of the Riemannian gradient in an invariant metric, by default

    .. math:: \|∂\|^2 = \mathrm{tr}\big((BB^T)^{-1} ∂_A ∂_A^T\big)
       + \mathrm{tr}\big((AA^T)^{-1} ∂_B ∂_B^T\big),

    for all other parameters the Euclidean norm, which rotations of the residual stream do not
    change. Biases that may be translated are left out of the Grams, and where the output bias takes
    the translation of the values', :math:`∂_A` is that at fixed effective bias.
    ``torch.nn.utils.get_total_norm`` changes with the gauge, and so does clipping by it;
    to clip invariantly, scale all gradients by ``max_norm / norm``:

    >>> norm = invariant_grad_norm(optimizer)                                  # doctest: +SKIP
    >>> torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)    # doctest: +SKIP

    Parameters
    ----------
    model_or_optimizer_or_params : Module, Optimizer or iterable
        Whose gradients; parameters without one count as zero. Tensors, named tensors or
        param-group dicts.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        Default: those of the optimizer, or what is found in the model, which takes time: in a
        training loop pass the optimizer or a map found once. ``()`` for the Euclidean norm.
    metric : str
        ``"preconditioned"`` or ``"right-invariant"``, as in :class:`quotientopt.QuotientSGD`, of
        whose Riemannian gradient this is the norm. ``"balanced"``, ``"orthonormal"`` or ``"svd"``:
        the norm of the dressed gradient in :class:`quotientopt.QuotientAdam`'s head frames of that
        name, made afresh. That is what its ``max_grad_norm`` clips by in steps that refresh the
        frames; between refreshes the optimizer uses the last frames. Norms in ``"svd"`` and
        ``"balanced"`` frames agree, as do those in ``"orthonormal"`` ones and
        ``"preconditioned"`` but for O(r), whose frames are the identity.

    Returns
    -------
    Tensor
        0-dimensional, in at least float32, on the device of the first gradient; NaN where a factor
        is not finite. Heads of which a factor is rank-deficient count by their Euclidean norm, as
        :class:`quotientopt.QuotientSGD` steps them. The host does not wait for it, but for the
        decompositions of ``"balanced"`` and ``"svd"``.

    Raises
    ------
    ValueError
        If the symmetries are missing, or none of their parameters is among those given, or the
        metric is unknown.
    """
    if metric not in (*PAIR_METRICS, *HEAD_FRAMES):
        known = ", ".join(map(repr, (*PAIR_METRICS, *HEAD_FRAMES)))
        raise ValueError(f"metric must be one of {known}, got {metric!r}")
    parameters, symmetries = _resolve(model_or_optimizer_or_params, symmetries)
    if any_sharded(parameters):
        raise ValueError(
            "no process has whole gradients of parameters that are sharded (DTensors); "
            "QuotientAdam(max_grad_norm=...) clips them by this norm"
        )
    own = {id(parameter) for parameter in parameters}
    covered = {id(b.parameter) for symmetry in symmetries.heads for b in symmetry.blocks}
    if covered and not covered & own:
        raise ValueError(
            "the symmetries belong to another model: none of its parameters was given; pass "
            "find_symmetries(model) of the model whose gradients these are"
        )
    norms = [
        torch.linalg.vector_norm(part, dtype=compute_dtype(part.dtype))
        for part in (
            *_plain_gradients(parameters, covered),
            *_uncovered_gradients(symmetries, own),
            *_dressed_gradients(symmetries, own, metric),
        )
    ]
    if not norms:
        return torch.zeros(())
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms))
    stacked = torch.stack([norm.to(norms[0].device, dtype) for norm in norms])
    return torch.linalg.vector_norm(stacked)


def _resolve(
    target: nn.Module | Optimizer | Iterable[Any],
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
) -> tuple[list[Tensor], SymmetryMap]:
    """The parameters of a target and the symmetries to use."""
    if isinstance(target, nn.Module):
        parameters: list[Tensor] = list(target.parameters())
        if symmetries is None:
            symmetries = find_symmetries(target)
            warn_of_gaps(
                target, symmetries, "invariant_grad_norm is Euclidean, and sees the gauge,"
            )
    elif isinstance(target, Optimizer):
        inner = unwrapped(target)
        parameters = [p for group in inner.param_groups for p in group["params"]]
        symmetries = getattr(inner, "symmetries", None) if symmetries is None else symmetries
    else:
        parameters = list(_tensors([target] if isinstance(target, Tensor) else target))
    if symmetries is None:
        raise ValueError(
            "the symmetries are not known; pass symmetries=find_symmetries(model), or "
            "symmetries=() for the Euclidean norm"
        )
    if not isinstance(symmetries, SymmetryMap):
        symmetries = SymmetryMap(symmetries)
    return list({id(p): p for p in parameters}.values()), symmetries


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as accelerate's, which do not hand on ``symmetries``."""
    while not hasattr(optimizer, "symmetries"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def _tensors(items: Iterable[Any]) -> Iterable[Tensor]:
    """Tensors of what torch's optimizers take: tensors, named tensors, param groups."""
    for item in items:
        if isinstance(item, dict):
            inner = item["params"]
            yield from _tensors([inner] if isinstance(inner, Tensor) else inner)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            yield item[1]
        elif isinstance(item, Tensor):
            yield item
        else:
            raise TypeError(
                "expected a model, an optimizer, or tensors, named tensors or param-group dicts, "
                f"got {type(item).__name__}"
            )


def _plain_gradients(parameters: Sequence[Tensor], covered: set[int]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None and id(p) not in covered]
    gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    # Of a sparse gradient the values count, those of one place together.
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]


def _uncovered_gradients(symmetries: SymmetryMap, own: set[int]) -> list[Tensor]:
    """Gradients of what the symmetries of a fused parameter leave uncovered."""
    if symmetries not in _uncovered:
        parameters = {id(b.parameter): b for s in symmetries.heads for b in s.blocks}
        group = {
            "params": [block.parameter for block in parameters.values()],
            "head_frame": True,
            "residual_frame": None,
        }
        names = {key: block.name for key, block in parameters.items() if block.name}
        slices = find_slices([group], symmetries, names).framed
        _uncovered[symmetries] = {
            key: [
                slice_.blocks[0]
                for slice_ in slices
                if not slice_.side and id(slice_.parameter) == key
            ]
            for key in parameters
        }
    return [
        block.view(block.parameter.grad)
        for key, blocks in _uncovered[symmetries].items()
        for block in blocks
        if key in own and block.parameter.grad is not None
    ]


def _dressed_gradients(symmetries: SymmetryMap, own: set[int], metric: str) -> list[Tensor]:
    """Gradients of the pairs in the frames of the metric; NaN where a factor is not finite."""

    of_left = {id(b): symmetry for symmetry in symmetries.heads for b in symmetry.left_blocks}

    def read(block: Block) -> Tensor:
        if id(block.parameter) not in own or block.parameter.grad is None:
            return torch.zeros_like(block.view())
        if id(block) in of_left:
            return gradient_at_fixed_bias(of_left[id(block)], block)
        return block.view(block.parameter.grad)

    alike: dict[tuple[object, ...], list[HeadSymmetry]] = defaultdict(list)
    for symmetry in symmetries.heads:
        refuse_unknown_geometry(symmetry.group, metric, symmetry.name)
        refuse_scattered(symmetry)
        alike[shape_key(symmetry)].append(symmetry)
    found: list[Tensor] = []
    for members in alike.values():
        dtypes = [block.parameter.dtype for block in members[0].blocks]
        dtype = compute_dtype(functools.reduce(torch.promote_types, dtypes))
        factors = stack_factors(members, seen_weights(members), dtype)
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        geometry = measure(in_order(members[0].group), *factors, precision)
        geometry = without_metric(geometry, heads_without_metric(geometry))
        partials = stack_factors(members, read, dtype)
        defined = torch.where(geometry.finite.all(0), 1.0, torch.nan)[..., None, None]
        for dressed in dressed_gradient(metric, geometry, partials):
            found.append(dressed * defined.to(dtype))
    return found
