"""Invariant metrics on factor pairs, from r×r Grams alone, and the norm of gradients in them.

:func:`measure` has what a metric needs to know of stacked pairs, :func:`covector_frames` the frames
in which its dual norm is Euclidean; :func:`invariant_grad_norm` sums over a whole model.
QuotientSGD's gradients and projections in these metrics are in :mod:`quotientopt.optim.sgd_pairs`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quotientopt._linalg import Pair, compute_dtype, wide, wide_dtype
from quotientopt.groups import GL, O, PlaneCommutant, RotaryCommutant, StructureGroup
from quotientopt.optim.checks import full_precision
from quotientopt.optim.dressing import head_dressing
from quotientopt.optim.gauge import gradient_at_fixed_bias, seen_weights
from quotientopt.optim.options import HEAD_FRAMES, PAIR_METRICS
from quotientopt.optim.slices import find_slices
from quotientopt.symmetries import (
    Block,
    HeadSymmetry,
    SymmetryMap,
    find_symmetries,
    warn_of_gaps,
)
from quotientopt.symmetries.block import any_sharded
from quotientopt.symmetries.pairs import in_order, refuse_scattered, shape_key, stack_factors


class PairGrams(NamedTuple):
    """What a metric needs to know of stacked pairs; matrices ``(…, r, r)`` in wide precision.

    Attributes
    ----------
    group : StructureGroup
    left_gram, right_gram : Tensor
        ``A Aᵀ`` and ``B Bᵀ``.
    left_root, right_root : Tensor
        Cholesky factors of ``S_A`` and ``S_B``.
    deficient : Tensor
        Whether the left and the right factor are rank-deficient or not finite, ``(2, …)``; the
        matrices of such a factor are the identity and mean nothing.
    finite : Tensor
        Whether they are finite, likewise.
    """

    group: StructureGroup
    left_gram: Tensor
    right_gram: Tensor
    left_root: Tensor
    right_root: Tensor
    deficient: Tensor
    finite: Tensor


def refuse_unknown_geometry(group: StructureGroup, metric: str, name: str) -> None:
    """Refuse a group and a metric for which there is no closed-form projection.

    Raises
    ------
    ValueError
        Naming the symmetry and what may be used instead.
    """
    if not isinstance(group, GL | O | RotaryCommutant | PlaneCommutant):
        raise ValueError(
            f"symmetry {name!r}: no invariant metric is known for the group {group}; leave the "
            "symmetry out"
        )
    if isinstance(group, O) and metric == "right-invariant":
        raise ValueError(
            f"symmetry {name!r}: under O(r) the right-invariant metric has no closed-form "
            "horizontal projection; use metric='preconditioned'"
        )


def measure(group: StructureGroup, A: Tensor, B: Tensor, precision: float) -> PairGrams:
    """Grams of stacked pairs and where they are deficient; waits for nothing.

    Parameters
    ----------
    group : StructureGroup
        Of stacked factors (:func:`in_order`).
    A, B : Tensor
        Factors, ``(…, r, n)`` and ``(…, r, m)``.
    precision : float
        Machine epsilon of the parameters.
    """
    left_gram, left_root, *left = _factorize(group, A, precision)
    right_gram, right_root, *right = _factorize(group, B, precision)
    deficient, finite = (torch.stack(flags) for flags in zip(left, right, strict=True))
    return PairGrams(group, left_gram, right_gram, left_root, right_root, deficient, finite)


# Of the singular values of AᵀB: in float32 the smallest would be rounding of the largest.
LARGEST_CONDITION = 1e8


def heads_without_metric(geometry: PairGrams) -> Tensor:
    """Heads that are no points of the quotient, ``(…)``: a factor is deficient, or AᵀB nearly.

    Rows that are tiny in both factors have full rank, but their metric would be of any size. With
    ``K = L_Aᵀ L_B``, whose singular values are those of AᵀB, the bound is on ‖K‖ ‖K⁻¹‖, which no
    group element changes.
    """
    left, right = geometry.left_root, geometry.right_root
    forward = torch.linalg.matrix_norm(left.mT @ right)
    backward = torch.linalg.matrix_norm(inverse_of_root(right) @ inverse_of_root(left).mT)
    vanishing = ~(forward * backward <= LARGEST_CONDITION)
    return geometry.deficient.any(0) | vanishing


def without_metric(geometry: PairGrams, heads: Tensor) -> PairGrams:
    """The same with the Euclidean metric for some heads, ``(…)``: all their matrices are one."""
    identity = torch.eye(
        geometry.left_root.size(-1),
        dtype=geometry.left_root.dtype,
        device=geometry.left_root.device,
    )
    left_gram, right_gram, left_root, right_root = (
        torch.where(heads[..., None, None], identity, matrix) for matrix in geometry[1:5]
    )
    return geometry._replace(
        left_gram=left_gram, right_gram=right_gram, left_root=left_root, right_root=right_root
    )


def _factorize(
    group: StructureGroup, X: Tensor, precision: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X Xᵀ, the Cholesky factor of ρ(X Xᵀ), whether X is deficient or not finite, and finite."""
    rows = wide(X)
    gram = rows @ rows.mT
    S = group.row_products(gram)
    root, info = torch.linalg.cholesky_ex(S)
    pivots = root.diagonal(dim1=-2, dim2=-1).square()
    # A pivot over its diagonal entry is the squared sine of a row's angle to those above it;
    # rounding of the stored parameters alone makes it about the square of their precision.
    least = max(4 * precision**2, S.size(-1) * torch.finfo(S.dtype).eps)
    flat = (pivots <= least * S.diagonal(dim1=-2, dim2=-1)).any(-1)
    finite = S.isfinite().flatten(-2).all(-1)
    deficient = (info != 0) | flat | ~finite
    if X.dtype == wide_dtype(X.device):
        # A Gram squares the condition. Where no wider precision makes up for it, the Gram of the
        # nearly orthonormal rows L⁻¹X corrects the factor (Fukaya et al. 2014, CholeskyQR2).
        nearly = torch.linalg.solve_triangular(root, rows, upper=False)
        correction, info = torch.linalg.cholesky_ex(group.row_products(nearly @ nearly.mT))
        root, deficient = root @ correction, deficient | (info != 0)
    # Decompositions further on would fail on NaN, before anyone has looked at the flags.
    identity = torch.eye(S.size(-1), dtype=S.dtype, device=S.device)
    replaced = deficient[..., None, None]
    gram, root = (torch.where(replaced, identity, matrix) for matrix in (gram, root))
    return gram, root, deficient, finite


