"""Fold the gains of RMS norms into the matrices that read them, which makes O(d) exact."""

from __future__ import annotations

import torch
from torch import nn

from quotientopt.symmetries.exactness import Ownership
from quotientopt.symmetries.find import collect, find_symmetries, gain_breakers
from quotientopt.symmetries.map import SymmetryMap


@torch.no_grad()
def fold_norms_(model: nn.Module) -> SymmetryMap:
    """Fold RMS norms' gains into their readers, in place; the function stays the same.

    Every reading matrix becomes ``W diag(gain)``; the gains become one and stop training
    (``requires_grad`` False). An optimizer created before has to be created anew.

    Parameters
    ----------
    model : Module
        A model whose adapter knows every reader of every gain.

    Returns
    -------
    SymmetryMap
        The symmetries afterwards, with an exact residual stream.

    Raises
    ------
    ValueError
        If the model is not known, its norms centre (LayerNorm), something else than gains breaks
        O(d), or a matrix is tied so that folding would change another use. Nothing is changed.
    """
    findings = collect(model)
    before = find_symmetries(model)
    kind = type(model).__name__
    if before.residual is None:
        raise ValueError(f"folding is not available for {kind}: {before.residual_reason}")
    ownership = Ownership(model)
    # A gain may appear under several names, where modules are shared; so may its readers.
    gain_names: dict[str, set[str]] = {}
    readers: dict[str, dict[str, int]] = {}
    reader_names: dict[str, set[str]] = {}
    for contribution in findings.contributions.values():
        for gain, reading in contribution.gains.items():
            first = ownership.first_name(gain)
            gain_names.setdefault(first, set()).add(gain)
            for name, axis in reading:
                readers.setdefault(first, {})[ownership.first_name(name)] = axis
                reader_names.setdefault(first, set()).add(name)
    foldable = {
        breaker
        for names in gain_names.values()
        for gain in names
        for breaker in gain_breakers(gain, ownership.parameter(gain))
    }
    breakers = [b for b in before.residual.broken_by if b not in foldable]
    if breakers:
        raise ValueError(f"folding is not available for {kind}: {'; '.join(breakers[:3])}")
    folded: set[str] = set()
    for gain, axes in readers.items():
        tied = ownership.used_elsewhere([ownership.parameter(gain)], gain_names[gain])
        tied += ownership.used_elsewhere(map(ownership.parameter, axes), reader_names[gain])
        tied += sorted(folded & set(axes))
        if tied:
            raise ValueError(
                f"folding is not available for {kind}: {tied[0]} is tied, folding {gain} would "
                "change its other use"
            )
        folded |= set(axes)
    for first, axes in readers.items():
        gain_parameter = ownership.parameter(first)
        for name, axis in axes.items():
            ownership.parameter(name).movedim(axis, -1).mul_(gain_parameter)
        gain_parameter.fill_(1)
        gain_parameter.requires_grad_(False)
        gain_parameter.grad = None
    return find_symmetries(model)
