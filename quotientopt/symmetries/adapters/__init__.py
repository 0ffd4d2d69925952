"""Adapters that come with the package; importing a module registers its adapters.

- ``torch_attention``: ``torch.nn.MultiheadAttention`` and the layers built on it;
- ``reference``: the models and attentions of this package;
- ``decoders``, ``decoder_attentions``, ``encoders``, ``encoder_decoders``, ``vision_audio``: the
  transformers package, by one class of each text; timm;
- ``peft_lora``: low-rank pairs.
"""

from quotientopt.symmetries.adapters import (
    decoder_attentions,
    decoders,
    encoder_decoders,
    encoders,
    peft_lora,
    reference,
    torch_attention,
    vision_audio,
)

__all__ = [
    "decoder_attentions",
    "decoders",
    "encoder_decoders",
    "encoders",
    "peft_lora",
    "reference",
    "torch_attention",
    "vision_audio",
]
