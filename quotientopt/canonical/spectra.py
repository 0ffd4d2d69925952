"""Spectra of a model's circuits: singular values, effective rank, gaps, charge imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast
from quotientopt.canonical.invariants import product_singular_values
from quotientopt.canonical.noether import imbalance_of
from quotientopt.canonical.reading import factor, query_groups, right_factor, symmetries_of
from quotientopt.sections.convention import smallest_gap
from quotientopt.symmetries import HeadSymmetry, SymmetryMap


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Numbers about one symmetry, per head, in float64.

    Attributes
    ----------
    singular_values : Tensor
        Of AᵀB, in decreasing order, ``(query heads, r)``.
    charge_imbalance : Tensor
        ``‖C‖ / (‖AAᵀ‖ + ‖BBᵀ‖)`` with the Noether charge C, per key-value head, between 0 and 1.
        The only one of these numbers that depends on the gauge: zero in a balanced one.
    """

    singular_values: Tensor
    charge_imbalance: Tensor

    @property
    def effective_rank(self) -> Tensor:
        """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), 1 to r.

        Zero where all singular values vanish.
        """
        total = self.singular_values.sum(dim=-1, keepdim=True)
        share = self.singular_values / torch.where(total > 0, total, 1)
        entropy = -torch.special.xlogy(share, share).sum(dim=-1)
        return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)

    @property
    def gap(self) -> Tensor:
        """Smallest difference of neighbouring singular values over the largest, ``(query heads,)``.

        How well the SVD section is determined. Infinite for r = 1.
        """
        return smallest_gap(self.singular_values)


@torch.no_grad()
@outside_autocast()
def spectra(
    model: nn.Module, *, symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None
) -> dict[str, Spectrum]:
    """Spectra of G_QK, G_VO and every other product AᵀB of a model, per query head.

    Parameters
    ----------
    model : Module
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.

    Returns
    -------
    dict of str to Spectrum
        By symmetry name. Computed from r×r matrices; pairs of any rank are fine. AᵀB is invariant
        under every structure group, and complete for GL(r) only.

    Raises
    ------
    ValueError
        If a pair has non-finite entries; it is named.
    """
    symmetries = symmetries_of(model, symmetries)
    found = {}
    for symmetry in symmetries.heads:
        B = right_factor(symmetry)
        groups = [factor(blocks) for blocks in query_groups(symmetry)]
        A = torch.stack(groups, dim=1).flatten(0, 1)
        if not bool(torch.isfinite(A).all() & torch.isfinite(B).all()):
            raise ValueError(f"symmetry {symmetry.name!r} has non-finite entries")
        values = product_singular_values(A, B.repeat_interleave(len(groups), dim=0))
        found[symmetry.name] = Spectrum(values, imbalance_of(symmetry))
    return found
