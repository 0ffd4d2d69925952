"""What QuotientSGD refuses, with one line that names the thing and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quotientopt.optim.checks import refuse_options_of_torch
from quotientopt.optim.errors import GradientError
from quotientopt.optim.pair_geometry import METRICS
from quotientopt.symmetries import HeadSymmetry, SymmetryMap
from quotientopt.symmetries.map import RESIDUAL


def refuse_bad_options(options: Mapping[str, Any]) -> None:
    """Check the options of a param group.

    Raises
    ------
    ValueError
        Naming the option and what it may be.
    """
    lr, foreach = options["lr"], options["foreach"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got {tuple(lr.shape)}")
    for name, number in (("lr", int | float | Tensor), ("weight_decay", int | float)):
        value = options[name]
        if not isinstance(value, number) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    momentum = options["momentum"]
    if not isinstance(momentum, int | float) or not 0 <= momentum < float("inf"):
        raise ValueError(f"momentum must be a finite number that is not negative, got {momentum!r}")
    if options["metric"] not in METRICS:
        choices = " or ".join(map(repr, METRICS))
        raise ValueError(f"metric must be {choices}, got {options['metric']!r}")
    for name in ("nesterov", "maximize"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if foreach is not None and not isinstance(foreach, bool):
        raise ValueError(f"foreach must be True, False or None, got {foreach!r}")
    if options["nesterov"] and momentum == 0:
        raise ValueError("nesterov=True needs a momentum above zero")
    if options.get("dampening", 0) != 0:
        raise ValueError(f"dampening is not available, got {options['dampening']!r}; use 0")
    refuse_options_of_torch(options, "QuotientSGD")


def refuse_sparse(gradients: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse sparse gradients of parameters that belong to a symmetry."""
    for name, gradient in gradients:
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {name!r} is sparse, and the parameter belongs to a symmetry; "
                "use dense gradients (for an embedding: sparse=False)"
            )


def largest_entries(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Largest modulus of each gradient, which is finite where all its entries are."""
    values = [g._values() if g.is_sparse else g for g in gradients]
    values = [value for value in values if value.numel()]
    return list(torch._foreach_norm(values, float("inf"))) if values else []


def refuse_nonfinite(gradients: Mapping[Tensor, Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Refuse gradients with NaN or infinite entries.

    Raises
    ------
    GradientError
        Naming the first parameter.
    """
    bad = [
        name_of(parameter)
        for parameter, gradient in gradients.items()
        if not all(bool(largest.isfinite()) for largest in largest_entries([gradient]))
    ]
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise GradientError(
            f"the gradient of {bad[0]!r}{others} has NaN or infinite entries; nothing was updated. "
            "Skip this batch, lower the learning rate, or scale the loss with a GradScaler"
        )


def refuse_foreign_element(element: Mapping[str, Tensor], symmetries: SymmetryMap) -> None:
    """Refuse a group element that does not act on these symmetries.

    Raises
    ------
    ValueError
        For an unknown name, or an element of the wrong shape or outside its group.
    """
    known: dict[str, HeadSymmetry] = {symmetry.name: symmetry for symmetry in symmetries.heads}
    for name, g in element.items():
        if name == RESIDUAL and symmetries.residual is not None:
            symmetries.residual.check_element(g)
        elif name in known:
            known[name].check_element(g)
        else:
            raise ValueError(f"no symmetry called {name!r}; known: {sorted(known)}")


def refuse_foreign_buffer(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse saved state that is not a momentum of the parameter's shape.

    Raises
    ------
    ValueError
        Naming the parameter.
    """
    for key, value in state.items():
        if key != "momentum_buffer":
            raise ValueError(
                f"the saved state of {name!r} has a {key!r}: it is not the state of a QuotientSGD"
            )
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(
                f"the saved momentum of {name!r} has shape {tuple(value.shape)}, expected "
                f"{tuple(parameter.shape)}: it is not the state of a QuotientSGD on this model"
            )
