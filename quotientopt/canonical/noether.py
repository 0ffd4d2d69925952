"""Noether charges of gradient flow: what every gauge symmetry keeps constant in training.

Let a loss be invariant under G, acting by ``(A, B) ↦ (g^{-T} A, g B)``. For Λ in the Lie algebra
the vertical vector ``ξ_Λ = (−Λᵀ A, Λ B)`` is orthogonal to the gradient. Under the Euclidean
gradient flow ``Ȧ = −∂_A, Ḃ = −∂_B`` a function whose gradient is ξ_Λ is therefore constant. There
is one exactly if the field ξ_Λ, which is linear in (A, B), is symmetric: if Λ is. It is
``−½ tr(Λ C)`` with ``C = A Aᵀ − B Bᵀ``, so that the conserved charge is C, seen by the symmetric
part of the Lie algebra:

- GL(r): all of C, r(r + 1)/2 numbers per head;
- a rotary commutant: ``|a|² − |b|²`` of every plane, and C of the passing rows;
- O(r), the phases of rotary planes, and O(d) on the residual stream: none. Their Λ are skew and the
  flow satisfies ``skew(Ȧ Aᵀ + Ḃ Bᵀ) = 0`` (angular momentum zero: the velocity is horizontal) at
  every moment, which no function of the weights alone integrates.

A step of gradient descent of size η changes C by exactly ``η² (∂_A ∂_Aᵀ − ∂_B ∂_Bᵀ)``; Adam changes
it to first order. Weight decay λ shrinks it by ``exp(−2λt)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import compute_dtype, outside_autocast
from quotientopt.canonical.reading import (
    moved_first,
    require_pairs,
    stored,
    sum_of_grams,
    symmetries_of,
)
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import TRANSLATION


@torch.no_grad()
@outside_autocast()
def noether_charges(
    model: nn.Module, *, symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None
) -> dict[str, Tensor]:
    """The charge ``A Aᵀ − B Bᵀ`` of every head, projected to what gradient flow conserves.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.

    Returns
    -------
    dict of str to Tensor
        Symmetry name to ``(heads, r, r)``, symmetric, in at least float32: the projection to the
        symmetric part of the group's Lie algebra, see :mod:`quotientopt.canonical.noether`. For
        GL(r) it is the matrix itself, for rotary planes a multiple of the identity on each, for
        O(r) zero. For hidden units ``(units, 1, 1)``, for scales ``(heads, 1, 1)``; under
        ``"<name>.translation"`` a bias that softmax does not see, ``(heads, r)``.
    """
    symmetries = symmetries_of(model, symmetries)
    found = {symmetry.name: _charge(symmetry)[0] for symmetry in symmetries.pairs}
    for scale in symmetries.scales:
        found[scale.name] = sum_of_grams(scale.blocks).diagonal(dim1=-2, dim2=-1).sum(-1)
        found[scale.name] = found[scale.name][:, None, None]
    for symmetry in symmetries.heads:
        first = moved_first(symmetry)
        if first is not None and symmetry.translation.sink is None:  # type: ignore[union-attr]
            found[symmetry.name + TRANSLATION] = stored(first).squeeze(-1)
    dtypes = {s.name: s.blocks[0].parameter.dtype for s in symmetries.linear}
    return {
        name: charge.to(compute_dtype(dtypes[name.removesuffix(TRANSLATION)]))
        for name, charge in found.items()
    }


def _charge(symmetry: HeadSymmetry) -> tuple[Tensor, Tensor]:
    """The charge, and ``‖AAᵀ‖ + ‖BBᵀ‖`` per head (1 where both vanish)."""
    SA, SB = sum_of_grams(symmetry.left_blocks), sum_of_grams(symmetry.right_blocks)
    size = torch.linalg.matrix_norm(SA) + torch.linalg.matrix_norm(SB)
    # All groups here are closed under transposition: the projection of a symmetric matrix to the
    # Lie algebra is symmetric.
    return symmetry.group.algebra_projection(SA - SB), torch.where(size > 0, size, 1)


def imbalance_of(symmetry: HeadSymmetry) -> Tensor:
    """``‖C‖ / (‖AAᵀ‖ + ‖BBᵀ‖)`` per head, zero where both factors vanish."""
    charge, size = _charge(symmetry)
    return torch.linalg.matrix_norm(charge) / size


@dataclass(frozen=True)
class ChargeRecord:
    """Charges after one optimizer step.

    Attributes
    ----------
    step : int
        Steps since the log was attached; 0 is the state then.
    norm : dict of str to float
        ‖C‖_F over all heads of a symmetry.
    drift : dict of str to float
        ``‖C − C₀‖`` over ``‖AAᵀ‖ + ‖BBᵀ‖`` at the start, where the charge was C₀; over all heads.
    """

    step: int
    norm: dict[str, float] = field(repr=False)
    drift: dict[str, float] = field(repr=False)


class ChargeLog:
    """Logs the Noether charges of a model after every step of an optimizer.

    Attached at construction, through ``register_step_post_hook``; detached by :meth:`remove`, or at
    the end of a ``with`` block. A change of gauge changes the charges: start a new log after
    :func:`dress_` or ``act_``.

    Parameters
    ----------
    model : Module
    optimizer : torch.optim.Optimizer
        Any of torch's, or one with the same hook.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.
    every : int
        Steps between records.

    Attributes
    ----------
    records : list of ChargeRecord

    Raises
    ------
    TypeError
        If the optimizer has no such hook.
    ValueError
        If `every` is no positive integer, or the model has no head symmetry.

    Examples
    --------
    >>> with qo.ChargeLog(model, optimizer) as log:      # doctest: +SKIP
    ...     train(model, optimizer)
    >>> log.records[-1].drift                            # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
        every: int = 1,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}")
        register: Callable[..., Any] | None = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            raise TypeError(
                f"{type(optimizer).__name__} has no register_step_post_hook; pass a torch optimizer"
            )
        self._symmetries = require_pairs(model, symmetries_of(model, symmetries)).pairs
        self._every = every
        self._steps = 0
        self._start = [_charge(symmetry) for symmetry in self._symmetries]
        self.records: list[ChargeRecord] = []
        self._record()
        self._handle = register(self._after_step)

    def remove(self) -> None:
        """Detach from the optimizer; the records stay."""
        self._handle.remove()

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._record()

    @torch.no_grad()
    def _record(self) -> None:
        names = [symmetry.name for symmetry in self._symmetries]
        norms, drifts = [], []
        for symmetry, (start, size) in zip(self._symmetries, self._start, strict=True):
            charge, _ = _charge(symmetry)
            norms.append(torch.linalg.vector_norm(charge))
            drifts.append(torch.linalg.vector_norm(charge - start) / torch.linalg.vector_norm(size))
        # One transfer for all of them.
        device = norms[0].device
        norm, drift = (
            torch.stack([value.to(device) for value in values]).tolist()
            for values in (norms, drifts)
        )
        self.records.append(
            ChargeRecord(
                self._steps,
                dict(zip(names, norm, strict=True)),
                dict(zip(names, drift, strict=True)),
            )
        )

    def __enter__(self) -> ChargeLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()
