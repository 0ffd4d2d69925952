"""step-time-<device>.json and the table on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quotientopt.compare.protocol import UsageError, describe_environment
from quotientopt.compare.record import write_atomically

SCHEMA = 1


def record_path(folder: Path, device: str) -> Path:
    """``step-time-<device name>.json`` in `folder`."""
    name = describe_environment(device)["device"].lower()
    return folder / f"step-time-{re.sub('[^a-z0-9]+', '-', name).strip('-')}.json"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows measured earlier; refuses a file that is something else rather than replace it."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, not {SCHEMA}")
        return list(document["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot add to {path}: {error}; move it away") from error


def save_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the record, in place of one with the same optimizer and setting."""
    row = json.loads(json.dumps(row, allow_nan=False))
    key = (row["optimizer"], row["setting"])
    rows = [other for other in load_rows(path) if (other["optimizer"], other["setting"]) != key]
    document = {"schema": SCHEMA, "rows": [*rows, row]}
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, as a Markdown table."""
    syncs = any("synchronisations" in row for row in rows)
    header = (
        ("optimizer", "synchronisations per step", "at a refresh", "refused in error mode")
        if syncs
        else (
            "optimizer",
            "step ms: median",
            "mean (smallest to largest period)",
            "refresh",
            "share of an iteration",
            "state MB",
            "peak above model and gradients MB",
        )
    )
    lines = [header, ("---",) * len(header)]
    lines += [_line(row, len(header)) for row in rows]
    notes = [f"{row['optimizer']} skipped: {row['skipped']}" for row in rows if "skipped" in row]
    iterations = [row["iteration"] for row in rows if "iteration" in row]
    if iterations:
        first = iterations[0]
        how = (
            f"extrapolated from {first['measured tokens']}" if first["extrapolated"] else "measured"
        )
        notes.append(f"Shares are those of iterations of {first['tokens']} tokens, {how}.")
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *notes])


def _line(row: dict[str, Any], columns: int) -> tuple[str, ...]:
    name = row["optimizer"]
    if "skipped" in row:
        return (name, "skipped", *["–"] * (columns - 2))
    if "synchronisations" in row:
        found = row["synchronisations"]
        counts = list(found["per step"])
        refresh = "–" if found["refresh step"] is None else str(counts.pop(found["refresh step"]))
        usual = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        refused = f"{found['steps refused in error mode']} of {found['steps in error mode']}"
        return (name, usual, refresh, refused)
    step = row["step"]
    spread = step["spread of means"]
    before, peak = row["bytes before the first step"], row["peak bytes of steps"]
    return (
        name,
        f"{1e3 * step['median']:.2f}",
        f"{1e3 * step['mean']:.2f} ({1e3 * spread['smallest']:.2f} to "
        f"{1e3 * spread['largest']:.2f})",
        "–" if step["refresh"] is None else f"{1e3 * step['refresh']:.2f}",
        f"{row['iteration']['share']:.2%}" if "iteration" in row else "–",
        f"{row['state bytes'] / 1e6:.1f}",
        "–" if before is None or peak is None else f"{(peak - before) / 1e6:.1f}",
    )
