"""The representative of an orbit nearest to a given pair: Newton's method on the structure group.

For pairs x = (A, B) and y the function ``½ ‖g^{-T} A − A_y‖² + ½ ‖g B − B_y‖²`` of g grows in every
direction in which the group is not compact, so that it has a least value. With the difference
``(Δ_A, Δ_B) = g·x − y`` its derivative along ``t ↦ exp(tΛ) g`` is ``⟨Λ, C⟩`` with

    C = Δ_B Bᵀ − A Δ_Aᵀ,

the charge of the difference, projected to the Lie algebra: where it vanishes the difference is
orthogonal to the orbit. All is done with r×r products, the factors themselves are not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quotientopt._linalg import Pair, frobenius_inner
from quotientopt.groups import RotaryCommutant, StructureGroup

_STEPS, _INNER_STEPS, _HALVINGS = 100, 30, 40
_PRECISION = 1e-13
# Lengths of steps: that of the first, and the longest, to which accepted ones grow.
_FIRST, _LONGEST = 1.0, 8.0


class Nearest(NamedTuple):
    """What :func:`nearest_element` finds.

    Attributes
    ----------
    g, contragredient : Tensor, shape (*batch, r, r)
    charge : Tensor, shape (*batch)
        ``‖C‖ / (‖A Aᵀ‖ + ‖B Bᵀ‖)``: the certificate.
    """

    g: Tensor
    contragredient: Tensor
    charge: Tensor


class _Products(NamedTuple):
    """``A Aᵀ``, ``B Bᵀ``, ``A_y Aᵀ``, ``B_y Bᵀ``."""

    SA: Tensor
    SB: Tensor
    XA: Tensor
    XB: Tensor

    def moved(self, g: Tensor, contragredient: Tensor) -> _Products:
        """Those of ``(g^{-T} A, g B)``."""
        return _Products(
            contragredient @ self.SA @ contragredient.mT,
            g @ self.SB @ g.mT,
            self.XA @ contragredient.mT,
            self.XB @ g.mT,
        )

    def value(self) -> Tensor:
        """``½ ‖x − y‖²`` less a constant."""
        traces = (_trace(self.SA + self.SB) / 2, _trace(self.XA + self.XB))
        return traces[0] - traces[1]

    def size(self) -> Tensor:
        """``‖A Aᵀ‖ + ‖B Bᵀ‖``."""
        return torch.linalg.matrix_norm(self.SA) + torch.linalg.matrix_norm(self.SB)


@torch.no_grad()
def nearest_element(group: StructureGroup, x: Pair, y: Pair, start: Pair) -> Nearest:
    """The g that minimises ``‖g·x − y‖``, from a start; a constant for autograd.

    Steps solve Newton's equations by conjugate gradients, preconditioned by the Gauss–Newton part
    ``S_A Λ + Λ S_B``, which is inverted in closed form, and are shortened until the distance
    falls. It never rises above that of the start. GL has two components, and no path leads from one
    to the other: from the minimum in one the direction of least overlap with y is turned round and
    the descent begins again, and the nearer end is taken.

    Parameters
    ----------
    group : StructureGroup
        A subgroup of GL(r) closed under transposition.
    x, y : tuple of Tensor
        Pairs in the widest precision, x of full rank.
    start : tuple of Tensor
        ``(g, g^{-T})``.
    """
    g, contragredient = (part.detach() for part in start)
    A, B = contragredient @ x[0].detach(), g @ x[1].detach()
    state = _Products(A @ A.mT, B @ B.mT, y[0].detach() @ A.mT, y[1].detach() @ B.mT)
    factor, inverse, found = _descend(group, state)
    g, contragredient = factor @ g, inverse.mT @ contragredient
    mirror = _mirror(group, found)
    if mirror is not None:
        factor, inverse, other = _descend(group, found.moved(mirror, mirror))
        nearer = (other.value() < found.value())[..., None, None]
        g = torch.where(nearer, factor @ mirror @ g, g)
        contragredient = torch.where(nearer, inverse.mT @ mirror @ contragredient, contragredient)
        found = _Products(*(torch.where(nearer, p, q) for p, q in zip(other, found, strict=True)))
    size = found.size()
    size = torch.where(size > 0, size, 1)
    return Nearest(g, contragredient, torch.linalg.matrix_norm(_charge(group, found)) / size)


def _descend(group: StructureGroup, state: _Products) -> tuple[Tensor, Tensor, _Products]:
    """The element that leads to a minimum, its inverse, and the products there."""
    element = group.identity(state.SA.shape[:-2], state.SA.dtype, state.SA.device)
    inverse = element
    done = torch.zeros(state.SA.shape[:-2], dtype=torch.bool, device=state.SA.device)
    longest = torch.full_like(state.SA[..., 0, 0], _FIRST)
    for _ in range(_STEPS):
        charge = _charge(group, state)
        done = done | (torch.linalg.matrix_norm(charge) <= _PRECISION * state.size())
        if bool(done.all()):
            break
        direction = _newton_direction(group, state, charge)
        step, state = _shortened(state, charge, direction, done, longest)
        taken = torch.linalg.matrix_norm(step)
        grown = torch.where(taken > 0.9 * longest, 2 * longest, (2 * taken).clamp_min(_FIRST))
        longest = torch.minimum(grown, longest.new_tensor(_LONGEST))
        done = done | (step == 0).all(dim=-1).all(dim=-1)
        element, inverse = torch.matrix_exp(step) @ element, inverse @ torch.matrix_exp(-step)
    return element, inverse, state


def _mirror(group: StructureGroup, state: _Products) -> Tensor | None:
    """The reflection of the direction in which x and y overlap least; None without components."""
    first = group.rotary_dim if isinstance(group, RotaryCommutant) else 0
    if first == group.r:
        return None
    overlap = (state.XA + state.XB)[..., first:, first:]
    _, axes = torch.linalg.eigh(overlap + overlap.mT)
    axis = torch.nn.functional.pad(axes[..., :1], (0, 0, first, 0))
    identity = torch.eye(group.r, dtype=axis.dtype, device=axis.device)
    return identity - 2 * axis @ axis.mT


def relative_charge(group: StructureGroup, x: Pair, y: Pair) -> Tensor:
    """``‖C‖ / (‖A Aᵀ‖ + ‖B Bᵀ‖)`` of the difference of x and y, of shape (*batch)."""
    (A, B), (A_y, B_y) = x, y
    charge = group.algebra_projection((B - B_y) @ B.mT - A @ (A - A_y).mT)
    size = torch.linalg.matrix_norm(A @ A.mT) + torch.linalg.matrix_norm(B @ B.mT)
    return torch.linalg.matrix_norm(charge) / torch.where(size > 0, size, 1)


def _charge(group: StructureGroup, state: _Products) -> Tensor:
    SA, SB, XA, XB = state
    return group.algebra_projection(SB - XB - SA + XA.mT)


def _newton_direction(group: StructureGroup, state: _Products, charge: Tensor) -> Tensor:
    """A direction of descent, Newton's where the Hessian is positive on the way to it."""
    project = group.algebra_projection
    SA, SB = project(state.SA), project(state.SB)
    bend = (state.SB - state.XB + state.SA - state.XA.mT) / 2
    values_A, basis_A = torch.linalg.eigh(SA)
    values_B, basis_B = torch.linalg.eigh(SB)
    sums = values_A.unsqueeze(-1) + values_B.unsqueeze(-2)

    def hessian(L: Tensor) -> Tensor:
        return project(L @ SB + SA @ L + bend @ L.mT + L.mT @ bend)

    def precondition(R: Tensor) -> Tensor:
        return project(basis_A @ ((basis_A.mT @ R @ basis_B) / sums) @ basis_B.mT)

    direction, residual = torch.zeros_like(charge), -charge
    search = precondition(residual)
    first, weight = search, frobenius_inner(residual, search)
    target = weight * 1e-4
    going = torch.ones(charge.shape[:-2], dtype=torch.bool, device=charge.device)
    turned_back = torch.zeros_like(going)
    for index in range(_INNER_STEPS):
        image = hessian(search)
        curvature = frobenius_inner(search, image)
        turned_back = turned_back | (going & (curvature <= 0) & (index == 0))
        going = going & (curvature > 0) & (weight > target)
        length = torch.where(going, weight / torch.where(going, curvature, 1), 0)[..., None, None]
        direction, residual = direction + length * search, residual - length * image
        ahead = precondition(residual)
        next_weight = frobenius_inner(residual, ahead)
        ratio = torch.where(going, next_weight / torch.where(going, weight, 1), 0)
        search, weight = ahead + ratio[..., None, None] * search, next_weight
    return torch.where(turned_back[..., None, None], first, direction)


def _shortened(
    state: _Products, charge: Tensor, direction: Tensor, done: Tensor, longest: Tensor
) -> tuple[Tensor, _Products]:
    """The step, halved until the distance falls, zero where it does not; and the products there."""
    length = torch.linalg.matrix_norm(direction)
    scale = torch.where(done, 0, longest / torch.maximum(length, longest))
    slope = frobenius_inner(charge, direction)
    before = state.value()
    # The distance itself is only known to rounding.
    noise = 4 * torch.finfo(charge.dtype).eps * (state.size() + before.abs())
    for halving in range(_HALVINGS + 1):
        step = scale[..., None, None] * direction
        moved = state.moved(torch.matrix_exp(step), torch.matrix_exp(-step).mT)
        good = moved.value() <= before + 1e-4 * scale * slope + noise
        good = good & torch.isfinite(moved.value())
        if bool(good.all()):
            return step, moved
        scale = torch.where(good, scale, scale / 2 if halving < _HALVINGS - 1 else 0)
    return step, moved


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
