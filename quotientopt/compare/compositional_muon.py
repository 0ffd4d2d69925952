"""Compositional Muon without damping: a contender that is exactly equivariant under GL(r)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.compare.baselines import (
    gradient_of,
    muon_size,
    nesterov_momentum,
    polar,
    refuse_missing_gradients,
)
from quotientopt.groups import GL, RotaryCommutant
from quotientopt.symmetries import Block, HeadSymmetry


class CompositionalMuon(torch.optim.Optimizer):
    r"""Compositional Muon (Tilde Research 2026) without damping: exactly equivariant under GL(r).

    What a pair computes depends on AᵀB alone, so that each factor's momentum is whitened by its
    partner's Gram matrix, with BBᵀ = LLᵀ,

    .. math:: A \leftarrow A - \tfrac{η}{2} L^{-T} \operatorname{polar}(L^{-1} m_A),

    and likewise B. Polar factors are those of single heads; of the output projection, which sums
    over heads, that of the whole matrix. Momentum is that of Muon, in raw coordinates, where it is
    linear in the gradients: under (A, B) ↦ (g^{-T}A, gB) updates move as the weights do. Under a
    rotary commutant the Gram matrix is projected on it. Other matrices get :class:`Muon`'s update.

    Parameters
    ----------
    params : iterable of Tensor
        Matrices, those of the pairs among them.
    symmetries : sequence of HeadSymmetry
        Pairs under GL(r) or a rotary commutant, without biases, that cover whole parameters; a
        value-output pair's name ends in "vo".
    lr, momentum, weight_decay : float

    Raises
    ------
    ValueError
        If a pair is of another kind; in :meth:`step` if a factor is rank-deficient or a parameter
        has no gradient, and nothing is changed then.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        symmetries: Sequence[HeadSymmetry],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        paired = {id(p) for p in covered_parameters(symmetries, "compositional-muon")}
        by_shape: dict[tuple[Any, ...], list[HeadSymmetry]] = defaultdict(list)
        for symmetry in symmetries:
            if not isinstance(symmetry.group, GL | RotaryCommutant):
                raise ValueError(
                    f"symmetry {symmetry.name!r}: compositional-muon whitens under GL(r) and "
                    f"rotary commutants, not under {symmetry.group}; leave the symmetry out"
                )
            if any(block.size[2] == 1 for block in symmetry.blocks):
                raise ValueError(
                    f"symmetry {symmetry.name!r} has biases, for which compositional-muon is not "
                    "defined; leave the symmetry out"
                )
            sizes = tuple(
                tuple(b.size for b in side)
                for side in (symmetry.left_blocks, symmetry.right_blocks)
            )
            by_shape[symmetry.group, symmetry.name.endswith("vo"), sizes].append(symmetry)
        self._pairs = list(by_shape.values())
        self._others = [p for p in self.param_groups[0]["params"] if id(p) not in paired]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        refuse_missing_gradients(self.param_groups, type(self).__name__)
        whitenings = [self._whitenings(symmetries) for symmetries in self._pairs]
        ahead = {
            id(p): nesterov_momentum(gradient_of(p), self.state[p], group["momentum"])
            for p in group["params"]
        }
        updates: list[tuple[Tensor, Tensor]] = []
        for symmetries, sides in zip(self._pairs, whitenings, strict=True):
            for side, whitening in sides.items():
                # The output projection is the left factor of a value-output pair.
                whole = side == "left" and symmetries[0].name.endswith("vo")
                updates += pair_updates(symmetries, side, whitening, ahead, whole=whole)
        stacks: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in self._others:
            stacks[parameter.shape].append(parameter)
        for members in stacks.values():
            stack = torch.stack([ahead[id(p)] for p in members])
            updates += zip(members, (muon_size(stack) * polar(stack)).unbind(), strict=True)
        torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
        for view, update in updates:
            view.sub_(update, alpha=group["lr"])
        return loss

    def _whitenings(self, symmetries: Sequence[HeadSymmetry]) -> dict[str, Tensor]:
        """Cholesky factors L of the *partner's* Gram matrices, ``(S, heads, r, r)`` per side.

        In float64, so that the small directions of ill-conditioned float32 factors are kept.
        """
        found = {}
        for side, partner in (("left", "right_blocks"), ("right", "left_blocks")):
            places = zip(*(getattr(symmetry, partner) for symmetry in symmetries), strict=True)
            stacks = (torch.stack([b.view().double() for b in blocks]) for blocks in places)
            gram = sum((stack @ stack.mT for stack in stacks), torch.zeros(()))
            if isinstance(symmetries[0].group, RotaryCommutant):
                gram = symmetries[0].group.algebra_projection(gram)
            found[side], info = torch.linalg.cholesky_ex(gram)
            if bool(info.any()):
                place, head = (int(i) for i in info.nonzero()[0])
                raise ValueError(
                    f"symmetry {symmetries[place].name!r}: the {partner.removesuffix('_blocks')} "
                    f"factor of head {head} is rank-deficient; compositional-muon needs full rank"
                )
        return found


def pair_updates(
    symmetries: Sequence[HeadSymmetry],
    side: str,
    whitening: Tensor,
    momenta: Mapping[int, Tensor],
    *,
    whole: bool,
) -> list[tuple[Tensor, Tensor]]:
    """½ L^{-T} polar(L^{-1} m) of one side of some pairs of equal shape.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
    side : {"left", "right"}
    whitening : Tensor
        L, shape ``(S, heads, r, r)``.
    momenta : mapping
        Of the parameters, by their id.
    whole : bool
        Orthogonalise the heads stacked on each other, ``(heads · r, n)``, and not one by one.

    Returns
    -------
    list of (Tensor, Tensor)
        Views of the parameters, each with its update.
    """
    found = []
    for blocks in zip(*(getattr(s, f"{side}_blocks") for s in symmetries), strict=True):
        stack = torch.stack([block.view(momenta[id(block.parameter)]) for block in blocks])
        solved = torch.linalg.solve_triangular(whitening, stack.to(whitening.dtype), upper=False)
        solved = solved.to(stack.dtype)
        even = polar(solved.flatten(1, 2)).view_as(solved) if whole else polar(solved)
        back = torch.linalg.solve_triangular(whitening.mT, even.to(whitening.dtype), upper=True)
        updates = (0.5 * back).to(stack.dtype).unbind()
        found += [(block.view(), update) for block, update in zip(blocks, updates, strict=True)]
    return found


def covered_parameters(symmetries: Sequence[HeadSymmetry], name: str) -> list[Tensor]:
    """Parameters that the blocks of `symmetries` cover.

    Parameters
    ----------
    symmetries : sequence of HeadSymmetry
    name : str
        Of the contender, for the message.

    Raises
    ------
    ValueError
        If one is covered in part, or twice; it could not be left to any optimizer then.
    """
    found: dict[int, Block] = {}
    covered: dict[int, int] = defaultdict(int)
    for block in (block for symmetry in symmetries for block in symmetry.blocks):
        found.setdefault(id(block.parameter), block)
        heads, rows, columns = block.size
        covered[id(block.parameter)] += heads * rows * columns
    for key, block in found.items():
        if covered[key] != block.parameter.numel():
            raise ValueError(
                f"the pairs cover {covered[key]} of the {block.parameter.numel()} entries of "
                f"{block.name!r}; {name} needs pairs that cover whole parameters"
            )
    return [block.parameter for block in found.values()]
