"""Spectra of a model's circuits: singular values, effective rank, gaps, charge imbalance.

In reading order: the numbers (:func:`spectra`), and a picture of them (:func:`plot_spectra`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import outside_autocast
from quotientopt._system import write_atomically
from quotientopt.canonical.invariants import product_singular_values
from quotientopt.canonical.moving import PARTS
from quotientopt.canonical.noether import imbalance_of
from quotientopt.canonical.reading import (
    factor,
    query_groups,
    require_heads,
    right_factor,
    symmetries_of,
)
from quotientopt.sections.convention import smallest_gap
from quotientopt.symmetries import HeadSymmetry, SymmetryMap

TITLES = {"qk": "$G_{QK}$", "vo": "$G_{VO}$"}
FLOOR = 1e-4
MOST_LABELS = 32
SOFTWARE = "quotientopt"  # stands in the picture's metadata


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


def plot_spectra(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
) -> Path:
    """Draw the spectra of all heads as heat maps over layers and heads.

    One row of panels for each kind of pair (query-key, value-output, …). From left to right: the
    singular values of AᵀB of every query head over the largest of that head, the effective rank
    over r, the smallest spectral gap, and the charge imbalance; see
    :class:`~quotientopt.canonical.spectra.Spectrum`.

    Parameters
    ----------
    model : Module
    path : path
        Where the PNG goes; written under another name and renamed.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        By default all that are found.

    Returns
    -------
    Path

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        If the model has no head symmetry, or a pair is not finite.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_spectra needs matplotlib: pip install matplotlib") from error
    found = spectra(model, symmetries=require_heads(model, symmetries_of(model, symmetries)))
    kinds = _by_kind(found)
    most = max(len(layers) for layers in kinds.values())
    figure = Figure(figsize=(15, len(kinds) * (1.8 + 0.3 * min(most, 12))), layout="constrained")
    panels = figure.subplots(len(kinds), 4, squeeze=False, width_ratios=(2.2, 1, 1, 1))
    for row, (kind, layers) in zip(panels, kinds.items(), strict=True):
        _draw_kind(figure, row, TITLES.get(kind, kind), layers)
    figure.suptitle(f"{type(model).__name__}: circuits by layer and head")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": SOFTWARE})
    write_atomically(Path(path), image.getvalue())
    return Path(path)


def _by_kind(found: dict[str, Spectrum]) -> dict[str, dict[str, Spectrum]]:
    """Spectra by the last part of their names, "qk" and "vo" first."""
    kinds: dict[str, dict[str, Spectrum]] = {}
    for name, spectrum in found.items():
        layer, _, part = name.rpartition(".")
        known = part in PARTS
        kinds.setdefault(part if known else "other pairs", {})[layer if known else name] = spectrum
    return dict(sorted(kinds.items(), key=lambda item: item[0] not in PARTS))


def _draw_kind(figure: Any, row: Sequence[Any], title: str, layers: dict[str, Spectrum]) -> None:
    from matplotlib.colors import LogNorm

    found = list(layers.values())
    labels = _short(list(layers))
    values = [spectrum.singular_values for spectrum in found]
    relative = [v / torch.where(v[:, :1] > 0, v[:, :1], 1) for v in values]
    ranks = [s.effective_rank / s.singular_values.shape[-1] for s in found]
    gaps = [spectrum.gap for spectrum in found]
    imbalance = [spectrum.charge_imbalance for spectrum in found]

    heads = [len(v) for v in values]
    width = max(v.shape[-1] for v in values)
    stacked = torch.full((sum(heads), width), float("nan"), dtype=torch.float64)
    starts = [sum(heads[:i]) for i in range(len(heads))]
    for start, part in zip(starts, relative, strict=True):
        stacked[start : start + len(part), : part.shape[-1]] = part.clamp_min(FLOOR).cpu()
    image = row[0].imshow(
        stacked.numpy(),
        aspect="auto",
        norm=LogNorm(min(float(stacked.nan_to_num(1).min()), 0.5), 1),
        interpolation="nearest",
        extent=(0.5, width + 0.5, len(stacked) - 0.5, -0.5),
    )
    row[0].set_title(f"singular values of {title}, over each head's largest")
    row[0].set_xlabel("number of the singular value")
    row[0].set_ylabel("layer (one line per head)")
    every = -(-len(labels) // MOST_LABELS)
    middles = [start + (n - 1) / 2 for start, n in zip(starts, heads, strict=True)]
    row[0].set_yticks(middles[::every], labels[::every])
    for start in starts[1:]:
        row[0].axhline(start - 0.5, color="white", linewidth=0.6 / every)
    figure.colorbar(image, ax=row[0])

    positive = torch.cat([gap[gap.isfinite() & (gap > 0)] for gap in gaps])
    smallest = min([0.1, *positive.tolist()])
    for axes, name, data, norm in (
        (row[1], "effective rank over r", ranks, None),
        (row[2], "smallest spectral gap", gaps, LogNorm(smallest, 1)),
        (row[3], "charge imbalance", imbalance, None),
    ):
        limits = {"norm": norm} if norm else {"vmin": 0, "vmax": 1}
        image = axes.imshow(_grid(data), aspect="auto", interpolation="nearest", **limits)
        axes.set_title(f"{name}, {title}")
        axes.set_xlabel("head" if len(data[0]) == heads[0] else "key-value head")
        axes.set_yticks(range(len(labels))[::every], labels[::every])
        axes.set_xticks(_ticks(max(len(d) for d in data)))
        figure.colorbar(image, ax=axes)


def _grid(rows: list[Tensor]) -> Any:
    """Layers × heads, not a number where a layer has fewer heads or a value is infinite."""
    width = max(len(row) for row in rows)
    grid = torch.full((len(rows), width), float("nan"), dtype=torch.float64)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = torch.where(row.isfinite(), row, float("nan")).cpu()
    return grid.numpy()


def _ticks(count: int) -> list[int]:
    """At most eight whole numbers."""
    return list(range(0, count, -(-count // 8)))


def _short(names: list[str]) -> list[str]:
    """What tells layers apart: their names without common beginnings and endings."""
    parts = [name.split(".") for name in names]
    if len(names) < 2:
        return names
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [".".join(p) for p in parts]
