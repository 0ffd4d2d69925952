"""The model whose parameters are updated, and one training iteration of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.models import reference_model
from step_timing.setting import SHAPES, Setting


def build_model(name: str) -> nn.Module:
    """The reference GPT, or Hugging Face's GPT-2 with random weights where it is installed."""
    shape = SHAPES[name]
    if name == "gpt2-small" and find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model: nn.Module = GPT2LMHeadModel(config)
        return model
    return reference_model("gpt", 0, **shape._asdict())


def make_batches(setting: Setting) -> list[Tensor]:
    """Micro-batches of random tokens with their targets, on the device."""
    shape = SHAPES[setting.model]
    count = setting.tokens // (setting.sequences * shape.context)
    size = (count, setting.sequences, shape.context + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, size, generator=generator)
    return list(tokens.to(setting.device).unbind())


def accumulate(model: Callable[[Tensor], Any], batches: Sequence[Tensor], setting: Setting) -> None:
    """Forward and backward pass over all micro-batches."""
    for batch in batches:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.autocast):
            outputs = model(batch[:, :-1])
            logits = getattr(outputs, "logits", outputs)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss / len(batches)).backward()


def set_gradients(model: nn.Module, scale: float = 1e-3) -> None:
    """Fixed random gradients."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter).mul_(scale)