def covector_frames(metric: str, geometry: PairGrams) -> tuple[Tensor, Tensor]:
    """Frames (F_A, F_B) in which the metric's dual norm is Euclidean.

    ``‖∂‖² = ‖F_A ∂_A‖² + ‖F_B ∂_B‖²`` is the squared norm of the Riemannian gradient
    ``(F_Aᵀ F_A ∂_A, F_Bᵀ F_B ∂_B)``. Under g, F_A goes to ``R F_A g^{-1}`` and F_B to ``R' F_B gᵀ``
    with rotations R, R', so that the norm stays and the gradient turns into a tangent vector.

    Parameters
    ----------
    metric : str
        ``"preconditioned"``: ``F_A = L_B^{-1}``, ``F_B = L_A^{-1}`` with ``S = L Lᵀ``.
        ``"right-invariant"``: ``F_A = L_Aᵀ``, ``F_B = L_Bᵀ``.
        ``"balanced"``, ``"orthonormal"``, ``"svd"``: the section of
        :class:`quotientopt.QuotientAdam`'s head frame of that name.
    geometry : PairGrams
    """
    left, right = geometry.left_root, geometry.right_root
    if metric == "right-invariant":
        return left.mT, right.mT
    if metric in HEAD_FRAMES:
        dressing = head_dressing(metric, geometry.group, geometry.left_gram, geometry.right_gram)
        return dressing.left, dressing.right
    return inverse_of_root(right), inverse_of_root(left)


def dressed_gradient(metric: str, geometry: PairGrams, partials: Pair) -> Pair:
    """``(F_A ∂_A, F_B ∂_B)`` in the frames of :func:`covector_frames`, in the partials' dtype."""
    F_A, F_B = covector_frames(metric, geometry)
    return F_A.to(partials[0].dtype) @ partials[0], F_B.to(partials[1].dtype) @ partials[1]


def inverse_of_root(L: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix."""
    identity = torch.eye(L.size(-1), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)


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
