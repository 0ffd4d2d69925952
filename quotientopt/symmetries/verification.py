"""Check claimed symmetries on the model itself: act, run, compare, put everything back."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from quotientopt._system import progress
from quotientopt.symmetries.block import is_sharded, refuse_values

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
    train_mode: bool = False,
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
    train_mode : bool
        Run in training mode, all runs with the same dropout masks: a mask on the residual stream
        or on attention weights is no function that commutes with the group.

    Returns
    -------
    dict
        Symmetry name to the largest deviation over all floating-point output tensors, each
        relative to the largest entry of that tensor; infinite if an output is no longer finite,
        NaN if the outputs do not depend on what the symmetry acts on (it did not run, or is gated
        to zero), so that nothing was verified.

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
    require_same_model(symmetries, model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    result = {}
    with _float64_copies(model, train_mode=train_mode) as restore:
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
        elements = symmetries.random_element(cond, generator=generator)
        for name, element in progress(elements.items(), "verifying symmetries"):
            restore(moved)
            moved = symmetries.parameters_of(name)
            before = [tensor.detach().clone() for tensor in moved]
            symmetries.act_({name: element})
            result[name] = largest_deviation(_run(model, inputs, kwargs), reference)
            if result[name] == 0:  # exact, or not felt at all
                after = [tensor.detach().clone() for tensor in moved]
                restore(moved)
                for tensor, old, new in zip(moved, before, after, strict=True):
                    noise = torch.rand(new.shape, generator=generator, dtype=torch.float64)
                    tensor.data.add_((new - old) * noise.to(new.device))
                if largest_deviation(_run(model, inputs, kwargs), reference) == 0:
                    result[name] = float("nan")
    return result


def float64_outputs(
    model: nn.Module, example_inputs: Any, *, train_mode: bool = False
) -> dict[str, Tensor]:
    """All floating-point outputs of a model, computed on float64 copies of its parameters.

    Parameters
    ----------
    model : Module
    example_inputs : Tensor, tuple or list, or mapping
        One argument, positional arguments, or keyword arguments.
    train_mode : bool

    Raises
    ------
    TypeError
        If `example_inputs` is something else.
    ValueError
        If there is no output to compare, or one is not finite.
    """
    inputs, kwargs = arguments_of(example_inputs)
    with _float64_copies(model, train_mode=train_mode):
        outputs = _run(model, inputs, kwargs)
    if not outputs:
        raise ValueError(f"{type(model).__name__} returned no floating-point tensor to compare")
    for name, value in outputs.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"output {name!r} of {type(model).__name__} is not finite")
    return outputs


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch as a data loader gives it.

    Parameters
    ----------
    example_inputs : Tensor, tuple or list, or mapping
        One argument, positional arguments, or keyword arguments.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tensor, a tuple of arguments or a mapping of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


@contextmanager
def unchanged_outputs(
    model: nn.Module, example_inputs: Any, what: str, *, put_back: bool = False
) -> Iterator[None]:
    """Within it parameters change and outputs must not; nothing has changed after an error.

    Parameters
    ----------
    model : Module
    example_inputs : Tensor, tuple or list, or mapping, or None
        See :func:`float64_outputs`. None compares nothing.
    what : str
        What changes them, for the error.
    put_back : bool
        Whether parameters are as they were afterwards in any case: what is within is a trial.

    Raises
    ------
    ValueError
        If an output differs by more than the square root of the precision of the parameters,
        relative to the largest output. Parameters and buffers are then as they were, bit for bit.
    """
    if example_inputs is None:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    floating = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    allowed = max(floating, default=0.0) ** 0.5
    reference = float64_outputs(model, example_inputs)
    same = False
    try:
        yield
        deviation = largest_deviation(float64_outputs(model, example_inputs), reference)
        same = deviation <= allowed
        if not same:
            raise ValueError(
                f"{what} would change the outputs of {type(model).__name__} by {deviation:.1e} of "
                f"the largest, {allowed:.1e} allowed: the model computes something else than its "
                "classes say (a hook, a patched function? or padded queries that see no key: take "
                "inputs without padding); nothing was changed"
            )
    finally:
        if put_back or not same:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Within it, parameters have no gradients that would be moved along."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class KeepFloat64(TorchFunctionMode):
    """Within it, no float64 tensor is cast to float32, and experts' products take float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if args and _is_double(args[0]):
            if name in ("_grouped_mm", "grouped_mm"):
                return _grouped_product(*args, **kwargs)
            if function is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {
                key: torch.float64 if value is torch.float32 else value
                for key, value in kwargs.items()
            }
        if name in _PRODUCTS and any(_is_double(arg) for arg in args):
            # Positions become float32, where frequencies have stayed float64.
            args = tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)
        return function(*args, **kwargs)


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


