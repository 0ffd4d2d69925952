"""QuotientAdam as trainers make their optimizers: ``qo.integrations``.

Imports none of them; ``import quotientopt.integrations.timm`` makes ``"quotientadam"`` known to
timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quotientopt.optim import QuotientAdam
from quotientopt.peft import create_quotient_optimizer
from quotientopt.symmetries.find import symmetries_from, warn_of_gaps

__all__ = ["for_trainer", "make_optimizer"]

_OF_LORA = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")


def make_optimizer(
    model: nn.Module,
    *,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 1e-2,
    example_inputs: Any = None,
    **options: Any,
) -> QuotientAdam:
    """A QuotientAdam of all that is trained of a model, vectors (biases, gains) without decay.

    Parameters
    ----------
    model : Module
        With trained LoRA adapters it gets what :func:`quotientopt.peft.create_quotient_optimizer`
        makes, as if that had been called.
    lr : float or Tensor
        Of a tensor every param group gets a copy of its own.
    weight_decay : float
    example_inputs : Tensor, tuple, list or mapping, optional
        A batch, from which symmetries are found that no class tells.
    **options
        Further ones of :class:`quotientopt.QuotientAdam`.

    Raises
    ------
    TypeError
        For example inputs of a model with adapters, and options that are unknown.
    ValueError
        If nothing is trained.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"nothing of the {type(model).__name__} is trained")
    if any(part in name for name, _ in named for part in _OF_LORA):
        if example_inputs is not None:
            raise TypeError("LoRA pairs are known by class: leave example_inputs out")
        return create_quotient_optimizer(model, lr=lr, weight_decay=weight_decay, **options)
    if "symmetries" not in options:
        options["symmetries"] = symmetries_from(model, example_inputs)
        warn_of_gaps(model, options["symmetries"], "QuotientAdam steps as torch.optim.AdamW")
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    vectors = [(name, p) for name, p in named if p.ndim < 2]
    groups = [
        {
            "params": members,
            "weight_decay": decay,
            "lr": lr.clone() if isinstance(lr, Tensor) else lr,
        }
        for members, decay in ((matrices, weight_decay), (vectors, 0.0))
        if members
    ]
    return QuotientAdam(groups, lr=lr, weight_decay=weight_decay, **options)


def for_trainer() -> Callable[..., QuotientAdam]:
    """For ``Trainer(optimizer_cls_and_kwargs=(for_trainer, {"lr": …}))`` of transformers.

    Trainer calls what is no optimizer class without arguments, and the result, which is
    :func:`make_optimizer`, with the model and the keyword arguments.
    """
    return make_optimizer
