"""A factory in the manner of ``peft.optimizers``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quotientopt.optim import QuotientAdam
from quotientopt.optim.slices import TRANSPORTED
from quotientopt.peft.pairs import find_trained_pairs

Named = list[tuple[str, Tensor]]


def create_quotient_optimizer(
    model: nn.Module,
    optimizer_cls: type[QuotientAdam] = QuotientAdam,
    *,
    lr: float | Tensor,
    weight_decay: float = 1e-2,
    embedding_lr: float | Tensor | None = None,
    other_lr: float | Tensor | None = None,
    polar: bool = False,
    **kwargs: Any,
) -> QuotientAdam:
    """Make an optimizer for all that is trained of a model with LoRA adapters.

    LoRA pairs get :class:`quotientopt.QuotientAdam` in coordinates that no (B g⁻¹, g A) changes,
    everything else that is trained (``modules_to_save``, biases, DoRA's magnitudes, a classifier)
    AdamW, in the same optimizer. Hand it to Hugging Face's Trainer as ``optimizers=(optimizer,
    None)``.

    Parameters
    ----------
    model : Module
        With adapters, as from ``peft.get_peft_model``.
    optimizer_cls : type
        :class:`quotientopt.QuotientAdam` or a subclass.
    lr : float or Tensor
        Learning rate. The step of a pair is absolute in B A, whatever the scale of the factors. Of
        a tensor every param group gets a copy of its own.
    weight_decay : float
        Decoupled, of the pairs and of other matrices; parameters of one dimension (biases, gains,
        magnitudes) have none.
    embedding_lr : float or Tensor, optional
        Learning rate of the pairs of embeddings; ``lr`` if left out.
    other_lr : float or Tensor, optional
        Learning rate of everything that is no pair; ``lr`` if left out.
    polar : bool
        Even out the singular values of the pairs' updates.
    **kwargs
        Further options of ``optimizer_cls``: ``betas``, ``eps``, ``nesterov``, ``max_grad_norm``,
        ``refresh_every``, ``master_weights``, …

    Returns
    -------
    QuotientAdam
        With the param groups that are not empty, in this order: pairs, pairs of embeddings, other
        matrices, other vectors.

    Raises
    ------
    TypeError
        If ``model`` is no Module, ``optimizer_cls`` no kind of QuotientAdam, or for an option that
        it does not know.
    ValueError
        If there is no adapter, none is trained, a pair is half frozen, a factor is quantised or on
        the meta device; for options out of range.

    Examples
    --------
    >>> optimizer = create_quotient_optimizer(model, lr=1e-3)           # doctest: +SKIP
    """
    if not isinstance(optimizer_cls, type) or not issubclass(optimizer_cls, QuotientAdam):
        raise TypeError(
            f"optimizer_cls must be QuotientAdam or a subclass of it, got {optimizer_cls!r}"
        )
    for name, instead in (("lora_polar", "polar"), ("symmetries", "QuotientAdam itself")):
        if name in kwargs:
            raise TypeError(f"create_quotient_optimizer takes no {name!r}; use {instead}")
    symmetries = find_trained_pairs(model)
    of_pairs = {id(block.parameter) for pair in symmetries.heads for block in pair.blocks}
    groups: dict[str, Named] = {"pairs": [], "embeddings": [], "matrices": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_pairs:
            kind = "embeddings" if "lora_embedding_" in name else "pairs"
        else:
            kind = "matrices" if parameter.ndim > 1 else "vectors"
        groups[kind].append((name, parameter))
    rates = {
        "pairs": lr,
        "embeddings": lr if embedding_lr is None else embedding_lr,
        "matrices": lr if other_lr is None else other_lr,
        "vectors": lr if other_lr is None else other_lr,
    }
    return optimizer_cls(
        _param_groups(groups.items(), rates, weight_decay),
        lr=lr,
        weight_decay=weight_decay,
        symmetries=symmetries,
        **_polar_options(polar, kwargs.get("lora_frame", TRANSPORTED)),
        **kwargs,
    )


def _polar_options(polar: bool, lora_frame: str | None) -> dict[str, Any]:
    """The option of QuotientAdam that evens out updates of pairs in these frames."""
    return {"lora_polar" if lora_frame == TRANSPORTED else "polar": polar}


def _param_groups(
    groups: Iterable[tuple[str, Named]],
    rates: dict[str, float | Tensor],
    weight_decay: float,
) -> list[dict[str, Any]]:
    return [
        {
            "params": parameters,
            # Schedulers multiply a tensor in place, once for each group.
            "lr": rate.clone() if isinstance(rate := rates[kind], Tensor) else rate,
            "weight_decay": 0.0 if kind == "vectors" else weight_decay,
        }
        for kind, parameters in groups
        if parameters
    ]
