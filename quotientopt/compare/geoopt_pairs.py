"""geoopt's RiemannianAdam on the head pairs of a model: ``geoopt-adam`` of a comparison."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.geoopt import FactorManifold  # before geoopt, whose import warns

# isort: split
import geoopt

from quotientopt.compare.compositional_muon import covered_parameters
from quotientopt.groups import GL, RotaryCommutant
from quotientopt.symmetries import Block, HeadSymmetry
from quotientopt.symmetries.pairs import ShapeKey, columns_of, shape_key, stack_factors


class PackedPairs:
    """Pairs of equal shape as one point ``(pairs, heads, r, n + m)`` of geoopt.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
        With one :func:`quotientopt.symmetries.pairs.shape_key`. Several blocks of a factor, as of
        grouped queries, lie side by side along its columns.

    Attributes
    ----------
    point : geoopt.ManifoldParameter
    """

    def __init__(self, symmetries: Sequence[HeadSymmetry]) -> None:
        self.symmetries = tuple(symmetries)
        first, (n, m) = self.symmetries[0], self.symmetries[0].columns
        # Unchecked: a factor that is not finite shows in the next loss.
        self._manifold = FactorManifold(first.rank, n, m, group=first.group, check=False)
        self._dtype = first.blocks[0].parameter.dtype
        packed = self._pack(Block.view)
        self.point = geoopt.ManifoldParameter(packed, manifold=self._manifold)

    @torch.no_grad()
    def read(self) -> None:
        """Pack the model's weights and gradients."""
        self.point.copy_(self._pack(Block.view))
        self.point.grad = self._pack(_gradient)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the point into the model's weights."""
        left, right = self._manifold.unpack_tensor(self.point)
        for place, symmetry in enumerate(self.symmetries):
            for factor, blocks in ((left, symmetry.left_blocks), (right, symmetry.right_blocks)):
                for block, columns in zip(blocks, columns_of(blocks), strict=True):
                    block.view().copy_(factor[place, :, :, columns])

    def _pack(self, read: Callable[[Block], Tensor]) -> Tensor:
        return self._manifold.pack_point(*stack_factors(self.symmetries, read, self._dtype))


class PairsRiemannianAdam(geoopt.optim.RiemannianAdam):
    """geoopt's RiemannianAdam on factor pairs that live in a model's weights.

    A step packs weights and gradients, moves the points on the quotient by each pair's group, with
    the preconditioned metric, and copies them back. As AdamW does, it shrinks the weights by
    ``1 - lr · weight_decay`` first; geoopt's own weight decay is part of the gradient and depends
    on the representative. The second moment is one number per head.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
        Under GL(r) or a rotary commutant. Their blocks cover whole parameters.
    lr : float
        About the Riemannian length of an update of every head.
    betas : tuple of float
    weight_decay : float
        Decoupled.

    Raises
    ------
    ValueError
        If a group is another one, or a parameter is covered in part.
    """

    def __init__(
        self,
        symmetries: Sequence[HeadSymmetry],
        lr: float,
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.parameters = covered_parameters(symmetries, "geoopt-adam")
        by_shape: dict[ShapeKey, list[HeadSymmetry]] = defaultdict(list)
        for symmetry in symmetries:
            if not isinstance(symmetry.group, GL | RotaryCommutant):
                raise ValueError(
                    f"symmetry {symmetry.name!r}: geoopt-adam knows no metric for the group "
                    f"{symmetry.group}; leave the symmetry out"
                )
            by_shape[shape_key(symmetry)].append(symmetry)
        self._packed = [PackedPairs(members) for members in by_shape.values()]
        super().__init__([packed.point for packed in self._packed], lr=lr, betas=betas)
        self._weight_decay = weight_decay
        # For the record of a comparison, which writes down the defaults.
        self.defaults |= {
            "decoupled_weight_decay": weight_decay,
            "pairs": [symmetry.name for symmetry in symmetries],
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the points and of the model's parameters."""
        super().zero_grad(set_to_none)
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Raises
        ------
        ValueError
            If a parameter of a pair has no gradient; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for packed in self._packed:
            packed.read()
        shrink = 1 - self.param_groups[0]["lr"] * self._weight_decay
        for packed in self._packed:
            packed.point.mul_(shrink)
        super().step()
        for packed in self._packed:
            packed.write()
        return loss


def _gradient(block: Block) -> Tensor:
    gradient = block.parameter.grad
    if gradient is None:
        raise ValueError(f"{block.name!r} has no gradient; all parameters of a pair need one")
    return block.view(gradient)
