"""What a comparison ran on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from quotientopt._version import __version__

PACKAGES = ("torch", "pytorch_optimizer", "geoopt", "numpy", "matplotlib")


def describe_environment(device: str) -> dict[str, Any]:
    """Processor, cores, device and versions."""
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "quotientopt": __version__,
        **versions,
    }


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