_PRODUCTS = ("matmul", "__matmul__")


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


def require_same_model(symmetries: SymmetryMap, model: nn.Module) -> None:
    """Refuse symmetries of tensors that are no parameters of the model (any more)."""
    own = {id(parameter) for parameter in model.parameters()}
    for name in symmetries.names:
        if any(id(p) not in own for p in symmetries.parameters_of(name)):
            raise ValueError(
                f"symmetry {name!r} acts on a tensor that is no parameter of this "
                f"{type(model).__name__}; find the symmetries of this very model"
            )


@contextmanager
def _float64_copies(
    model: nn.Module, *, train_mode: bool = False
) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """Swap in float64 copies, and evaluation or training mode.

    Tensors that share memory go on sharing it: a buffer may be a view of a weight. Yields a
    function that resets the buffers, and the copies of the given parameters.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            refuse_values(name)
    training = {module: module.training for module in model.modules()}
    # A forward may register or replace buffers, so the dictionaries are kept as well.
    buffers = {module: dict(module._buffers) for module in model.modules()}
    parameters = set(map(id, model.parameters()))
    originals = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    # Of every tensor: its memory here and what belongs in it.
    memory: dict[int, tuple[Tensor, Tensor]] = {}

    def reset(moved: Sequence[Tensor]) -> None:
        for module, values in buffers.items():
            module._buffers.clear()
            module._buffers.update(values)
        for tensor in (*moved, *(t for t, _ in originals if id(t) not in parameters)):
            here, content = memory[id(tensor)]
            here.copy_(content)

    try:
        copies = _copies_of([original for _, original in originals])
        for (tensor, _), (own, here, content) in zip(originals, copies, strict=True):
            memory[id(tensor)] = here, content
            tensor.data = own
        model.train(train_mode)
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


def _copies_of(originals: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Copies, floating-point ones in float64, which share memory where the originals do.

    With each the memory that it lies in, and what was copied there.
    """
    users = Counter(map(_memory, originals))
    whole: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
    copies = []
    for original in originals:
        dtype = torch.float64 if original.is_floating_point() else original.dtype
        place, size, stride = _memory(original), original.shape, original.stride()
        if users[place] == 1 or original.numel() == 0:
            if 0 in stride:
                copy = original.to(dtype, copy=True)
            else:  # blocks are read with the strides of their parameter
                copy = torch.empty_strided(size, stride, dtype=dtype, device=original.device)
                copy.copy_(original)
            copies.append((copy, copy, original))
            continue
        if place not in whole:
            length = original.untyped_storage().nbytes() // original.element_size()
            content = original.as_strided((length,), (1,), 0)
            whole[place] = content.to(dtype, copy=True), content
        view = whole[place][0].as_strided(size, stride, original.storage_offset())
        copies.append((view, *whole[place]))
    return copies


def _memory(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _run(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Floating-point outputs by path."""
    devices = {parameter.device for parameter in model.parameters()}
    kind = next((device.type for device in devices), "cpu")
    cuda = [device for device in devices if device.type == "cuda"]
    # Fresh arguments: a cache among them would grow from run to run.
    inputs, kwargs = tree_map(fresh, (tuple(inputs), dict(kwargs)))
    # The generators' state is put back after every run, so that all runs draw the same numbers.
    drawn = random.getstate()  # layers may be dropped by it
    random.seed(0)
    try:
        with torch.random.fork_rng(cuda), torch.autocast(kind, enabled=False), KeepFloat64():
            output = model(*inputs, **kwargs)
    finally:
        random.setstate(drawn)
    return dict(floating_tensors(output, "output"))


def fresh(leaf: Any) -> Any:
    """A copy of one argument, floating-point tensors in float64."""
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
