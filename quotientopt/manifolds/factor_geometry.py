"""The geometry of factor pairs under one group and metric, for any batch shape.

:class:`FactorGeometry` is what :class:`~quotientopt.manifolds.FactorQuotient` computes. It needs
two things besides metrics, vertical components and orbits:

- A well-conditioned representative to compute at, where rounding would grow with the pair's own
  (:func:`well_conditioned`). Christoffel forms multiply several factors, and a badly conditioned
  representative squares the rounding of each. They are equivariant, so they may be computed at
  another representative and moved back.
- Large batches on the processor, in blocks that stay in its caches (:func:`in_blocks`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, frobenius_inner, wide, wide_dtype
from quotientopt.groups import O, StructureGroup
from quotientopt.manifolds.metrics import METRICS, Factor, FactorPoint, JointPoint
from quotientopt.manifolds.orbits import orbits_of
from quotientopt.manifolds.vertical import vertical_component


class FactorGeometry:
    """What :class:`~quotientopt.manifolds.FactorQuotient` computes, without checks of shapes.

    Pairs come as they are stored and go back in the widest precision.

    Parameters
    ----------
    group : StructureGroup
    metric : str
    check : bool
        Whether to refuse rank-deficient points.

    Raises
    ------
    ValueError
        If the group is not known or the metric not invariant under it.
    """

    def __init__(self, group: StructureGroup, metric: str, *, check: bool) -> None:
        self.group = group
        self.vertical_component = vertical_component(group, metric)
        self.metric = METRICS[metric]
        self.orbits = orbits_of(group)
        self.check = check

    def point(self, x: Pair, *, check: bool | None = None) -> Any:
        """Factorisations of a point; what is not finite shows there too."""
        stored = x[0].dtype if x[0].dtype == x[1].dtype else wide_dtype(x[0].device)
        check = self.check if check is None else check
        return self.metric.point(_wide(x), self.group, check=check, stored=stored)

    def inner(self, x: Pair, u: Pair, v: Pair) -> Tensor:
        """``⟨u, v⟩_x``."""
        return self._inner(self.point(x), _wide(u), _wide(v))

    def norms(self, x: Pair, u: Pair) -> tuple[Tensor, Tensor]:
        """Norms of u and of its vertical component."""
        point, vector = self.point(x), _wide(u)
        vertical = self.vertical_component(point, vector).dense()
        size, vertical_size = (self._inner(point, w, w).sqrt() for w in (vector, vertical))
        return size, vertical_size

    def vertical(self, x: Pair, u: Pair) -> Pair:
        """The vertical component of u."""
        return self.vertical_component(self.point(x), _wide(u)).dense()

    def horizontal(self, x: Pair, u: Pair) -> Pair:
        """The horizontal component of u."""
        return self._horizontal(self.point(x), _wide(u))

    def unit_horizontal(self, x: Pair, u: Pair) -> Pair:
        """The horizontal component of u, scaled to norm 1."""
        point = self.point(x)
        horizontal = self._horizontal(point, _wide(u))
        norm = self._inner(point, horizontal, horizontal).sqrt()[..., None, None]
        return horizontal[0] / norm, horizontal[1] / norm

    def lift(self, x: Pair, base: Tensor) -> Pair:
        """The horizontal u with the derivative `base` of the invariants."""
        return self._horizontal(self.point(x), self.orbits.lift(_wide(x), wide(base)))

    def gradient(self, x: Pair, partials: Pair) -> Pair:
        """The Riemannian gradient."""
        return self.metric.gradient(self.point(x), _wide(partials))

    def hessian(self, x: Pair, partials: Pair, second: Pair, u: Pair) -> Pair:
        """Horizontal part of ``D grad[u] + Γ(grad, u)``, at a well-conditioned representative."""
        point, partials, second, u = self.point(x), _wide(partials), _wide(second), _wide(u)
        there = well_conditioned(point)
        if there is None:
            return self._hessian(point, partials, second, u)
        hessian = self._hessian(
            self.point(there.pair, check=False),
            there.cotangent(partials),
            there.cotangent(second),
            there.tangent(u),
        )
        return there.back(hessian)

    def second_order_step(self, x: Pair, u: Pair) -> Pair:
        """``x + u − ½ Γ(u, u)``."""
        point, (A, B), u = self.point(x), _wide(x), _wide(u)
        there = well_conditioned(point)
        if there is None:
            Gamma = self.metric.christoffel(point, u, u)
        else:
            moved = there.tangent(u)
            representative = self.point(there.pair, check=False)
            Gamma = there.back(self.metric.christoffel(representative, moved, moved))
        return A + u[0] - Gamma[0] / 2, B + u[1] - Gamma[1] / 2

    def _inner(self, point: Any, u: Pair, v: Pair) -> Tensor:
        image = self.metric.isometry(point, u)
        other = image if v is u else self.metric.isometry(point, v)
        return frobenius_inner(image[0], other[0]) + frobenius_inner(image[1], other[1])

    def _horizontal(self, point: Any, u: Pair) -> Pair:
        return self.vertical_component(point, u).subtracted_from(u)

    def _hessian(self, point: Any, partials: Pair, second: Pair, u: Pair) -> Pair:
        derivative = self.metric.gradient_derivative(point, partials, second, u)
        Gamma = self.metric.christoffel(point, self.metric.gradient(point, partials), u)
        return self._horizontal(point, (derivative[0] + Gamma[0], derivative[1] + Gamma[1]))


def _wide(pair: Pair) -> Pair:
    return wide(pair[0]), wide(pair[1])


class Representative(NamedTuple):
    """The representative ``(L_Bᵀ A, L_B^{-1} B)``, whose second factor has orthonormal rows.

    Attributes
    ----------
    pair : tuple of Tensor
        The representative.
    B : Factor
        The second factor of the point it was made from: ``g = L_B^{-1}``.
    """

    pair: Pair
    B: Factor

    def tangent(self, u: Pair) -> Pair:
        """Move a tangent vector there, ``(L_Bᵀ u_A, L_B^{-1} u_B)``."""
        return self.B.root.mT @ u[0], self.B.solve_root(u[1])

    def cotangent(self, partials: Pair) -> Pair:
        """Move partial derivatives there, ``(L_B^{-1} ∂_A, L_Bᵀ ∂_B)``."""
        return self.B.solve_root(partials[0]), self.B.root.mT @ partials[1]

    def back(self, u: Pair) -> Pair:
        """Move a tangent vector back, ``(L_B^{-T} u_A, L_B u_B)``."""
        return self.B.solve_root_transposed(u[0]), self.B.root @ u[1]


def well_conditioned(x: FactorPoint | JointPoint) -> Representative | None:
    """The representative, where it lies in the orbit and no precision is to spare; else None.

    Elements of O(r) cannot change condition numbers, and points that are stored in a lower
    precision than they are computed in have precision to spare.
    """
    if isinstance(x, JointPoint) or x.B.orthonormal is None or isinstance(x.group, O):
        return None
    return Representative((x.B.root.mT @ x.A.rows, x.B.orthonormal), x.B)


BLOCK_BYTES = 2**23
"""Size of the largest tensor of a block in double precision, for each thread.

