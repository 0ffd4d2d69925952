"""What a bug report needs: versions, device, the symmetries found, and whether they are exact.

``python -m quotientopt.report`` describes the installation and tries it on a small model;
``python -m quotientopt.report MODEL_DIR`` adds the symmetries of a checkpoint. In a program,
``quotientopt.report.report(model, example_inputs)`` says the same of a model that is there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quotientopt._version import __version__
from quotientopt.symmetries.find import find_symmetries, symmetries_from

PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "scipy",
    "geoopt",
    "pymanopt",
    "pytorch_optimizer",
)
FAILED = 1


def report(model: nn.Module | None = None, example_inputs: Any = None) -> str:
    """Versions and device, and what is found in a model.

    Parameters
    ----------
    model : nn.Module, optional
        Default: a small reference model, whose symmetries are verified too.
    example_inputs : optional
        What the model is called with (a tensor, a tuple, a mapping); symmetries
        are then found from gradients as well.

    Returns
    -------
    str
        Lines to paste. An error in the search is part of them, with its traceback.
    """
    lines = environment()
    if model is None:
        return "\n".join([*lines, "", *_section("self-check", _self_check)])
    return "\n".join(
        [*lines, "", *_section("symmetries", lambda: _symmetries_of(model, example_inputs))]
    )


def environment() -> list[str]:
    """Versions of everything that takes part, device, threads and global precision switches."""
    lines = [
        f"quotientopt {__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}",
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    accelerator = "none"
    if torch.cuda.is_available():
        accelerator = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    elif torch.backends.mps.is_available():
        accelerator = "mps"
    return [
        *lines,
        f"accelerator: {accelerator}",
        f"threads: {torch.get_num_threads()}, default dtype: {torch.get_default_dtype()}, "
        f"float32 matmul precision: {torch.get_float32_matmul_precision()}",
    ]


def _self_check() -> list[str]:
    from quotientopt.models import reference_model

    model = reference_model("llama", layers=1, width=32)
    symmetries = find_symmetries(model)
    tokens = torch.arange(24).view(2, 12)
    worst = max(symmetries.verify(model, tokens).values())
    return [
        f"{len(symmetries.heads)} head symmetries of a small Llama, "
        f"largest deviation of its outputs in float64 {worst:.1e}"
    ]


def _symmetries_of(model: nn.Module, example_inputs: Any) -> list[str]:
    count = sum(p.numel() for p in model.parameters())
    kinds = sorted({f"{p.dtype} on {p.device.type}" for p in model.parameters()})
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    found = symmetries_from(model, example_inputs)
    return [f"{name}, {count:,} parameters, {', '.join(kinds)}", *str(found).splitlines()]


def _section(title: str, lines: Callable[[], list[str]]) -> list[str]:
    """A titled part; an error becomes its text, since it is what the report is about."""
    try:
        return [f"{title}:", *lines()]
    except Exception:  # whatever goes wrong is to be reported
        return [f"{title}: failed", *traceback.format_exc().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 where a part of it failed."""
    parser = argparse.ArgumentParser(prog="python -m quotientopt.report", description=__doc__)
    parser.add_argument(
        "path", nargs="?", metavar="MODEL_DIR", help="checkpoint whose symmetries are listed"
    )
    path = parser.parse_args(arguments).path
    if path is None:
        text = report()
    else:
        from quotientopt.cli.parser import quiet_transformers

        def of_checkpoint() -> list[str]:
            from quotientopt.checkpoints import find_checkpoint, load_checkpoint

            quiet_transformers()
            model = load_checkpoint(find_checkpoint(path)).model
            return _symmetries_of(model, None)

        text = "\n".join([*environment(), "", *_section("symmetries", of_checkpoint)])
    print(text)
    return FAILED if ": failed\n" in text else 0


if __name__ == "__main__":
    sys.exit(main())
