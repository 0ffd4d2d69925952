"""Adapters that come with the package; importing a module registers its adapters.

- ``plain_torch``: ``torch.nn.MultiheadAttention``, the layers built on it, this package's models;
- ``decoders``, ``decoder_attentions``, ``encoders`` (and encoder-decoders), ``vision_audio``: the
  transformers package, by one class of each text; timm;
- ``peft_lora``: low-rank pairs.

They are written with ``layers`` (views of heads), ``branches`` (layers), ``attention`` (pairs).
"""

from quotientopt.symmetries.adapters import (
    decoder_attentions,
    decoders,
    encoders,
    peft_lora,
    plain_torch,
    vision_audio,
)

__all__ = [
    "decoder_attentions",
    "decoders",
    "encoders",
    "peft_lora",
    "plain_torch",
    "vision_audio",
]
