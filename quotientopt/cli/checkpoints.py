"""The commands on checkpoints: ``quotientopt inspect`` and ``quotientopt dress``."""

import argparse
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quotientopt.cli.parser import Parser, fail, interrupted, quiet_transformers

if TYPE_CHECKING:
    from quotientopt.canonical import Redundancy, Spectrum
    from quotientopt.checkpoints import Loaded
    from quotientopt.symmetries import SymmetryMap


DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
EXACT = 1e-9
NOT_EXACT = 1


def add_inspect(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="show the symmetries of a checkpoint and how redundant it is, and prove them",
        description=(
            "Builds the model of a folder in Hugging Face's format and prints its symmetries, what "
            "is not understood, parameters and gauge directions by layer, the largest deviation "
            "of the outputs under random group elements (float64, random inputs), and its spectra. "
            "Exit status 1 if a symmetry is not exact."
        ),
    )
    add = parser.add_argument
    add("path", metavar="MODEL_DIR", help="folder with config.json and weights, or weights alone")
    add("--config", metavar="FILE", help="config.json of a single file of weights")
    add(
        "--json",
        metavar="FILE",
        dest="record",
        help="write everything printed, and the spectra, as JSON",
    )
    add("--plot", metavar="FILE", help="draw the spectra of all heads as PNG (needs matplotlib)")
    add("--no-verify", dest="verify", action="store_false", help="do not run the model")
    add(
        "--dtype", default="auto", choices=DTYPES, help="dtype to load (default: the widest stored)"
    )
    parser.set_defaults(run=run_inspect)


def run_inspect(_: list[str], options: dict[str, Any]) -> int:
    """Inspect a checkpoint."""
    try:
        return inspect(**options)
    except (ValueError, ImportError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename or 'the results'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return interrupted("nothing written")


def inspect(
    path: str, config: str | None, record: str | None, plot: str | None, verify: bool, dtype: str
) -> int:
    """Print what is known of a checkpoint and return the exit status."""
    import torch

    from quotientopt._system import write_atomically
    from quotientopt.canonical import plot_spectra, redundancy, spectra
    from quotientopt.checkpoints import (
        find_checkpoint,
        load_checkpoint,
        symmetries_of_checkpoint,
        verify_checkpoint,
    )
    from quotientopt.symmetries import find_symmetries

    quiet_transformers()
    for target in (record, plot):
        if target is not None and not Path(target).absolute().parent.is_dir():
            raise ValueError(f"no such folder: {Path(target).parent}")
        if target is not None and not _is_replaceable(Path(target)):
            raise ValueError(
                f"{target} is another file than this command writes: move it first, or choose "
                "another name"
            )
    checkpoint = find_checkpoint(path, config)
    loaded = load_checkpoint(checkpoint, None if dtype == "auto" else getattr(torch, dtype))
    model = loaded.model
    symmetries = symmetries_of_checkpoint(model) if verify else find_symmetries(model)
    counts = redundancy(model, symmetries=symmetries)
    print(_heading(path, loaded, counts))
    print(f"\n{symmetries}\n\n{counts}")
    deviations = verify_checkpoint(model, symmetries) if verify and symmetries.heads else None
    found = spectra(model, symmetries=symmetries)
    print("\n" + _verification(deviations))
    print(_spectra_table(found))
    if plot is not None:
        plot_spectra(model, plot, symmetries=symmetries)
    if record is not None:
        content = _record(path, loaded, symmetries, counts, deviations, found)
        write_atomically(Path(record), json.dumps(content, indent=1) + os.linesep)
    written = [target for target in (record, plot) if target is not None]
    if written:
        print("\nwritten: " + ", ".join(written))
    return NOT_EXACT if deviations and any(value > EXACT for value in deviations.values()) else 0


def _is_replaceable(target: Path) -> bool:
    """Whether nothing is at `target`, or a record or picture of an earlier run."""
    if not os.path.lexists(target):
        return True
    if not target.is_file():
        return False
    content = target.read_bytes()
    if content.startswith(b"\x89PNG"):
        return b"Software\0quotientopt" in content[:4096]
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return not content
    return isinstance(record, dict) and {"symmetries", "redundancy", "environment"} <= set(record)


def _heading(path: str, loaded: "Loaded", counts: "Redundancy") -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in loaded.model.parameters()})
    kind = type(loaded.model).__name__
    line = f"{path}: {kind}, {counts.total.parameters:,} parameters, {', '.join(dtypes)}"
    if loaded.missing:
        line += f"\nnot in the files, random here: {', '.join(loaded.missing)}"
    return line


def _verification(deviations: Mapping[str, float] | None) -> str:
    if deviations is None:
        return "not verified"
    measured = {name: value for name, value in deviations.items() if not math.isnan(value)}
    unfelt = [name for name in deviations if name not in measured]
    lines = []
    if measured:
        name = max(measured, key=measured.__getitem__)
        wrong = sum(value > EXACT for value in measured.values())
        verdict = f"{wrong} NOT EXACT" if wrong else "all exact"
        lines.append(
            f"verified in float64: {len(measured)} symmetries, {verdict}; largest relative "
            f"deviation of an output {measured[name]:.1e} ({name})"
        )
    if unfelt:
        lines.append(
            "not verified, the outputs do not depend on what they act on: " + ", ".join(unfelt)
        )
    return "\n".join(lines)


