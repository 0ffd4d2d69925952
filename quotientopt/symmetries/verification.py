"""Check claimed symmetries on the model itself: act, run, compare, put everything back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from quotientopt.symmetries.map import SymmetryMap

# Caches hold keys and values, which do change under the group.
_NOT_COMPARED = {"past_key_values"}


def deviations(
    symmetries: SymmetryMap,
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    cond: float = 10.0,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Act with one random element per symmetry and compare outputs in float64.

    Parameters
    ----------
    symmetries : SymmetryMap
        Symmetries of ``model``.
    model : Module
        Run in evaluation mode on float64 copies of its parameters and buffers. The originals are
        put back, bit for bit and in the same storage, also after an error.
    inputs, kwargs
        Arguments of the model; floating-point tensors anywhere in them are cast to float64.
    cond : float
        Condition number of the random elements.
    generator : torch.Generator, optional
        Source of the random elements; a fixed seed by default.

    Returns
    -------
    dict
        Symmetry name to the largest deviation over all floating-point output tensors, each
        relative to the largest entry of that tensor; infinite if an output is no longer finite.

    Raises
    ------
    ValueError
        If the model's outputs are not finite or there are none to compare, or if a symmetry
        belongs to another model.

    Notes
    -----
    Casts of float64 tensors to float32 inside the forward (some norms, rotary embeddings and
    softmaxes do that) are left out, or nothing could be verified beyond 1e-7. Casts by other ways
    than ``float``, ``to``, ``type`` and ``dtype=`` arguments, inside compiled code for example,
    stay.
    """
    _require_same_model(symmetries, model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    result = {}
    with _float64_evaluation(model) as restore:
        reference = _run(model, inputs, kwargs)
        if not reference:
            raise ValueError(f"{type(model).__name__} returned no floating-point tensor to compare")
        for key, value in reference.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"output {key!r} of {type(model).__name__} is not finite; no deviation can be "
                    "measured on this input"
                )
        moved: Sequence[Tensor] = ()
        for name, element in symmetries.random_element(cond, generator=generator).items():
            restore(moved)
            moved = symmetries.parameters_of(name)
            symmetries.act_({name: element})
            result[name] = largest_deviation(_run(model, inputs, kwargs), reference)
    return result


class KeepFloat64(TorchFunctionMode):
    """Within it, no float64 tensor is cast to float32, and experts' products take float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if getattr(function, "__name__", "") in ("_grouped_mm", "grouped_mm"):
                return _grouped_product(*args, **kwargs)
            if function is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {
                key: torch.float64 if value is torch.float32 else value
                for key, value in kwargs.items()
            }
        return function(*args, **kwargs)


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """``torch._grouped_mm``, whose kernels have no float64: rows up to offs[e] times b[e]."""
    if offs is None or a.ndim != 2 or b.ndim != 3:
        return a @ b if bias is None else a @ b + bias
    ends = offs.tolist()
    parts = [a[i:j] @ b[e] for e, (i, j) in enumerate(pairwise([0, *ends]))]
    if bias is not None:
        parts = [part + row for part, row in zip(parts, bias, strict=True)]
    # Rows behind the last offset belong to nobody.
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])


def _require_same_model(symmetries: SymmetryMap, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for name in symmetries.names:
        if any(id(p) not in own for p in symmetries.parameters_of(name)):
            raise ValueError(
                f"symmetry {name!r} acts on a tensor that is no parameter of this "
                f"{type(model).__name__}; find the symmetries of this very model"
            )


@contextmanager
def _float64_evaluation(model: nn.Module) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """Swap in float64 copies and evaluation mode.

    Yields a function that resets the buffers, and the copies of the given parameters.
    """
    training = {module: module.training for module in model.modules()}
    # A forward may register or replace buffers, so the dictionaries are kept as well.
    buffers = {module: dict(module._buffers) for module in model.modules()}
    parameters = {id(parameter): parameter.data for parameter in model.parameters()}
    originals = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]

    def reset(moved: Sequence[Tensor]) -> None:
        for module, values in buffers.items():
            module._buffers.clear()
            module._buffers.update(values)
        for tensor, original in originals:
            if id(tensor) not in parameters:
                tensor.data.copy_(original)
        for tensor in moved:
            tensor.data.copy_(parameters[id(tensor)])

    try:
        for tensor, original in originals:
            dtype = torch.float64 if original.is_floating_point() else original.dtype
            if isinstance(tensor, nn.Parameter):
                # Blocks are read with the strides of their parameter.
                tensor.data = torch.empty_strided(
                    original.shape, original.stride(), dtype=dtype, device=original.device
                ).copy_(original)
            else:
                tensor.data = original.to(dtype, copy=True)
        model.eval()
        with torch.no_grad():
            yield reset
    finally:
        for tensor, original in originals:
            tensor.data = original
        for module, values in buffers.items():
            module._buffers.clear()
            module._buffers.update(values)
        for module, flag in training.items():
            module.training = flag


def _run(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Floating-point outputs by path."""
    devices = {parameter.device for parameter in model.parameters()}
    kind = next((device.type for device in devices), "cpu")
    cuda = [device for device in devices if device.type == "cuda"]
    # Fresh arguments: a cache among them would grow from run to run.
    inputs, kwargs = tree_map(_fresh, (tuple(inputs), dict(kwargs)))
    # The generators' state is put back after every run, so that all runs draw the same numbers.
    with torch.random.fork_rng(cuda), torch.autocast(kind, enabled=False), KeepFloat64():
        output = model(*inputs, **kwargs)
    return dict(floating_tensors(output, "output"))


def _fresh(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach()
        return leaf.to(torch.float64 if leaf.is_floating_point() else leaf.dtype, copy=True)
    return copy.deepcopy(leaf)


def floating_tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """All floating-point tensors in a model's output, but caches, with the way to each."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _NOT_COMPARED:
                yield from floating_tensors(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from floating_tensors(item, f"{path}[{index}]")


def largest_deviation(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest difference over all tensors, each relative to the largest entry of its reference."""
    largest = 0.0
    for key, expected in reference.items():
        if expected.numel() == 0:
            continue
        difference = (outputs[key] - expected).abs().max().item()
        scale = expected.abs().max().item() or 1.0
        deviation = difference / scale
        # Written so that NaN counts as infinite.
        largest = max(largest, deviation if deviation < float("inf") else float("inf"))
    return largest
