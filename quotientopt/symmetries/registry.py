"""Adapters: functions that know where the symmetries of one module class are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from quotientopt.symmetries.head import HeadSymmetry

if TYPE_CHECKING:
    from quotientopt.symmetries.norm import Norm, Reader


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
    """

    heads: list[HeadSymmetry] = field(default_factory=list)
    residual_axes: dict[str, int] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    residual_breakers: list[str] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    outputs: dict[str, str | None] = field(default_factory=dict)
    consumers: dict[str, tuple[Reader, ...]] = field(default_factory=dict)
    gauge_free: bool = False


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

_adapters: dict[str, Adapter] = {}

# Methods a subclass may override without changing what forward computes.
_HARMLESS = {"extra_repr", "_reset_parameters", "reset_parameters"}


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
    for name in class_names(module):
        if name in _adapters:
            if not follows(module, name):
                raise NotUnderstoodError(f"{type(module).__name__} changes the methods of {name}")
            return _adapters[name]
    return None


def follows(module: nn.Module, class_name: str) -> bool:
    """Whether a module computes what the class of that qualified name computes.

    True for the class itself and for subclasses that override neither ``forward`` nor another
    method of the class.
    """
    # Accelerate replaces the forward of an instance only to move data between devices.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return False
    names = list(class_names(module))
    if class_name not in names:
        return False
    position = names.index(class_name)
    ancestors = type(module).__mro__
    methods = {
        attribute
        for base in ancestors[position : ancestors.index(nn.Module)]
        for attribute, value in vars(base).items()
        if callable(value) and not isinstance(value, type) and not attribute.startswith("__")
    } | {"forward", "__call__"}
    overridden = {attribute for base in ancestors[:position] for attribute in vars(base)}
    return not (methods - _HARMLESS) & overridden


def qualified(prefix: str, *names: str) -> str:
    """Join module and parameter names with dots, leaving out empty ones."""
    return ".".join(name for name in (prefix, *names) if name)


def class_names(module: nn.Module) -> Iterator[str]:
    """Qualified names of a module's class and of its bases, nearest first."""
    for base in type(module).__mro__:
        yield f"{base.__module__}.{base.__qualname__}"
