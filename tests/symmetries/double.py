"""Run models in float64 that cast to float32 inside their forward."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Within it, every cast of a float64 tensor to float32 is left out.

    Norms, rotary angles and softmax of many models in transformers are cast to float32, so that
    nothing could be verified beyond 1e-7. ``x.float()``, ``x.to(torch.float32)`` and
    ``dtype=torch.float32`` then keep float64; what is computed stays the same.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_double = bool(args) and getattr(args[0], "dtype", None) == torch.float64
        if is_double:
            if function is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
                args = tuple(arg.double() for arg in args)
        return function(*args, **kwargs)
