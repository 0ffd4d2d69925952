"""LoRA pairs of the peft package: ΔW = s B A does not see (g A, B g^{-1})."""

from __future__ import annotations

from typing import Any

from torch import nn

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.layers import (
    LINEAR,
    add_pair,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.block import Block
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

LORA = "peft.tuners.lora.layer"
PEFT_MODEL = "peft.peft_model.PeftModel"

# Variants that see A and B through their product alone: DoRA normalises W + s B A and leaves its
# magnitude to itself, aLoRA applies the product to some tokens, MiCA freezes B.
_VARIANTS = {
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "ALoraLinearVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
}


# Over a quantised base, whose kernels hand on activations in floating point.
_QUANTISED_BASES = (
    "aqlm.AqlmLoraLinear",
    "awq.AwqLoraLinear",
    "bnb.Linear4bit",
    "bnb.Linear8bitLt",
    "eetq.EetqLoraLinear",
    "gptq.GPTQLoraLinear",
    "hqq.HqqLoraLinear",
    "torchao.TorchaoLoraLinear",
)


@understands(f"{LORA}.Linear", *(f"peft.tuners.lora.{name}" for name in _QUANTISED_BASES))
def lora_linear(module: Any, name: str) -> Contribution:
    """GL(r) on the pair of every adapter of the layer, active or not.

    The left factor is Bᵀ, ``(1, r, out)``, the right factor A, ``(1, r, in)``. Scaling, dropout,
    the bias of B and the frozen base weight do not enter.
    """
    contribution = Contribution()
    for adapter in module.lora_A:
        _require_product(module, adapter)
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        _add_pair(
            contribution,
            module,
            name,
            adapter,
            (_weight(up), qualified(name, "lora_B", adapter, "weight")),
            (_weight(down), qualified(name, "lora_A", adapter, "weight")),
        )
    return contribution


@understands(f"{LORA}.Embedding")
def lora_embedding(module: Any, name: str) -> Contribution:
    """GL(r) on the pair of every adapter of an embedding."""
    contribution = Contribution()
    for adapter in module.lora_embedding_A:
        _require_product(module, adapter)
        parts = ("lora_embedding_B", "lora_embedding_A")
        (up, up_name), (down, down_name) = (
            (present_parameter(getattr(module, part), adapter), qualified(name, part, adapter))
            for part in parts
        )
        _add_pair(contribution, module, name, adapter, (up, up_name), (down, down_name))
    return contribution


@understands(
    f"{LORA}.Conv1d",
    f"{LORA}.Conv2d",
    f"{LORA}.Conv3d",
    f"{LORA}.MultiheadAttention",
    f"{LORA}.ParamWrapper",
    "peft.tuners.adaption_prompt.layer.AdaptedAttention",
    "peft.tuners.adaption_prompt.layer.AdaptedAttentionGPT",
)
def changed_inside(module: Any, name: str) -> Contribution:
    """Layers that change parameters or attentions inside them while they run."""
    raise NotUnderstoodError(
        f"{type(module).__name__} changes what the modules inside it compute", inside=True
    )


@understands(
    PEFT_MODEL,
    *(
        f"{PEFT_MODEL}For{task}"
        for task in (
            "CausalLM",
            "FeatureExtraction",
            "QuestionAnswering",
            "Seq2SeqLM",
            "SequenceClassification",
            "TokenClassification",
        )
    ),
)
def peft_model(module: Any, name: str) -> Contribution:
    """Nothing of its own; learned keys and values (prefix tuning) break every pair inside."""
    for adapter, config in module.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind in ("PREFIX_TUNING", "CARTRIDGE"):
            raise NotUnderstoodError(
                f"adapter {adapter!r} ({kind}) puts keys and values next to those of every head",
                inside=True,
            )
    return Contribution()


def _require_product(module: Any, adapter: str) -> None:
    variant = module.lora_variant.get(adapter)
    if variant is not None and type(variant).__name__ not in _VARIANTS:
        raise NotUnderstoodError(
            f"adapter {adapter!r} is a {type(variant).__name__}, which may see more of the "
            "factors than their product"
        )


def _weight(layer: nn.Module) -> nn.Parameter:
    return present_parameter(require(layer, LINEAR), "weight")


def _add_pair(
    contribution: Contribution,
    module: Any,
    name: str,
    adapter: str,
    up: tuple[nn.Parameter, str],
    down: tuple[nn.Parameter, str],
) -> None:
    (B, B_name), (A, A_name) = up, down
    rank = module.r[adapter]
    if A.ndim != 2 or B.ndim != 2 or (A.shape[0], B.shape[1]) != (rank, rank):
        raise NotUnderstoodError(
            f"adapter {adapter!r} has factors {tuple(B.shape)} and {tuple(A.shape)}, expected rank "
            f"{rank}"
        )
    left = Block.of(B.detach().mT.unsqueeze(0), B, B_name)
    right = Block.of(A.detach().unsqueeze(0), A, A_name)
    add_pair(contribution, qualified(name, "lora", adapter), GL(rank), [left], [right])
