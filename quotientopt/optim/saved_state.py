"""Loading a state dict without the cast that torch makes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from quotientopt._linalg import compute_dtype

# Before the suffix of blocks of a fused parameter.
KEYS = (
    "step",
    "exp_avg",
    "exp_avg_sq",
    "master",
    "head_frame",
    "head_covariance",
    "residual_frame",
    "residual_covariance",
    "partner_coordinates",
    "coordinates_made",
)


def refuse_foreign_state(
    state: Mapping[Tensor, Mapping[str, Any]], name_of: Callable[[Tensor], str]
) -> None:
    """Refuse the state of another optimizer, of which something would be left unused.

    Raises
    ------
    ValueError
        Naming parameter and entry.
    """
    for parameter, own in state.items():
        for key in own:
            if key.partition(".")[0] not in KEYS:
                raise ValueError(
                    f"the saved state of {name_of(parameter)!r} has a {key!r}: it is not the state "
                    "of a QuotientAdam or AdamW"
                )


def restore_precision(
    state: MutableMapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Any],
    wide: Container[int],
) -> None:
    """Undo torch's cast of state to its parameter's dtype where float32 is needed.

    All tensors are copied: torch keeps the given ones, which another optimizer may use on.

    Parameters
    ----------
    state, param_groups
        The optimizer's, as torch has loaded them; the state is changed.
    loaded : mapping
        The state dict that was given.
    wide : container of int
        ``id`` of the parameters whose state is kept in at least float32.
    """
    saved_order = [i for group in loaded["param_groups"] for i in group["params"]]
    parameters = [p for group in param_groups for p in group["params"]]
    for i, parameter in zip(saved_order, parameters, strict=True):
        own = state.get(parameter, {})
        for key, value in own.items():
            if not isinstance(value, Tensor):
                continue
            given = loaded["state"][i][key] if id(parameter) in wide else value
            dtype = compute_dtype(parameter.dtype) if given.dtype != value.dtype else None
            own[key] = given.detach().to(value.device, dtype or given.dtype).clone()