Allocators hand temporaries of more than a few times that back to the operating system after every
operation, and fetching them anew costs more than computing with them.
"""

_DOUBLE_BYTES = 8


def in_blocks(
    function: Callable[..., Any], batch_shape: Sequence[int], *arguments: Sequence[Tensor]
) -> Any:
    """``function(*arguments)``, in blocks of batch items where the tensors are large.

    Parameters
    ----------
    function : callable
        Takes tuples of tensors with any batch shape in front; returns a tensor or a tuple of
        tensors with the same batch shape. Batch items do not influence each other.
    batch_shape : sequence of int
        Leading dimensions of all tensors.
    *arguments : tuples of Tensor

    Returns
    -------
    Tensor or tuple of Tensor
        What the function returns for the whole batch. On accelerators, and where one block is
        enough, it is simply called.
    """
    count = torch.Size(batch_shape).numel()
    largest = max(tensor.numel() for pair in arguments for tensor in pair)
    limit = BLOCK_BYTES * torch.get_num_threads()
    size = max(1, limit * count // max(1, _DOUBLE_BYTES * largest))
    if size >= count or arguments[0][0].device.type != "cpu":
        return function(*arguments)
    depth = len(batch_shape)
    flat = [[t.reshape(count, *t.shape[depth:]) for t in pair] for pair in arguments]
    try:
        results = [
            function(*(tuple(t[start : start + size] for t in pair) for pair in flat))
            for start in range(0, count, size)
        ]
    except ValueError:
        # Of the whole batch, so that the message counts the batch items of the whole batch.
        return function(*arguments)
    if isinstance(results[0], Tensor):
        return _join(results, batch_shape)
    return tuple(_join(parts, batch_shape) for parts in zip(*results, strict=True))


def _join(parts: Sequence[Tensor], batch_shape: Sequence[int]) -> Tensor:
    joined = torch.cat(tuple(parts))
    return joined.reshape(*batch_shape, *joined.shape[1:])
