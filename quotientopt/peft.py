"""An optimizer for the LoRA adapters of the peft package: ``qo.peft``.

Works on the layers of peft by their names and never imports it. :func:`create_quotient_optimizer`
is a factory in the manner of ``peft.optimizers``; :func:`find_trained_pairs` finds what it trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quotientopt.optim import QuotientAdam
from quotientopt.optim.options import TRANSPORTED
from quotientopt.symmetries import HeadSymmetry, NotUnderstoodError, SymmetryMap
from quotientopt.symmetries.block import any_sharded, refuse_flattened, stand_ins
from quotientopt.symmetries.exactness import Ownership, with_one_dtype, without_conflicts
from quotientopt.symmetries.registry import class_names, lookup

__all__ = ["create_quotient_optimizer", "find_trained_pairs"]

_LAYERS = "peft.tuners.lora."
# Parameters of a layer of peft that hold the factors of its adapters.
_FACTORS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")

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
        Take the polar factor of the pairs' updates, at their size.
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


def find_trained_pairs(model: nn.Module) -> SymmetryMap:
    """Find the LoRA pairs of a model that are trained.

    A part of :func:`quotientopt.find_symmetries` that looks at LoRA layers alone. The base model
    may be quantised then, as long as the factors are not, and its frozen heads are left out.

    Parameters
    ----------
    model : Module
        With adapters, as from ``peft.get_peft_model``.

    Returns
    -------
    SymmetryMap
        The pairs with both factors trained. ``unrecognized`` lists trained factors that belong to
        no pair: of convolutions, of variants that see more than the product, of ranks above the
        number of features.

    Raises
    ------
    TypeError
        If ``model`` is no Module.
    ValueError
        If there is no adapter, none is trained, a pair is half frozen, or a factor is quantised or
        on the meta device; the message names it. If FSDP1 or DeepSpeed has flattened parameters.

    Warns
    -----
    UserWarning
        If trained factors belong to no pair.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    refuse_flattened(model, model.parameters())
    if any_sharded(model.parameters()):
        with stand_ins(model) as stood_for:
            symmetries = find_trained_pairs(model)
        return symmetries.on(stood_for)
    factors = {name: p for name, p in model.named_parameters() if _is_factor(name)}
    if not factors:
        raise ValueError(
            f"the {type(model).__name__} has no LoRA adapter; add one with "
            "peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    for name, factor in factors.items():
        _require_plain(name, factor)
    if not any(factor.requires_grad for factor in factors.values()):
        raise ValueError(
            f"the {type(model).__name__} has LoRA adapters, but none is trained; choose one with "
            "model.set_adapter(name), or load it with is_trainable=True"
        )
    heads, _ = without_conflicts(_claimed(model), Ownership(model))
    heads, _ = with_one_dtype(heads)
    pairs = [symmetry for symmetry in heads if _is_trained(symmetry)]
    covered = {id(block.parameter) for symmetry in pairs for block in symmetry.blocks}
    left_out = [name for name, p in factors.items() if p.requires_grad and id(p) not in covered]
    if left_out:
        others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warnings.warn(
            f"LoRA factor {left_out[0]!r}{others}: no pair that is understood, left to AdamW",
            UserWarning,
            stacklevel=3,
        )
    return SymmetryMap(
        pairs,
        residual_reason="only LoRA pairs were looked for",
        unrecognized=left_out,
    )


def _is_factor(name: str) -> bool:
    return not name.endswith(".bias") and any(f".{part}" in f".{name}" for part in _FACTORS)


def _require_plain(name: str, factor: Tensor) -> None:
    if factor.device.type == "meta":
        raise ValueError(
            f"LoRA factor {name!r} is on the meta device; load its values before making an "
            "optimizer"
        )
    if is_traceable_wrapper_subclass(factor) or not factor.dtype.is_floating_point:
        kind = factor.dtype if type(factor) in (Tensor, nn.Parameter) else type(factor).__name__
        raise ValueError(
            f"LoRA factor {name!r} is quantised ({kind}); only plain floating-point "
            "factors can be trained, over a quantised base if need be"
        )


def _claimed(model: nn.Module) -> list[HeadSymmetry]:
    """Symmetries of all LoRA layers that are understood, trained or not."""
    claimed: list[HeadSymmetry] = []
    opaque: list[str] = []
    for name, module in model.named_modules():
        if not any(kind.startswith(_LAYERS) for kind in class_names(module)):
            continue
        if any(name.startswith(f"{root}.") for root in opaque):
            continue
        try:
            adapter = lookup(module)
            if adapter is not None:
                claimed += adapter(module, name).heads
        except NotUnderstoodError as error:
            if error.inside:
                opaque.append(name)
    return claimed


def _is_trained(symmetry: HeadSymmetry) -> bool:
    """Whether both factors are trained; refuses a pair with one of them frozen."""
    left, right = symmetry.blocks
    if left.parameter.requires_grad != right.parameter.requires_grad:
        trained, frozen = (left, right) if left.parameter.requires_grad else (right, left)
        raise ValueError(
            f"LoRA pair {symmetry.name!r} is half frozen: {trained.name!r} is trained, "
            f"{frozen.name!r} is not; train both or none (requires_grad_)"
        )
    return left.parameter.requires_grad