def _by_part(found: Mapping[str, "Spectrum"]) -> dict[str, list["Spectrum"]]:
    parts: dict[str, list[Spectrum]] = {}
    for name, spectrum in found.items():
        parts.setdefault(name.rpartition(".")[2], []).append(spectrum)
    return parts


def _spectra_table(found: Mapping[str, "Spectrum"]) -> str:
    """Least, median and largest over all heads, by kind of pair."""
    rows = [("spectra", "over all heads", "least", "median", "largest")]
    for part, spectra in _by_part(found).items():
        for title, values in (
            (
                "effective rank over r",
                [s.effective_rank / s.singular_values.shape[-1] for s in spectra],
            ),
            ("smallest spectral gap", [s.gap for s in spectra]),
            ("charge imbalance", [s.charge_imbalance for s in spectra]),
        ):
            numbers = [number for value in values for number in value.flatten().tolist()]
            least, middle, most = min(numbers), statistics.median(numbers), max(numbers)
            rows.append((part, title, f"{least:.2g}", f"{middle:.2g}", f"{most:.2g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines) if found else "no spectra"


def _record(
    path: str,
    loaded: "Loaded",
    symmetries: "SymmetryMap",
    counts: "Redundancy",
    deviations: Mapping[str, float] | None,
    found: Mapping[str, "Spectrum"],
) -> dict[str, Any]:
    """Everything that is printed, and the spectra of every head."""
    from quotientopt.compare.protocol import describe_environment

    residual = symmetries.residual
    stream = residual and {
        "dimension": residual.dimension,
        "parameters": dict(residual.axes),
        "group": residual.group and str(residual.group),
        "broken_by": list(residual.broken_by),
    }
    heads = [
        {
            "name": symmetry.name,
            "group": str(symmetry.group),
            "heads": symmetry.heads,
            "left": [block.name for block in symmetry.left_blocks],
            "right": [block.name for block in symmetry.right_blocks],
            "redundant": symmetry.heads * symmetry.group.dim,
        }
        for symmetry in symmetries.heads
    ]
    return {
        "path": path,
        "model": type(loaded.model).__name__,
        "missing": list(loaded.missing),
        "symmetries": heads,
        "unrecognized": list(symmetries.unrecognized),
        "residual": stream or symmetries.residual_reason,
        "redundancy": {
            "layers": {name: dataclasses.asdict(count) for name, count in counts.layers.items()},
            "residual": counts.residual,
            "kinds": counts.kinds,
            "unknown": list(counts.unknown),
            "total": dataclasses.asdict(counts.total) | {"dimension": counts.total.dimension},
        },
        "deviations": deviations
        and {name: None if math.isnan(d) else d for name, d in deviations.items()},
        "spectra": {
            name: {
                "singular_values": spectrum.singular_values.tolist(),
                "effective_rank": spectrum.effective_rank.tolist(),
                "gap": [gap if gap < float("inf") else None for gap in spectrum.gap.tolist()],
                "charge_imbalance": spectrum.charge_imbalance.tolist(),
            }
            for name, spectrum in found.items()
        },
        "environment": describe_environment("cpu"),
    }


SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def add_dress(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "dress",
        help="write a checkpoint in canonical form, which computes the same",
        description=(
            "Brings all head pairs of a checkpoint to a section of their orbits and writes a copy "
            "with the same names, dtypes, shards and other files. The outputs on random inputs "
            "are compared before and after, and the copy is loaded again, before it gets its name."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("path", metavar="MODEL_DIR", help="folder with config.json and weights, or weights alone")
    add(
        "--out",
        required=True,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder to write, or file for weights alone",
    )
    add(
        "--section",
        default="svd",
        choices=SECTIONS,
        help="svd: one representative per orbit; others up to a rotation or signs in every head",
    )
    add(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="config.json of a single file of weights",
    )
    add(
        "--residual",
        action="store_true",
        default=argparse.SUPPRESS,
        help="rotate the residual stream too, to its principal axes; needs gains that are one",
    )
    add(
        "--overwrite",
        action="store_true",
        default=argparse.SUPPRESS,
        help="replace the checkpoint at --out, once the copy is complete; other files there stay",
    )
    parser.set_defaults(run=run_dress)


def run_dress(_: list[str], options: dict[str, Any]) -> int:
    """Dress a checkpoint."""
    from quotientopt.checkpoints import CheckpointError, dress_checkpoint

    quiet_transformers()
    try:
        report = dress_checkpoint(**options)
    except CheckpointError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return interrupted("nothing written")
    print(report)
    print(f"\nwritten: {options['out']}")
    return 0
