"""A canonical representative of a model's weights: every head pair, and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quotientopt._linalg import gram, outside_autocast
from quotientopt.canonical.elements import Element, SectionKind, elements_of
from quotientopt.canonical.moving import (
    move_,
    refuse_foreign_optimizer,
    refuse_sparse_gradients,
    refuse_uneven,
)
from quotientopt.canonical.reading import (
    BlockView,
    of_unit_length,
    pair_of,
    require_pairs,
    rotated,
    stored,
    symmetries_of,
    translations_to_zero,
    unit_lengths,
)
from quotientopt.canonical.residual import canonical_rotation, require_group
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL, TRANSLATION
from quotientopt.symmetries.verification import unchanged_outputs


class Dressing(dict[str, Tensor]):
    """The group element that dressed a model, symmetry name to tensor.

    ``(heads, r, r)`` for every head symmetry, ``(heads, r)`` for every translation, ``(units, 1,
    1)`` for hidden units and scales and, under ``"residual"``, ``(d, d)``: what
    :meth:`SymmetryMap.act_` takes.

    Attributes
    ----------
    section : str
    gaps : dict of str to Tensor
        For the SVD section, name to the smallest difference of neighbouring singular values, of
        those that do not vanish, over the largest, per head; infinite where there are fewer than
        two, as for rotary planes, which are not ordered. The canonical rows are determined to about
        the precision of the parameters divided by this gap. With ``residual=True`` also
        ``"residual"``, of shape (1,).
    """

    def __init__(
        self, element: Mapping[str, Tensor], section: str, gaps: Mapping[str, Tensor]
    ) -> None:
        super().__init__(element)
        self.section = section
        self.gaps = dict(gaps)

    def __str__(self) -> str:
        lines = [f"dressed by the {self.section} section"]
        for name, gap in self.gaps.items():
            lines.append(f"{name}  smallest spectral gap {gap.min().item():.1e}")
        return "\n".join(lines)


@torch.no_grad()
@outside_autocast()
def dress_(
    model: nn.Module,
    section: SectionKind = "svd",
    *,
    symmetries: SymmetryMap | Sequence[HeadSymmetry] | None = None,
    optimizer: Any = None,
    residual: bool = False,
    example_inputs: Any = None,
) -> Dressing:
    """Move a model to the canonical representative of its orbit, in place.

    Every head pair (A, B) goes to the given section of its orbit under its structure group, by
    ``(g^{-T} A, g B)``. Biases that may be translated become zero: that of the keys, and that of
    the values, which the output bias takes up. Hidden units of MLPs get incoming and outgoing
    weights of equal length, normalised queries and keys rows of unit length on the average. What
    the model computes stays the same up to rounding, and dressing again
    changes nothing. Representatives that differ by head gauges are dressed to the same weights by
    ``"svd"``, and to weights that differ by the section's residual group by the others;
    representatives that differ by a rotation of the residual stream as well need ``residual=True``.

    Parameters
    ----------
    model : Module
    section : {"svd", "balanced", "orthonormal", "triangular"}
        ``"svd"``: ``A Aᵀ = B Bᵀ = Σ``, the singular values of AᵀB in decreasing order (for a rotary
        plane ``|a| = |b|``). Signs: in each row of the dressed B the entry of largest modulus is
        positive. Rows of equal singular values: by a QR decomposition of B with column pivoting,
        which is the same rule for one row. Pairs of any rank, as padded heads, pruned channels and
        outputs that start at zero: what AᵀB does not see comes after its singular values, as
        orthonormal rows of one factor, see :func:`quotientopt.sections.section`. See
        :meth:`FactorQuotient.section` for the others, and for ``"svd"`` and ``"polar"`` under O(r).
        Under compact groups (normalised queries and keys) the rows of [A B] are dressed.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        What to dress; by default the optimizer's symmetries, or all that are found.
    optimizer : optional
        An optimizer with ``move_state_``, as :class:`quotientopt.QuotientAdam`: its state moves
        along, so that training goes on as if nothing had happened. Gradients move along always.
        Hidden units and scales stay then: their state is that of plain Adam, which has no law of
        transformation.
    residual : bool
        Rotate the residual stream too, to the principal axes of all matrices on it: for models
        with an exact O(d), or O(d − 1) where norms only centre.
    example_inputs : Tensor, tuple or mapping, optional
        Arguments of the model: what no class tells is found from them
        (:func:`quotientopt.find_symmetries`), and the outputs on them, in float64, are compared
        before and after. A
        model may have been altered where nobody looks (:func:`quotientopt.find_symmetries` looks
        for hooks and patches).

    Returns
    -------
    Dressing
        The group element that was used, a mapping as of :meth:`SymmetryMap.random_element`, with
        the spectral gaps.

    Raises
    ------
    TypeError
        If `model` is no Module, or the optimizer's state cannot be moved.
    ValueError
        If nothing is known to dress, a group lacks the section, a pair is not finite, lacks full
        rank (for other sections than ``"svd"``), is of mixed dtypes or half frozen, the dressed
        values do not fit the dtype, the outputs on `example_inputs` change, or `residual` is asked
        for where O(d) is broken. Nothing is changed then.

    Notes
    -----
    The dressing fields of François & Ravera, arXiv 2602.18948. Parameters stay in their memory, and
    no more than one pair at a time is copied, in float64.
    """
    if optimizer is not None and not hasattr(optimizer, "move_state_"):
        # Wrappers such as accelerate's do not hand it on.
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if symmetries is None and optimizer is not None:
        symmetries = getattr(optimizer, "symmetries", None)
    symmetries = symmetries_of(model, symmetries, example_inputs)
    if not residual:
        require_pairs(model, symmetries)
    if optimizer is not None:
        symmetries = _of_heads(symmetries)
    refuse_uneven(symmetries)
    refuse_sparse_gradients(symmetries)
    if optimizer is not None:
        refuse_foreign_optimizer(optimizer, symmetries)
    element: dict[str, Tensor] = {}
    gaps: dict[str, Tensor] = {}
    view: BlockView = stored
    if residual:
        stream, _ = require_group(symmetries, model)
        element[RESIDUAL], gaps[RESIDUAL] = canonical_rotation(model, symmetries)
        view = rotated(stream, element[RESIDUAL])
    view = of_unit_length(symmetries, view)
    found = elements_of(symmetries, section, view)
    for symmetry in symmetries.pairs:
        _refuse_overflow(symmetry, found[symmetry.name])
        element[symmetry.name] = found[symmetry.name].g
        gap = found[symmetry.name].gap
        if gap is not None:
            gaps[symmetry.name] = gap
    element |= unit_lengths(symmetries.scales)
    affine = [symmetry for symmetry in symmetries.heads if symmetry.translation is not None]
    for symmetry, t in zip(affine, translations_to_zero(affine).values(), strict=True):
        symmetry.check_translation(t)

    def shifts() -> dict[str, Tensor]:
        # Of the biases as they are now, so that b − b is zero to the last bit.
        return {name + TRANSLATION: t for name, t in translations_to_zero(affine).items()}

    with unchanged_outputs(model, example_inputs, f"the {section} section", put_back=True):
        if example_inputs is not None:
            symmetries.act_(element)
            symmetries.act_(shifts())
    move_(symmetries, element, optimizer)
    translation = shifts()
    move_(symmetries, translation)
    return Dressing(element | translation, section, gaps)


def _of_heads(symmetries: SymmetryMap) -> SymmetryMap:
    """The symmetries without hidden units and scales."""
    return SymmetryMap(
        symmetries.heads, symmetries.residual, residual_reason=symmetries.residual_reason
    )


def _refuse_overflow(symmetry: HeadSymmetry, element: Element) -> None:
    """Refuse dressed factors whose rows are too long for the parameters' dtype."""
    dtype = symmetry.blocks[0].parameter.dtype
    if torch.finfo(dtype).max > torch.finfo(torch.bfloat16).max / 2:
        return
    A, B = pair_of(symmetry)
    for side, dressed in (("left", element.contragredient @ A), ("right", element.g @ B)):
        if bool((gram(dressed).diagonal(dim1=-2, dim2=-1).sqrt() > torch.finfo(dtype).max).any()):
            raise ValueError(
                f"symmetry {symmetry.name!r}: the dressed {side} factor does not fit {dtype}; "
                "convert the model to float32, or take the 'balanced' section"
            )
