"""One optimizer measured: a row of the record."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from quotientopt.compare.protocol import describe_environment
from quotientopt.compare.train import state_bytes
from step_timing.clock import summarise_iterations, summarise_periods, time_laps
from step_timing.contenders import CONTENDERS, Contender, build_optimizers
from step_timing.model import accumulate, build_model, make_batches, set_gradients
from step_timing.resources import measure_synchronisations, reset_peak, used_bytes
from step_timing.setting import PERIOD, Setting, SkippedError


def measure_apart(name: str, setting: Setting) -> dict[str, Any]:
    """`measure` in a new process, whose memory is all its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, name, setting).result()
        except BrokenProcessPool:
            reason = "its process was killed, most likely for want of memory"
            row = {"optimizer": name, "setting": asdict(setting), "skipped": reason}
            return row | {"environment": _environment(setting)}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Measure one optimizer; a row of the record."""
    row: dict[str, Any] = {"optimizer": name, "setting": asdict(setting)}
    torch.set_num_threads(setting.threads)
    model = build_model(setting.model).to(setting.device, getattr(torch, setting.dtype))
    row |= {
        "model class": f"{type(model).__module__}.{type(model).__name__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "environment": _environment(setting),
    }
    try:
        optimizers = build_optimizers(name, model, setting)
        row["options"] = [_plain(optimizer.defaults) for optimizer in optimizers]
        return row | _measure_steps(CONTENDERS[name], model, optimizers, setting)
    except (SkippedError, torch.OutOfMemoryError) as error:
        return row | {"skipped": str(error).splitlines()[0]}


def _measure_steps(
    contender: Contender, model: nn.Module, optimizers: list[Optimizer], setting: Setting
) -> dict[str, Any]:
    device = setting.device

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    if "step" in setting.compiled:
        step = torch.compile(step)
    set_gradients(model)
    before = used_bytes(device)
    reset_peak(device)
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise SkippedError(f"its first step failed: {error}") from error
    for _ in range(setting.warmup - 1):
        step()
    if setting.syncs:
        return {"synchronisations": measure_synchronisations(step, contender.refreshes)}
    periods = [time_laps([step], PERIOD, device) for _ in range(setting.repeats)]
    laps = [[lap[0] for lap in period] for period in periods]
    found = {
        "step": summarise_periods(laps, contender.refreshes),
        "state bytes": state_bytes(optimizers),
        "bytes before the first step": before,
        "peak bytes of steps": used_bytes(device, peak=True),
    }
    if setting.iterations:
        found["iteration"] = _measure_iterations(model, step, setting)
    return found


def _measure_iterations(
    model: nn.Module, step: Callable[[], None], setting: Setting
) -> dict[str, Any]:
    batches = make_batches(setting)
    called = torch.compile(model) if "model" in setting.compiled else model

    def forward_and_backward() -> None:
        model.zero_grad()
        accumulate(called, batches, setting)

    forward_and_backward()
    reset_peak(setting.device)
    laps = time_laps([forward_and_backward, step], setting.iterations, setting.device)
    alone = time_laps([forward_and_backward], min(3, setting.iterations), setting.device)
    return summarise_iterations(laps, setting.tokens) | {
        "model seconds as measured, without optimizer": statistics.median(lap[0] for lap in alone),
        "peak bytes": used_bytes(setting.device, peak=True),
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    kept = (bool, int, float, str, list, tuple, type(None))
    return {name: value for name, value in options.items() if isinstance(value, kept)}


def _environment(setting: Setting) -> dict[str, Any]:
    return describe_environment(setting.device) | {
        "transformers": version("transformers") if find_spec("transformers") else "not installed",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }
