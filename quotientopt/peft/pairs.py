"""The LoRA pairs of a model that are trained."""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quotientopt.symmetries import HeadSymmetry, NotUnderstoodError, SymmetryMap
from quotientopt.symmetries.block import any_sharded, refuse_flattened, stand_ins
from quotientopt.symmetries.exactness import Ownership, with_one_dtype, without_conflicts
from quotientopt.symmetries.registry import class_names, lookup

_LAYERS = "peft.tuners.lora."
# Parameters of a layer of peft that hold the factors of its adapters.
_FACTORS = ("lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")


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
