"""Small models of every architecture that is recognised, with inputs, all values random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quotientopt.models import GPT, Llama, ViT

WIDTH, HEADS = 24, 3

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def randomize_(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Gaussian values everywhere: also in biases and gains, which start at zero and one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model


def randomize_gains_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0, generator=generator)
    return model


def tokens(length: int = 7) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(3))


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def small_gpt() -> GPT:
    return GPT(vocabulary=50, layers=2, width=WIDTH, heads=HEADS, context=8)


def small_vit() -> ViT:
    return ViT(classes=5, layers=2, width=WIDTH, heads=HEADS, image=12, patch=4)


def small_llama(key_value_heads: int = 2) -> Llama:
    model = Llama(
        vocabulary=50, layers=2, width=32, heads=4, key_value_heads=key_value_heads, context=8
    )
    randomize_gains_(model)
    return model


def small_gpt2(**config: Any) -> nn.Module:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    settings = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": 2, "vocab_size": 50} | config
    configuration = transformers.GPT2Config(
        n_positions=16, bos_token_id=0, eos_token_id=0, **settings
    )
    return randomize_(transformers.GPT2LMHeadModel(configuration))


def attention(**options: Any) -> Example:
    model = nn.MultiheadAttention(WIDTH, HEADS, **options)
    key, value = values(6, 2, model.kdim), values(6, 2, model.vdim)
    inputs = (values(5, 2, WIDTH), key, value)
    if model.batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    return randomize_(model), inputs, {}


def encoder_layer(**options: Any) -> Example:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, **options)
    return randomize_(layer), (values(5, 2, WIDTH),), {}


def decoder_layer(**options: Any) -> Example:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 40, **options)
    return randomize_(layer), (values(5, 2, WIDTH), values(6, 2, WIDTH)), {}


def encoder() -> Example:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return randomize_(stack), (values(2, 5, WIDTH),), {"src_key_padding_mask": padding}


def gpt2(**config: Any) -> Example:
    kwargs = {}
    if config.get("add_cross_attention"):
        kwargs["encoder_hidden_states"] = values(2, 4, WIDTH)
    return small_gpt2(**config), (tokens(),), kwargs


# Name to the example and the number of head symmetries expected.
EXAMPLES: dict[str, tuple[Callable[[], Example], int]] = {
    "attention": (attention, 2),
    "attention-no-bias": (lambda: attention(bias=False), 2),
    "attention-kdim-vdim": (lambda: attention(kdim=16, vdim=20), 2),
    "attention-kdim-vdim-no-bias": (lambda: attention(kdim=16, vdim=20, bias=False), 2),
    "attention-bias-kv": (lambda: attention(add_bias_kv=True, add_zero_attn=True), 2),
    "attention-bias-kv-no-bias": (lambda: attention(add_bias_kv=True, bias=False), 2),
    "attention-batch-first": (lambda: attention(batch_first=True), 2),
    "encoder-layer": (encoder_layer, 2),
    "encoder-layer-norm-first": (lambda: encoder_layer(norm_first=True, batch_first=True), 2),
    "encoder": (encoder, 4),
    "decoder-layer": (decoder_layer, 4),
    "decoder-layer-norm-first": (lambda: decoder_layer(norm_first=True, bias=False), 4),
    "gpt2": (gpt2, 4),
    "gpt2-eager": (lambda: gpt2(attn_implementation="eager", n_layer=1), 2),
    "gpt2-scaled-untied": (
        lambda: gpt2(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
        4,
    ),
    "gpt2-cross-attention": (lambda: gpt2(add_cross_attention=True), 8),
    "gpt": (lambda: (small_gpt(), (tokens(),), {}), 4),
    "vit": (lambda: (small_vit(), (values(2, 12, 12),), {}), 4),
    "llama": (lambda: (small_llama(), (tokens(),), {}), 4),
    "llama-multi-query": (lambda: (small_llama(1), (tokens(),), {}), 4),
}
