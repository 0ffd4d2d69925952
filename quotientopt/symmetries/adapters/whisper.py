"""Whisper of the transformers package: cross-attention, keys without bias."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

WHISPER = "transformers.models.whisper.modeling_whisper.Whisper"
READERS = ("q_proj", "k_proj", "v_proj")


@understands(f"{WHISPER}Attention")
def whisper_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.head_dim,
        heads=module.num_heads,
        layers=(*READERS, "out_proj"),
    )


@understands(f"{WHISPER}EncoderLayer", f"{WHISPER}DecoderLayer")
def whisper_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer; keys and values of a cross-attention read the encoder."""
    contribution = Contribution()
    attentions: dict[str, tuple[str, ...]] = {"self_attn": READERS}
    if hasattr(module, "encoder_attn"):
        attentions["encoder_attn"] = READERS[:1]
    for part, readers in attentions.items():
        require(getattr(module, part), f"{WHISPER}Attention")
        add_branch(
            contribution,
            module,
            name,
            readers=tuple(f"{part}.{layer}" for layer in readers),
            writers=(f"{part}.out_proj",),
            norm=f"{part}_layer_norm",
        )
    norm = "final_layer_norm"
    add_branch(contribution, module, name, readers=("fc1",), writers=("fc2",), norm=norm)
    return contribution


@understands(f"{WHISPER}Encoder")
def whisper_encoder(module: Any, name: str) -> Contribution:
    """Residual axis of the positions; the activation behind the convolutions breaks O(d)."""
    contribution = Contribution(outputs={name: qualified(name, "layer_norm")})
    contribution.residual_breakers.append(f"activation behind {qualified(name, 'conv2')}")
    add_embedding(contribution, module.embed_positions, qualified(name, "embed_positions"))
    add_norm(contribution, module.layer_norm, qualified(name, "layer_norm"), [])
    return contribution


@understands(f"{WHISPER}Decoder")
def whisper_decoder(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "layer_norm")})
    add_embedding(contribution, module.embed_tokens, qualified(name, "embed_tokens"))
    positions = qualified(name, "embed_positions")
    kind = f"{WHISPER}PositionalEmbedding"
    add_embedding(contribution, module.embed_positions, positions, kind)
    add_norm(contribution, module.layer_norm, qualified(name, "layer_norm"), [])
    return contribution


@understands(f"{WHISPER}Model")
def whisper_model(module: Any, name: str) -> Contribution:
    """Residual axes of the keys and values that read the encoder."""
    contribution = Contribution()
    require(module.encoder, f"{WHISPER}Encoder")
    require(module.decoder, f"{WHISPER}Decoder")
    paths = [
        f"decoder.layers.{index}.encoder_attn.{part}"
        for index in range(len(module.decoder.layers))
        for part in READERS[1:]
    ]
    add_consumer(contribution, module, name, "encoder", *paths)
    return contribution


@understands(f"{WHISPER}ForConditionalGeneration")
def whisper_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, tied to the embedding or not."""
    contribution = Contribution()
    require(module.model, f"{WHISPER}Model")
    add_consumer(contribution, module, name, "model.decoder", "proj_out")
    return contribution
