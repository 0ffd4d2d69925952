"""Importing this makes ``timm.optim.create_optimizer_v2(model, "quotientadam", lr=…)`` work.

timm makes param groups of the model and hands on these alone. So that the symmetries of the model
can be found, what its registry is called with is remembered while it makes an optimizer.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, cast

from timm.optim import _optim_factory as factory
from torch import nn

from quotientopt.optim import QuotientAdam
from quotientopt.symmetries.find import symmetries_from, warn_of_gaps

NAME = "quotientadam"

_model: ContextVar[nn.Module | None] = ContextVar("model", default=None)


def quotient_adam(params: Any, *, example_inputs: Any = None, **options: Any) -> QuotientAdam:
    """A QuotientAdam of timm's param groups, on the symmetries of the model they were made of."""
    model = _model.get()
    if model is not None and "symmetries" not in options:
        options["symmetries"] = symmetries_from(model, example_inputs)
        warn_of_gaps(model, options["symmetries"], "QuotientAdam steps as torch.optim.AdamW")
    return QuotientAdam(params, **options)


def _register(registry: Any) -> None:
    make = registry.create_optimizer

    @functools.wraps(make)
    def create_optimizer(model_or_params: Any, *arguments: Any, **options: Any) -> Any:
        given = model_or_params if isinstance(model_or_params, nn.Module) else None
        token = _model.set(given)
        try:
            return make(model_or_params, *arguments, **options)
        finally:
            _model.reset(token)

    registry.register(
        factory.OptimInfo(
            name=NAME,
            opt_class=cast(Any, quotient_adam),
            description="Adam on dressed fields, which does not see a Transformer's gauge",
            has_betas=True,
        )
    )
    registry.create_optimizer = create_optimizer


_register(factory.default_registry)
