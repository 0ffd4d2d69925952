"""Memory, and how often the host waits for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from step_timing.setting import PERIOD

SYNCHRONISED = "called a synchronizing CUDA operation"


def used_bytes(device: str, *, peak: bool = False) -> int | None:
    """Allocated bytes on CUDA, resident ones of the process on Linux; now or at their peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return 1024 * int(sizes["VmHWM" if peak else "VmRSS"].split()[0])
    return None


def reset_peak(device: str) -> None:
    """Let the peak start from what is used now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def count_synchronisations(act: Callable[[], object]) -> int:
    """How often `act` makes the host wait for the device, as far as torch can tell."""
    with warnings.catch_warnings(record=True) as caught, sync_mode("warn"):
        warnings.simplefilter("always")
        act()
    return sum(SYNCHRONISED in str(warning.message) for warning in caught)


@contextlib.contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Set torch's synchronisation debug mode, and the default one afterwards."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_synchronisations(act: Callable[[], object], refreshes: bool) -> dict[str, Any]:
    """Counts over a period, then a period in which synchronising is an error.

    The step with the most synchronisations is taken for the one that makes frames afresh, and is
    left out of the second period. Nothing is left out where all counts are equal.
    """
    counts = [count_synchronisations(act) for _ in range(PERIOD)]
    refresh = counts.index(max(counts)) if refreshes and len(set(counts)) > 1 else None
    refused = 0
    for place in range(PERIOD):
        with sync_mode("default" if place == refresh else "error"):
            try:
                act()
            except RuntimeError as error:
                if SYNCHRONISED not in str(error):
                    raise
                refused += 1
    return {
        "per step": counts,
        "refresh step": refresh,
        "steps refused in error mode": refused,
        "steps in error mode": PERIOD - (refresh is not None),
    }
