"""Classes of the same source text: a copy of a known class computes what the known class does.

Packages such as transformers repeat whole classes from family to family under other names, and so
do files that people copy from them. Two classes are called copies here if the text of ``forward``
and of all that it calls in its own file (methods, functions, rotary embeddings) is the same, apart
from comments, annotations and decorators, and if what they import has the same name and origin.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

# What hands cosines and sines to an attention lives in the model, not in the attention.
_TURNS = ("apply_rotary", "apply_multimodal_rotary")
_HANDED_IN_BY = "RotaryEmbedding"
_PLAIN_BASES = ("PreTrainedModel", "GenerationMixin")


@dataclass
class _Source:
    """The top level of a file."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    constants: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)

    def methods(self, class_name: str) -> dict[str, ast.FunctionDef]:
        """Methods of a class, with those of its bases in the same file."""
        node = self.classes[class_name]
        found: dict[str, ast.FunctionDef] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name) and base.id in self.classes:
                found |= self.methods(base.id)
        return found | {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}

    def bases(self, class_name: str) -> set[str]:
        """Bases from other files, by name, with the file they come from."""
        found: set[str] = set()
        for base in self.classes[class_name].bases:
            name = ast.unparse(base)
            if name in self.classes:
                found |= self.bases(name)
            elif not name.endswith(_PLAIN_BASES):
                found.add(self.imports.get(name, name))
        return found


def class_text(cls: type) -> str | None:
    """The text that decides what instances of a class compute; None if it has no such text.

    Parameters
    ----------
    cls : type
        A class at the top level of a file.
    """
    if cls.__module__.startswith(("torch.", "builtins")) or cls.__qualname__ != cls.__name__:
        return None
    return named_text(f"{cls.__module__}.{cls.__qualname__}")


def named_text(class_name: str) -> str | None:
    """:func:`class_text` of the class of a qualified name, which is not imported."""
    module_name, _, name = class_name.rpartition(".")
    path = _path(module_name)
    if path is None:
        return None
    try:
        written = Path(path).stat().st_mtime_ns
    except OSError:
        return None
    return _text(path, written, name)


@functools.cache
def _text(path: str, written: int, name: str) -> str | None:
    """The text of a class of a file, as it was written at that time."""
    source = _source(path, written)
    if source is None or name not in source.classes:
        return None
    methods = source.methods(name)
    if "forward" not in methods:
        return None
    texts: dict[str, str] = {}
    handed_in: set[str] = set()
    pending: list[tuple[str, ast.AST]] = [("self.forward", methods["forward"])]
    while pending:
        label, node = pending.pop()
        if label in texts:
            continue
        _strip(node)
        texts[label] = ast.unparse(node)
        for child in ast.walk(node):
            if isinstance(child, ast.Attribute) and child.attr in methods:
                if isinstance(child.value, ast.Name) and child.value.id == "self":
                    pending.append((f"self.{child.attr}", methods[child.attr]))
                continue
            used = child.id if isinstance(child, ast.Name) else getattr(child, "arg", None)
            if not isinstance(used, str):
                continue
            if used.startswith(_TURNS):
                for other in source.classes:
                    method = source.methods(other).get("forward")
                    if other.endswith(_HANDED_IN_BY) and method is not None:
                        _strip(method)
                        handed_in.add(ast.unparse(method))
            if used in source.functions:
                pending.append((used, source.functions[used]))
            elif used in source.constants:
                pending.append((used, source.constants[used]))
            elif used in source.imports and isinstance(child, ast.Name):
                texts[f"import {used}"] = source.imports[used]
    lines = [f"{label}: {texts[label]}" for label in sorted(texts)]
    return "\n".join([*sorted(source.bases(name)), *lines, *sorted(handed_in)])


def _path(module_name: str) -> str | None:
    """The file of a module; None where there is none."""
    module = sys.modules.get(module_name)
    path = _origin(module_name) if module is None else getattr(module, "__file__", None)
    return path if path is not None and path.endswith(".py") else None


@functools.cache
def _origin(module_name: str) -> str | None:
    """The file that a module would be imported from."""
    try:
        specification = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    return None if specification is None else specification.origin


@functools.cache
def _source(path: str, written: int) -> _Source | None:
    """A parsed file, as it was written at that time."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    source = _Source()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            source.classes[node.name] = node
        elif isinstance(node, ast.FunctionDef):
            source.functions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            source.constants[node.targets[0].id] = node
        elif isinstance(node, ast.ImportFrom):
            # Relative in a package, absolute in a copy: the last part is the same.
            origin = (node.module or "").rpartition(".")[2]
            source.imports |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            source.imports |= {a.asname or a.name: a.name for a in node.names}
    return source


def _strip(tree: ast.AST) -> None:
    """Remove docstrings, annotations and decorators in place."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.decorator_list = []
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
