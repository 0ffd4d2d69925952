"""A fingerprint of the code that a result depends on."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

import quotientopt

PACKAGE = "quotientopt"
# What is trained and by what; the patches are in this package.
ROOTS = ("quotientopt.optim.quotient_adam", "quotientopt.models")
OWN = ("patches.py", "hidden.py")


def code_digest() -> str:
    """Short hash of the optimizer, the models, all they import, and the patches.

    Comments, docstrings and layout do not count.
    """
    here = Path(__file__).parent
    files = [*modules_behind(ROOTS).values(), *(here / name for name in OWN)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(_bare(path).encode())
    return digest.hexdigest()[:16]


def modules_behind(names: Iterable[str]) -> dict[str, Path]:
    """Modules of quotientopt and all of its modules that they import, with their files."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found or name == PACKAGE:
            continue
        found[name] = path
        waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return found


def _file_of(name: str) -> Path | None:
    """The file of a module of quotientopt; None for everything else."""
    first, *parts = name.split(".")
    if first != PACKAGE:
        return None
    path = Path(quotientopt.__file__).parent.joinpath(*parts)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _bare(path: Path) -> str:
    """The code in `path` without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
