"""Whether a module computes what a known class does: copies of a class, and altered modules.

Packages such as transformers repeat whole classes from family to family under other names, and so
do files that people copy from them. Two classes are called copies here if the text of ``forward``
and of all that it calls in its own file (methods, functions, rotary embeddings) is the same, apart
from comments, annotations and decorators, and if what they import has the same name and origin.

An adapter knows a class, not what somebody did to an instance or to the class itself. What can be
seen is looked for here; what cannot (a patched function of torch, a parameter's own tensor class)
is found by comparing outputs only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

# ---- copies: the same source text ----------------------------------------------------------------


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
    path = _file_of(module_name) if module is None else getattr(module, "__file__", None)
    return path if path is not None and path.endswith(".py") else None


@functools.cache
def _file_of(module_name: str) -> str | None:
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


# ---- modules altered behind their class ----------------------------------------------------------


# Packages whose decorators and hooks leave values alone, or are seen in other ways.
TRUSTED = {"torch", "transformers", "timm", "peft", "accelerate", "quotientopt"}
# Hooks that read, move or record, by the start of the module that defines them.
OBSERVERS = (
    "torch.",
    "accelerate.",
    "transformers.utils.",
    "transformers.modeling_utils",
    "wandb.",
)
# Hooks of accelerate that move data between devices.
MOVERS = {"ModelHook", "AlignDevicesHook", "CpuOffload"}
# Functions in a module of transformers that its attentions call.
ROTARY = "RotaryEmbedding"
HELPERS = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv")


def alteration(module: nn.Module, known: type, class_name: str) -> str | None:
    """Why a module does not compute what its class does; None if nothing is seen.

    Looks for hooks before and after its forward, methods that were replaced on the instance or on
    its class, parameters and submodules that a subclass or the instance computes, for attentions of
    transformers another attention function under a known name, and replaced rotary embeddings.

    Parameters
    ----------
    module : Module
    known : type
        Its class or one of its bases.
    class_name : str
        Qualified name of the class that `known` is, or is a copy of.
    """
    return (
        _hooked(module)
        or _patched_instance(module)
        or _patched_class(module)
        or _computed(module, known)
        or _attention_function(module, known, class_name)
        or replaced_rotary(module, known, class_name)
    )


def replaced_rotary(module: nn.Module, known: type, class_name: str) -> str | None:
    """Why the rotary embedding in a module of transformers is not that of its class, if so.

    It is read by all attentions inside.
    """
    if not class_name.startswith("transformers."):
        return None
    scope = vars(sys.modules.get(known.__module__, sys))
    # Those that the file defines, or imports from another one.
    rotary = {v for v in scope.values() if isinstance(v, type) and v.__name__.endswith(ROTARY)}
    for name, child in module.named_children():
        if "rotary" not in name:
            continue
        base = next((base for base in type(child).__mro__ if base in rotary), None)
        if base is None:
            return f"its {name} was replaced by a {type(child).__name__}"
        if _method(type(child), "forward") is not _method(base, "forward"):
            return f"its {name} is a {type(child).__name__} with another forward"
        reason = alteration(child, base, class_name)
        if reason is not None:
            return f"its {name}: {reason}"
    return None


def _hooked(module: nn.Module) -> str | None:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        origin = _origin(hook)
        if not origin.startswith(OBSERVERS):
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            return f"a {type(module).__name__} has a hook, {name}"
    return None


def _origin(function: Any) -> str:
    """The module that defines a function, its wrapper's if it is wrapped."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    scope = getattr(function, "__globals__", None)
    if scope is not None:
        return str(scope.get("__name__", ""))
    named = getattr(function, "__module__", None)
    return str(named or type(function).__module__)


def _layers(function: Any) -> Iterator[Any]:
    """A function and those that it wraps, outermost first."""
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _patched_instance(module: nn.Module) -> str | None:
    """A method of its class that the instance has anew."""
    own = vars(module)
    for name in ("forward", "__call__", "_call_impl"):
        harmless = name == "forward" and (_only_moves_data(module) or _only_casts(module))
        if name in own and not harmless:
            return f"the {name} of a {type(module).__name__} was replaced"
    for name, value in own.items():
        if callable(value) and not isinstance(value, nn.Module) and name != "forward":
            method = _method(type(module), name)
            if method is not None:
                return f"the {name} of a {type(module).__name__} was replaced"
    return None


def _method(cls: type, name: str) -> Any:
    """A method that the class or a base below Module defines."""
    for base in cls.__mro__:
        if base is nn.Module:
            return None
        if name in vars(base):
            value = vars(base)[name]
            return value if callable(value) and not isinstance(value, type) else None
    return None


