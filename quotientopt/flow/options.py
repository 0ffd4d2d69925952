"""What a flow may be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quotientopt.flow.geometry import check_metric

METHODS = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")
NOT_INVARIANT = ("raise", "warn", "ignore")


def check_options(
    t_span: Any,
    metric: str,
    method: str,
    not_invariant: str,
    max_step: float,
    max_evaluations: int,
) -> tuple[float, float]:
    """Start and end of the time, once all of these options fit; ``ValueError`` if one does not."""
    check_metric(metric)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not_invariant not in NOT_INVARIANT:
        raise ValueError(f"not_invariant must be one of {NOT_INVARIANT}, got {not_invariant!r}")
    if not max_step > 0:
        raise ValueError(f"max_step must be positive, got {max_step!r}")
    if not isinstance(max_evaluations, int) or max_evaluations < 1:
        raise ValueError(f"max_evaluations must be a positive integer, got {max_evaluations!r}")
    try:
        start, end = (float(t) for t in t_span)
    except (TypeError, ValueError):
        raise ValueError(f"t_span must be a pair (start, end) of numbers, got {t_span!r}") from None
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(
            f"t_span must be finite with start < end, got ({start}, {end}): the flow descends "
            "forwards in time"
        )
    return start, end


def check_times(t_eval: Any, span: tuple[float, float]) -> list[float] | None:
    """The times to record; ``ValueError`` unless they increase within the span."""
    if t_eval is None:
        return None
    times = [float(t) for t in t_eval]
    increasing = all(a < b for a, b in pairwise(times))
    if not times or not increasing or not (span[0] <= times[0] and times[-1] <= span[1]):
        raise ValueError(f"t_eval must be increasing times within t_span = {span}")
    return times


def tolerances_of(
    tensors: Sequence[Tensor], rtol: float | None, atol: float | None
) -> tuple[float, float]:
    """rtol and atol; ``ValueError`` if they, or the dtypes, are not fit for a flow."""
    coarsest = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    if coarsest not in (torch.float32, torch.float64):
        raise ValueError(
            f"a flow needs float32 or float64, got {coarsest}, whose rounding is larger than any "
            "useful tolerance; call .double()"
        )
    single = coarsest == torch.float32
    rtol = (1e-4 if single else 1e-8) if rtol is None else rtol
    atol = (1e-6 if single else 1e-10) if atol is None else atol
    least = 100 * torch.finfo(coarsest).eps
    if not rtol >= least or not math.isfinite(rtol):
        raise ValueError(
            f"rtol must be at least {least:.1e} for {coarsest}, got {rtol!r}"
            + ("; call .double() for less" if single else "")
        )
    if not 0 < atol < math.inf:
        raise ValueError(f"atol must be positive, got {atol!r}")
    return rtol, atol
