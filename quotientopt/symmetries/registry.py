"""Adapters: functions that know where the symmetries of one module class are."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

from quotientopt.symmetries.classes import (
    alteration,
    class_text,
    named_text,
    only_shards,
    replaced_rotary,
)
from quotientopt.symmetries.head import HeadSymmetry, ScaleSymmetry

if TYPE_CHECKING:
    from quotientopt.symmetries.residual import Norm, Reader


@dataclass
class Contribution:
    """What an adapter knows about one module.

    Parameter and module names are qualified by the module's name in the model (see
    :func:`qualified`).

    Attributes
    ----------
    heads : list of HeadSymmetry
        Symmetries of attention heads, or of low-rank pairs.
    residual_axes : dict of str to int
        Parameter name to the axis that is the residual stream. Gains of norms do not belong here:
        they are diagonal maps of the stream, not vectors in it.
    writers : set of str
        Those of ``residual_axes`` whose values are added to the stream (embeddings, output
        matrices and their biases). The others read it, or are biases of norms.
    residual_breakers : list of str
        What singles out a basis of the stream, apart from ``norms``: ``"activation conv2"``.
    norms : list of Norm
        Norms on the stream. Their gains and their centring break O(d) until
        :func:`quotientopt.fold_norms_` folds them; do not list them as breakers.
    outputs : dict of str to (str or None)
        Name of a module that returns hidden states to the name of the norm they went through, None
        where they are the stream itself. Breaks O(d) unless a consumer is known.
    consumers : dict of str to tuple of Reader
        Name of a module to *all* that reads the hidden states it returns.
    gauge_free : bool
        Whether the module is an attention that holds or reads invariants: no group acts on it.
    hidden_units : list of HeadSymmetry
        Scales of hidden units of feed-forward layers.
    scales : list of ScaleSymmetry
        Lengths that a norm does not see.
    left_alone : dict of str to str
        Name of a pair on which no group acts to what stands in the way.
    added_at_once : list of tuple of str
        Names of biases of branches that are added to the stream together.
    silent_keys : dict of str to int
        Name of a bias of keys to how many of its entries softmax drops, where no group's
        translation says so: those of rows that no rotation turns.
    score_gains : dict of str to int
        Name of the gain of a norm of queries to how many numbers of it the gain of that of the
        keys can take up.
    """

    heads: list[HeadSymmetry] = field(default_factory=list)
    residual_axes: dict[str, int] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    residual_breakers: list[str] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    outputs: dict[str, str | None] = field(default_factory=dict)
    consumers: dict[str, tuple[Reader, ...]] = field(default_factory=dict)
    gauge_free: bool = False
    hidden_units: list[HeadSymmetry] = field(default_factory=list)
    scales: list[ScaleSymmetry] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    added_at_once: list[tuple[str, ...]] = field(default_factory=list)
    silent_keys: dict[str, int] = field(default_factory=dict)
    score_gains: dict[str, int] = field(default_factory=dict)


class NotUnderstoodError(Exception):
    """Raised by an adapter for a module that is not built the way the adapter assumes.

    The module then contributes nothing, and is listed as unrecognized if it is an attention.

    Parameters
    ----------
    reason : str
    inside : bool
        Whether the module also changes what the modules inside it compute, so that none of them
        may contribute either.
    """

    def __init__(self, reason: str = "", *, inside: bool = False) -> None:
        super().__init__(reason)
        self.inside = inside


Adapter = Callable[[nn.Module, str], Contribution]
AdapterT = TypeVar("AdapterT", bound=Adapter)
T = TypeVar("T")

# Methods a subclass may override without changing what forward computes.
_HARMLESS = {"extra_repr", "_reset_parameters", "reset_parameters"}

# Modules that hand their calls on to one inside them: attribute and name of that one.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


class ByClass(Generic[T]):
    """Values by qualified class name, found for a class, its subclasses and its copies.

    A copy is a class of another name, but of the same last word (Attention, MLP), whose source
    text is the same, see :mod:`quotientopt.symmetries.classes`; only with classes of the
    transformers package it is compared.
    """

    def __init__(self) -> None:
        self._values: dict[str, T] = {}
        self._copied: dict[str, dict[str, str]] = {}

    def __setitem__(self, class_name: str, value: T) -> None:
        self._values[class_name] = value
        self._copied.clear()

    def __getitem__(self, class_name: str) -> T:
        return self._values[class_name]

    def copy(self) -> ByClass[T]:
        """The same values, apart from what is added later."""
        copied: ByClass[T] = ByClass()
        copied._values = dict(self._values)
        return copied

    def name_for(self, module: nn.Module) -> str | None:
        """Name of the nearest known class among those of a module; None if there is none."""
        for base in type(unwrapped(module)).__mro__:
            name = f"{base.__module__}.{base.__qualname__}"
            if name in self._values:
                return name
            copied = self._name_of_original(base)
            if copied is not None:
                return copied
        return None

    def find(self, module: nn.Module) -> T | None:
        """The value for a module that computes what its nearest known class does, else None."""
        name = self.name_for(module)
        return self._values[name] if name is not None and follows(module, name) else None

    def _name_of_original(self, base: type) -> str | None:
        if not _may_be_copy(base):
            return None
        # Only classes that are called alike: reading the files of all takes seconds.
        role = _role(base.__name__)
        if role not in self._copied:
            names = [name for name in self._values if name.startswith(_COPIED_FROM)]
            texts = {name: named_text(name) for name in names if _role(name) == role}
            self._copied[role] = {text: name for name, text in texts.items() if text is not None}
        if not self._copied[role]:
            return None
        return self._copied[role].get(class_text(base) or "")


def _role(name: str) -> str:
    """The last word of a class name: Attention, MLP, Norm."""
    name = name.rpartition(".")[2]
    if name.endswith("MLP"):  # behind other capitals too: CLIPMLP, ViTMLP
        return "MLP"
    words = re.findall(r"[A-Z]+$|[A-Z][a-z0-9_]*", name)
    return words[-1] if words else name


_COPIED_FROM = "transformers.models."
_adapters: ByClass[Adapter] = ByClass()


def register(class_name: str) -> Callable[[AdapterT], AdapterT]:
    """Register an adapter for a module class, named so that nothing has to be imported.

    Parameters
    ----------
    class_name : str
        Qualified name, ``"torch.nn.modules.activation.MultiheadAttention"``. Replaces an adapter
        registered earlier under that name.

    Returns
    -------
    callable
        Decorator for a function ``adapter(module, name) -> Contribution``; ``name`` is the
        module's name in the model, empty for the model itself.

    Examples
    --------
    >>> @register("my_package.MyAttention")
    ... def my_attention(module, name):
    ...     return Contribution()
    """
    if not isinstance(class_name, str) or "." not in class_name:
        raise TypeError(
            f'register needs a qualified class name such as "package.module.Class", '
            f"got {class_name!r}"
        )

    def decorator(adapter: AdapterT) -> AdapterT:
        _adapters[class_name] = adapter
        return adapter

    return decorator


def lookup(module: nn.Module) -> Adapter | None:
    """Return the adapter of a module's class or of its nearest registered base class.

    Raises
    ------
    NotUnderstoodError
        If there is one, but the module computes something else than the registered class.
    """
    if unwrapped(module) is not module:
        return None
    name = _adapters.name_for(module)
    if name is None:
        return None
    known = _known_base(module, name)
    rotary = None if known is None else replaced_rotary(module, known, name)
    if rotary is not None:  # which the attentions inside read
        raise NotUnderstoodError(f"{type(module).__name__}: {rotary}", inside=True)
    if not follows(module, name):
        reason = None if known is None else alteration(module, known, name)
        raise NotUnderstoodError(reason or f"{type(module).__name__} changes the methods of {name}")
    return _adapters[name]


def follows(module: nn.Module, class_name: str) -> bool:
    """Whether a module computes what the class of that qualified name computes.

    True for the class itself, for copies of it and for subclasses of either that override neither
    ``forward`` nor another method of the class, unless the module or its class was altered
    (:func:`~quotientopt.symmetries.classes.alteration`).
    """
    module = unwrapped(module)
    known = _known_base(module, class_name)
    if known is None or alteration(module, known, class_name) is not None:
        return False
    ancestors = type(module).__mro__
    position = ancestors.index(known)
    methods = {
        attribute
        for base in ancestors[position : ancestors.index(nn.Module)]
        for attribute, value in vars(base).items()
        if callable(value) and not isinstance(value, type) and not attribute.startswith("__")
    } | {"forward", "__call__"}
    added = [base for base in ancestors[:position] if not only_shards(base)]
    overridden = {attribute for base in added for attribute in vars(base)}
    return not (methods - _HARMLESS) & overridden


def _known_base(module: nn.Module, class_name: str) -> type | None:
    """The class of that name among a module's class and its bases, or a copy of it."""
    return next((base for base in type(module).__mro__ if _is_class(base, class_name)), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` or a checkpointing wrapper; the module itself if bare."""
    while True:
        inner = next((m for name, m in module._modules.items() if name in _WRAPPED), None)
        if inner is None:
            return module
        module = inner


def plain(name: str) -> str:
    """A module's or parameter's name as it is without wrappers."""
    if not any(part in name for part in _WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The distinct modules of a model that are no wrappers, by their names without wrappers."""
    for name, module in model.named_modules():
        if unwrapped(module) is module:
            yield plain(name), module


def _is_class(base: type, class_name: str) -> bool:
    if f"{base.__module__}.{base.__qualname__}" == class_name:
        return True
    if not class_name.startswith(_COPIED_FROM) or not _may_be_copy(base):
        return False
    text = class_text(base)
    return text is not None and text == named_text(class_name)


def _may_be_copy(base: type) -> bool:
    # Without the package there is nothing to compare with, and its models cannot be here.
    return "transformers" in sys.modules and not base.__module__.startswith(_NEVER_COPIES)


_NEVER_COPIES = ("torch.", "builtins", "quotientopt.", "transformers.modeling_", "peft.")


def qualified(prefix: str, *names: str) -> str:
    """Join module and parameter names with dots, leaving out empty ones."""
    return ".".join(name for name in (prefix, *names) if name)


def inside(name: str, other: str) -> bool:
    """Whether module ``name`` is ``other`` or lies inside it."""
    return not other or name == other or name.startswith(f"{other}.")


def class_names(module: nn.Module) -> Iterator[str]:
    """Qualified names of a module's class and of its bases, nearest first."""
    for base in type(unwrapped(module)).__mro__:
        yield f"{base.__module__}.{base.__qualname__}"


_ATTENTION_WORDS = ("attention", "attn", "multihead")
# What the forward of an attention calls: softmax alone also routes tokens to experts.
_SOFTMAX, _PRODUCTS = "softmax", {"matmul", "einsum", "bmm", "baddbmm", "transpose", "mT"}


def looks_like_attention(module: nn.Module) -> bool:
    """By the name of its class, or by what its forward calls."""
    if any(word in type(module).__name__.lower() for word in _ATTENTION_WORDS):
        return True
    called = set(getattr(getattr(type(module).forward, "__code__", None), "co_names", ()))
    if "scaled_dot_product_attention" in called:
        return True
    return _SOFTMAX in called and bool(_PRODUCTS & called)