def _only_casts(module: Any) -> bool:
    """Whether accelerate alone has replaced the forward, to run it under mixed precision."""
    before, forward = vars(module).get("_original_forward"), vars(module).get("forward")
    return _origin(forward).startswith("accelerate.") and (
        before is not None and _function(before) is _function(type(module).forward)
    )


def _only_moves_data(module: Any) -> bool:
    """Whether accelerate alone has replaced the forward, to move data between devices."""
    hook, forward = getattr(module, "_hf_hook", None), vars(module).get("forward")
    if hook is None or not isinstance(forward, functools.partial):
        return False
    if not _origin(forward).startswith("accelerate."):
        return False
    before = getattr(module, "_old_forward", None)
    if _function(before) is not _function(type(module).forward):
        return False
    hooks = getattr(hook, "hooks", (hook,))
    return all(
        type(one).__module__ == "accelerate.hooks" and type(one).__name__ in MOVERS for one in hooks
    )


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _patched_class(module: nn.Module) -> str | None:
    """A method of the classes up to the one with the forward that was put there afterwards."""
    cls = type(module)
    names = {base.__qualname__ for base in cls.__mro__}
    homes = {base.__module__.partition(".")[0] for base in cls.__mro__[:-1]} | TRUSTED
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if only_shards(base):
            continue
        # A class that is not where its name says may come from anywhere.
        scope = vars(sys.modules.get(base.__module__, sys))
        known = homes if scope.get(base.__qualname__) is base else None
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if hasattr(function, "__code__") and not _belongs(function, name, base, names, known):
                return f"the {name} of class {base.__name__} was replaced"
        if "forward" in vars(base):
            break
    return None


def only_shards(base: type) -> bool:
    """Whether a class is one that ``fully_shard`` puts before a module's own: it computes as that.

    A base of both may wrap the forward of every subclass, as those of transformers do.
    """
    if not base.__module__.startswith("torch.distributed."):
        return False
    if "forward" not in vars(base):
        return True
    own, *inherited = [vars(b)["forward"] for b in base.__mro__ if "forward" in vars(b)]
    innermost = [list(_layers(function))[-1] for function in (own, *inherited[:1])]
    return len(innermost) == 2 and innermost[0] is innermost[1]


def _belongs(
    function: Any, name: str, base: type, classes: set[str], homes: set[str] | None
) -> bool:
    """Whether a method was defined with its class: by its name, and where its layers are from."""
    inner = function
    for inner in _layers(function):
        if homes is not None and _origin(inner).partition(".")[0] not in homes:
            return False
    path, _, own = inner.__qualname__.rpartition(".")
    if own == name and path in classes:
        return True
    # A function of the module given to the class, or made by a decorator.
    at_home = path == "" or path.endswith("<locals>")
    return at_home and (name != "forward" or inner.__module__ == base.__module__)


def _computed(module: nn.Module, known: type) -> str | None:
    """A parameter or submodule that attribute access does not give as it is registered."""
    registered = {*module._parameters, *module._modules, *module._buffers}
    hidden = registered & vars(module).keys()
    if hidden:
        return f"{min(hidden)} of a {type(module).__name__} is hidden by an attribute"
    for base in type(module).__mro__:
        if base is known or base is nn.Module:
            break
        names = vars(base).keys()
        special = {"__getattr__", "__getattribute__", "__call__"} & names
        computed = {name for name in registered & names if vars(base)[name] is not None}
        for name in sorted(special | computed):
            return f"a {type(module).__name__} computes its {name}"
    return None


def _attention_function(module: Any, known: type, class_name: str) -> str | None:
    """Another function where an attention of transformers calls one of its package."""
    if not class_name.startswith("transformers.") or "Attention" not in class_name:
        return None
    scope = vars(sys.modules.get(known.__module__, sys))
    homes = {"transformers", "torch", known.__module__.partition(".")[0]}
    functions = {name: scope[name] for name in HELPERS if name in scope}
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    functions["eager"] = scope.get("eager_attention_forward")
    if isinstance(name, str) and name.removeprefix("paged|") != "eager":
        interface = scope.get("ALL_ATTENTION_FUNCTIONS")
        for key in (name, name.removeprefix("paged|")):
            if interface is not None and key in interface:
                functions[name] = interface[key]
    for called, function in functions.items():
        origins = [_origin(layer).partition(".")[0] for layer in _layers(function)]
        if not homes.issuperset(origins):
            return f"the function {called!r} that a {type(module).__name__} calls was replaced"
    return None
