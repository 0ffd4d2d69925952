"""Small reference models in plain torch, for comparisons and tests."""

from typing import Any

import torch
from torch import nn

from quotientopt.models.attention import Attention, CausalAttention
from quotientopt.models.gpt import GPT, ViT
from quotientopt.models.llama import Llama, RMSNorm

__all__ = [
    "GPT",
    "REFERENCE_MODELS",
    "Attention",
    "CausalAttention",
    "Llama",
    "RMSNorm",
    "ViT",
    "reference_model",
]

REFERENCE_MODELS: dict[str, type[nn.Module]] = {"gpt": GPT, "llama": Llama, "vit": ViT}


def reference_model(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a reference model with reproducible initial weights.

    Parameters
    ----------
    name : {"gpt", "llama", "vit"}
    seed : int
        The same seed gives the same weights, whatever the state of the global generator.
    **overrides
        Arguments of `GPT`, `Llama` or `ViT`, such as ``layers=2``.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If `name` is not a reference model.
    """
    if name not in REFERENCE_MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(REFERENCE_MODELS)}")
    generator = torch.Generator().manual_seed(seed)
    return REFERENCE_MODELS[name](generator=generator, **overrides)
