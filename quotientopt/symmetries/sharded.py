"""Symmetries of models whose parameters are sharded, and the wrappers that leave no pairs.

A DTensor (``fully_shard``, ``parallelize_module``) has a global shape and strides but only a part
of its values. Where heads lie depends on shapes alone, so that symmetries are found on stand-ins of
the same shapes, and then name the sharded parameters. Whoever needs values asks their owner, see
:mod:`quotientopt.optim.sharded`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

FSDP1 = "torch.distributed.fsdp"
# Marks of flat parameters and of views into them.
_FLAT = ("_fsdp_flattened", "_is_flat_param")
# A partition of DeepSpeed's ZeRO, or a parameter whose values it has taken away.
_DEEPSPEED = "ds_id"


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of the tensors is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def refuse_flattened(model: nn.Module | None, parameters: Iterable[Tensor]) -> None:
    """Refuse models and parameters that a wrapper has flattened: no pair is left in them.

    Raises
    ------
    ValueError
        With the reason, and ``fully_shard`` as the way out.
    """
    scope = sys.modules.get(FSDP1)
    wrapper = getattr(scope, "FullyShardedDataParallel", None)
    wrapped = model is not None and wrapper is not None
    if wrapped and any(isinstance(m, wrapper) for m in model.modules()):  # type: ignore[union-attr, arg-type]
        _refuse("FullyShardedDataParallel (FSDP1)")
    for parameter in parameters:
        if any(getattr(parameter, mark, False) for mark in _FLAT):
            _refuse("FullyShardedDataParallel (FSDP1)")
        if hasattr(parameter, _DEEPSPEED):
            _refuse("DeepSpeed's ZeRO")


def _refuse(wrapper: str) -> None:
    raise ValueError(
        f"{wrapper} flattens parameters and cuts them anywhere, through heads and pairs, so that "
        "no symmetry acts on what is left; shard with FSDP2 (torch.distributed.fsdp.fully_shard), "
        "which keeps every parameter's shape"
    )


def refuse_values(name: str) -> None:
    """Refuse to read or write a sharded parameter's values through a view."""
    raise ValueError(
        f"parameter {name!r} is sharded over processes (a DTensor), and no view of it holds whole "
        "heads; do this before fully_shard, or on an unsharded copy of the model"
    )


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Put plain tensors of the global shapes in place of a model's sharded parameters.

    Parameters of one dimension (gains, biases) carry their values, which every process then has to
    ask for; larger ones have none, and take address space but no memory.

    Yields
    ------
    dict of int to Tensor
        ``id`` of each stand-in to the parameter it stands for.
    """
    found: dict[int, Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if parameter.device.type == "meta":
                raise ValueError(
                    f"parameter {name!r} of a {type(module).__name__} is on the meta device; load "
                    "its values before asking for symmetries"
                )
            if id(parameter) not in made:
                made[id(parameter)] = stand_in = _stand_in(parameter)
                found[id(stand_in)] = parameter
            places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            module._parameters[name] = made[id(parameter)]
        yield found
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.ndim < 2:
        whole = parameter.detach().full_tensor().cpu()  # type: ignore[attr-defined]
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return nn.Parameter(empty_like_whole(parameter), requires_grad=parameter.requires_grad)


def empty_like_whole(parameter: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised plain tensor of a parameter's global shape and strides."""
    shape, stride = tuple(parameter.shape), tuple(parameter.stride())
    return torch.empty_strided(shape, stride, dtype=parameter.dtype, device=device)
