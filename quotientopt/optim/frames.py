"""Frames that are kept, and moved along: what Adam's moments are written in.

A head frame is a dressing field turned into the eigenframe of the covariance of dressed gradients
(Vyas et al., arXiv 2409.11321, eigenframes): :class:`HeadFrames`. One residual frame for the whole
model is a :class:`SharedResidualFrame`; those of single matrices lie in their buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quotientopt.optim.bookkeeping.slices import Slice
from quotientopt.optim.dressing import (
    DressedHeads,
    FreshDressing,
    block_diagonal,
    plane_partners,
)
from quotientopt.optim.eigenframes import (
    ROW_TIES,
    break_ties,
    head_eigenframe,
    next_eigenframe,
    residual_eigenframe,
)
from quotientopt.optim.update import ema_, two_sided
from quotientopt.symmetries import HeadSymmetry

# Of frames, when others wrote to a factor: the stretch beyond which they are made anew at once.
STRAYED = 2.0


class HeadFrames(DressedHeads):
    """Frames u and covariances C of S symmetries with the same group, heads and rank.

    Both sides are kept in one stack of 2S entries, left sides first. Under a group element g a
    frame goes to ``u g^{-1}`` (left) or ``u gᵀ`` (right); the covariance C = EMA(Σ u∂ (u∂)ᵀ) is
    written in the frame and does not change.

    Attributes
    ----------
    frame, covariance : Tensor
        Shape ``(2S, heads, r, r)``; of a ``joint`` frame ``(2S, 1, heads r, heads r)``. No
        covariance is kept of frames that are not turned.
    joint : bool
        Whether one eigenframe turns the rows of all heads together. The dressing field is block
        diagonal then, and what it leaves of the group, rotations head by head, is among the
        rotations that the eigenframe follows.
    partner : Tensor or None
        Partner rows of rotated planes, None for groups without planes.
    """

    def __init__(
        self,
        symmetries: Sequence[HeadSymmetry],
        kind: str,
        *,
        joint: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(symmetries, kind, joint=joint, dtype=dtype, device=device)
        self._places = {id(symmetry): place for place, symmetry in enumerate(symmetries)}
        rank, heads = self.symmetries[0].rank, self.symmetries[0].heads
        if self.joint:
            rank, heads = rank * heads, 1
        shape = (2 * len(self.symmetries), heads, rank, rank)
        self.frame = torch.zeros(shape, dtype=dtype, device=device)
        # Of frames that are not turned nothing needs it.
        self.covariance = torch.zeros(shape if self.turns else (), dtype=dtype, device=device)
        partner = plane_partners(self.group, device)
        planes = bool((partner != torch.arange(len(partner), device=device)).any())
        # A frame over all rows leaves no planes as they are, nor anything of their group.
        self.partner = partner if planes and not self.joint else None

    def place(self, slice_: Slice) -> int:
        """Entry of a slice's side in the stack."""
        place = self._places[id(slice_.symmetry)]
        return place + len(self.symmetries) if slice_.side == "right" else place

    def strays(self, field: Tensor) -> Tensor:
        """Whether the frames in use fit the parameters no more, from a fresh ``field``.

        The field is a rotation of the frame in coordinates where the frame is one; beyond a factor
        of `STRAYED` a step along some direction is that much too long or too short. No group
        element that moves both changes it.
        """
        old, new = (self._metric(frame.to(field.dtype)) for frame in (self.frame, field))
        missing = (old == 0).flatten(-2).all(-1)[..., None, None]
        identity = torch.eye(old.size(-1), dtype=old.dtype, device=old.device)
        root, _ = torch.linalg.cholesky_ex(torch.where(missing, identity, old))
        half = torch.linalg.solve_triangular(root, new, upper=False)
        ratio = torch.linalg.solve_triangular(root, half.mT, upper=False)
        sound = ratio.isfinite().flatten(-2).all(-1)[..., None, None]
        stretch = torch.linalg.eigvalsh(torch.where(sound & ~missing, ratio, identity))
        outside = (stretch > STRAYED**2) | (stretch < STRAYED**-2)
        return outside.any() | ~(sound | missing).all()

    def _metric(self, frame: Tensor) -> Tensor:
        """uᵀu of every head, ``(2S, heads, r, r)``; no rotation of the frame changes it."""
        metric = frame.mT @ frame
        if not self.joint:
            return metric
        heads, rank = self.symmetries[0].heads, self.symmetries[0].rank
        blocks = metric[:, 0].unflatten(-1, (heads, rank)).unflatten(-3, (heads, rank))
        return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    def begin_refresh(self, field: Tensor) -> Tensor:
        """Write the covariance in the coordinates of a fresh ``field``.

        Returns
        -------
        Tensor
            The change of coordinates field · u^{-1}; the identity where there was no frame.
        """
        identity = torch.eye(self.frame.size(-1), dtype=field.dtype, device=field.device)
        missing = (self.frame == 0).flatten(-2).all(-1)[..., None, None]
        old = torch.where(missing, identity, self.frame.to(field.dtype))
        change = torch.linalg.solve_ex(old, field, left=False).result
        change = torch.where(missing, identity, change)
        if self.turns:
            moved = change.to(self.covariance)
            self.covariance.copy_(moved @ self.covariance @ moved.mT)
        return change

    def end_refresh(self, dressing: FreshDressing, change: Tensor) -> Tensor:
        """Turn the field into the eigenframe of the covariance, u = O · field; returns O.

        A frame over all rows follows the covariance by orthogonal iteration from the last frame,
        whose rows in the new field are those of ``change``, as :meth:`begin_refresh` returned it.
        """
        field = dressing.field
        if not self.turns:
            self.frame.copy_(field)
            identity = torch.eye(field.size(-1), dtype=field.dtype, device=field.device)
            return identity.expand_as(field)
        if self.joint:
            missing = (self.frame == 0).flatten(-2).all(-1)[..., None, None]
            turn = next_eigenframe(self.covariance, change.to(self.covariance))
            if bool(missing.any()):
                ties = self._ties(dressing)
                first = torch.linalg.eigh(break_ties(self.covariance, ties, times=ROW_TIES))
                turn = torch.where(missing, first.eigenvectors.flip(-1), turn)
            if dressing.unframed is not None:
                turn = self._without(dressing.unframed, turn, self._ties(dressing))
            turn = turn.mT
        else:
            turn = head_eigenframe(self.group, self.covariance, self._ties(dressing))
            if dressing.unframed is not None:
                identity = torch.eye(turn.size(-1), dtype=turn.dtype, device=turn.device)
                turn = torch.where(dressing.unframed[..., None, None], identity, turn)
        self.covariance.copy_(turn @ self.covariance @ turn.mT)
        turn = turn.to(field.dtype)
        self.frame.copy_(turn @ field)
        return turn

    def _ties(self, dressing: FreshDressing) -> Tensor:
        """What breaks ties of the covariance: Grams of the dressed weights."""
        weights_gram = dressing.weights_gram.to(self.covariance)
        if dressing.substituted is None:
            return weights_gram
        # The partner's dressed factor is orthonormal there and tells no directions apart, but the
        # other side's gradients do, and they turn alike.
        other = self.covariance.roll(len(self.symmetries), 0)
        return torch.where(dressing.substituted[..., None, None], other, weights_gram)

    def _without(self, unframed: Tensor, turn: Tensor, weights_gram: Tensor) -> Tensor:
        """Eigenframes over all rows that leave those of unframed heads exactly as they are.

        A channel of zeros would otherwise be moved by the rounding of the others.
        """
        rows = unframed.repeat_interleave(turn.size(-1) // unframed.size(-1), -1)[:, None]
        either = rows[..., :, None] | rows[..., None, :]
        matrix = break_ties(self.covariance, weights_gram, times=ROW_TIES).masked_fill(either, 0)
        # Beyond all eigenvalues, and different, so that their eigenvectors are unit vectors.
        places = torch.linspace(3, 2, rows.size(-1), dtype=matrix.dtype, device=matrix.device)
        vectors = torch.linalg.eigh(matrix + torch.where(rows, places, 0).diag_embed()).eigenvectors
        vectors = vectors.flip(-1)
        own = (vectors.square() * rows[..., :, None]).sum(-2, keepdim=True) > 0.5
        exact = torch.where(rows[..., :, None] & own, vectors.round(), 0)
        apart = torch.where(rows[..., :, None] | own, exact, vectors)
        return torch.where(unframed.any(-1)[:, None, None, None], apart, turn)

    def move_(self, element: Mapping[str, Tensor]) -> None:
        """Move frames along with the parameters: ``u ↦ u g^{-1}`` (left), ``u ↦ u gᵀ`` (right)."""
        for place, symmetry in enumerate(self.symmetries):
            g = element.get(symmetry.name)
            if g is None:
                continue
            left, right = self.frame[place], self.frame[place + len(self.symmetries)]
            g = g.to(self.frame.device, torch.promote_types(g.dtype, self.gram_dtype))
            inverse, transpose = self.group.inverse(g), g.mT
            if self.joint:
                inverse, transpose = block_diagonal(inverse), block_diagonal(transpose)
            left.copy_(left.to(g.dtype) @ inverse)
            right.copy_(right.to(g.dtype) @ transpose)


class SharedResidualFrame:
    """One residual frame for all matrices of a stream, from their pooled covariance.

    Attributes
    ----------
    covariance, frame, change : Tensor
        R, Q and Q_oldᵀ Q_new, each ``(d, d)``.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (dimension, dimension)
        self.covariance = torch.zeros(shape, dtype=dtype, device=device)
        self.frame = torch.zeros(shape, dtype=dtype, device=device)
        self.change = torch.zeros(shape, dtype=dtype, device=device)
        self._sum = torch.zeros(shape, dtype=dtype, device=device)
        self.oriented = False

    def add(self, gram: Tensor) -> None:
        """Pool the Gram of one bucket's dressed gradients in this step."""
        self._sum.add_(gram)

    def accumulate(self, beta: float, gate: Tensor | None = None) -> None:
        """Take the pooled Gram of this step into the covariance, unless the gate is zero."""
        ema_(self.covariance, self._sum, beta, gate)
        self._sum.zero_()

    def refresh(self, weights_gram: Tensor | None) -> None:
        """Turn to the eigenvectors of the covariance: the first time with the weights' Gram."""
        if weights_gram is None:
            frame = next_eigenframe(self.covariance, self.frame)
        else:
            frame = residual_eigenframe(self.covariance, weights_gram, weights_gram)
        self.oriented = True
        self.change = self.frame.mT @ frame
        self.frame.copy_(frame)


def state_sizes(
    shape: tuple[int, ...], directions: int, *, factored: bool, framed: bool, fixed: bool
) -> dict[str, tuple[int, ...]]:
    """Sizes of the tensors of the state of L stacked slices, by their keys.

    Parameters
    ----------
    shape : tuple of int
        Of the slices, ``(L, M, heads, r, n)``.
    directions : int
        How many of hidden units are framed; fewer than rows with moments of their own.
    factored : bool
        Whether of the second moment only means of rows and of columns are kept.
    framed, fixed : bool
        Whether the slices have residual frames of their own, and whether these stay as first made.
    """
    L, rows, n = shape[0], shape[1] * shape[2] * shape[3], shape[4]
    sizes: dict[str, tuple[int, ...]] = {"exp_avg": shape}
    if factored:
        sizes["exp_avg_sq_rows"] = (*shape[:-1], 1)
        sizes["exp_avg_sq_columns"] = (*shape[:2], 1, 1, n)
    else:
        sizes["exp_avg_sq"] = shape
    if framed:
        if not fixed:
            sizes["residual_covariance"] = (L, n, n)
        sizes["residual_frame"] = (L, n, n)
    leading = 0 < directions < rows
    if directions:
        sizes["hidden_frame"] = (L, rows, directions)
        sizes["hidden_image" if leading else "hidden_covariance"] = (L, rows, directions)
    if leading:
        sizes["hidden_exp_avg"] = sizes["hidden_exp_avg_sq"] = (L, 1, 1, directions, n)
    return sizes


def transport_(state: Mapping[str, Tensor], left: Tensor | None, right: Tensor | None) -> None:
    """Carry moments to other frames, m ← R m S and v ← (R∘R) v (S∘S).

    A factored v has means of rows ρ ← (R∘R) ρ and of columns γ ← γ (S∘S). Moments along leading
    directions of hidden units turn with those, in :func:`quotientopt.optim.leading.turn_`.

    Parameters
    ----------
    state : mapping
        Of a bucket, written to.
    left : Tensor, optional
        R = u_new u_old⁻¹, ``(L, heads, r, r)``.
    right : Tensor, optional
        S = Q_oldᵀ Q_new, ``(L, n, n)``.
    """
    squares = [None if turn is None else turn.square() for turn in (left, right)]
    laws: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "exp_avg": (left, right),
        "hidden_exp_avg": (None, right),
        "exp_avg_sq": (squares[0], squares[1]),
        "exp_avg_sq_rows": (squares[0], None),
        "exp_avg_sq_columns": (None, squares[1]),
        "hidden_exp_avg_sq": (None, squares[1]),
    }
    for key in laws.keys() & state.keys():
        state[key].copy_(two_sided(laws[key][0], state[key], laws[key][1]))
