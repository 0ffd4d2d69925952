"""Seconds of steps and of iterations."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from step_timing.setting import TOKENS


def time_laps(acts: Sequence[Callable[[], object]], count: int, device: str) -> list[list[float]]:
    """Seconds of each act, `count` times in turn: shape (count, len(acts)).

    On CUDA the times are those between events on the stream, and the host waits at the ends only.
    """
    in_turn = list(acts) * count
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(in_turn) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for act, event in zip(in_turn, events[1:], strict=True):
            act()
            event.record()
        torch.cuda.synchronize()
        laps = [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(events)]
    else:
        stamps = [time.perf_counter()]
        for act in in_turn:
            act()
            stamps.append(time.perf_counter())
        laps = [second - first for first, second in itertools.pairwise(stamps)]
    return [laps[i : i + len(acts)] for i in range(0, len(laps), len(acts))]


def summarise_periods(periods: Sequence[Sequence[float]], refreshes: bool) -> dict[str, Any]:
    """Seconds of a step from laps of shape (repeats, PERIOD).

    The median leaves out what is done once a period, the mean over whole periods holds it. The
    slowest place of a period, by its median over the repeats, is where bases and frames are made
    afresh.
    """
    means = [statistics.fmean(period) for period in periods]
    by_place = [statistics.median(place) for place in zip(*periods, strict=True)]
    return {
        "median": statistics.median(itertools.chain.from_iterable(periods)),
        "mean": statistics.fmean(means),
        "refresh": max(by_place) if refreshes else None,
        "spread of means": {
            "smallest": min(means),
            "largest": max(means),
            "standard deviation": statistics.stdev(means) if len(means) > 1 else None,
        },
        "periods": [list(period) for period in periods],
    }


def summarise_iterations(laps: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """Share of the optimizer in an iteration of 32k tokens, from laps (model, optimizer).

    With fewer tokens the seconds of the model are scaled up in proportion, and ``extrapolated``
    says so.
    """
    model = statistics.fmean(lap[0] for lap in laps)
    optimizer = statistics.fmean(lap[1] for lap in laps)
    scaled = model * TOKENS / tokens
    return {
        "iterations": len(laps),
        "measured tokens": tokens,
        "tokens": TOKENS,
        "extrapolated": tokens != TOKENS,
        "model seconds as measured": model,
        "model seconds": scaled,
        "optimizer seconds": optimizer,
        "share": optimizer / (optimizer + scaled),
    }
