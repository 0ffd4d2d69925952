"""Encoder-decoders of the transformers package: T5, BART and what follows it, Whisper.

As for decoders, classes of other families with the same text as one named here are its copies.
"""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention import plain_attention
from quotientopt.symmetries.adapters.branches import (
    Branch,
    Sublayer,
    Units,
    add_embeddings,
    dense,
    head_adapter,
    layer_adapter,
    register_sublayer,
    require_known,
    stack_adapter,
)
from quotientopt.symmetries.adapters.decoders import norms
from quotientopt.symmetries.adapters.layers import (
    add_consumer,
    add_norm,
    known,
    register_embedding,
    require,
    transformers_classes,
)
from quotientopt.symmetries.registry import Adapter, Contribution, qualified

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = dense("fc1", "fc2", "activation_fn")


plain_attention(
    PROJECTIONS,
    "bart.BartAttention",
    "whisper.WhisperAttention",
    "clip.CLIPAttention",
    "siglip.SiglipAttention",
    "wav2vec2.Wav2Vec2Attention",
)


def _layer(*, first: bool, decoder: bool) -> Adapter:
    """Layers of BART's kind, with norms in front of every branch or behind it."""
    branches = [Branch.beside("self_attn_layer_norm", "self_attn", first=first)]
    if decoder:
        norm = "encoder_attn_layer_norm"
        branches.append(Branch.beside(norm, "encoder_attn", first=first, cross=True))
    branches.append(Branch.beside("final_layer_norm", FEED_FORWARD, first=first))
    return layer_adapter(*branches)


known("bart.BartEncoderLayer")(_layer(first=False, decoder=False))
known("bart.BartDecoderLayer")(_layer(first=False, decoder=True))
known("mbart.MBartEncoderLayer", "whisper.WhisperEncoderLayer")(_layer(first=True, decoder=False))
known("mbart.MBartDecoderLayer", "whisper.WhisperDecoderLayer")(_layer(first=True, decoder=True))
register_embedding(
    "bart.BartScaledWordEmbedding",
    "bart.BartLearnedPositionalEmbedding",
    "mbart.MBartScaledWordEmbedding",
    "mbart.MBartLearnedPositionalEmbedding",
    "pegasus.PegasusSinusoidalPositionalEmbedding",
    "whisper.WhisperPositionalEmbedding",
)


def _stack(module: Any, name: str) -> Contribution:
    """Embeddings of tokens and positions; a norm behind them writes to the stream."""
    last = "layer_norm" if hasattr(module, "layer_norm") else None
    stack = stack_adapter("embed_tokens", "embed_positions", norm=last)
    contribution = stack(module, name)
    if hasattr(module, "layernorm_embedding"):
        norm = module.layernorm_embedding
        add_norm(contribution, norm, qualified(name, "layernorm_embedding"))
    return contribution


known("bart.BartEncoder", "bart.BartDecoder", "mbart.MBartEncoder", "mbart.MBartDecoder")(_stack)
known("pegasus.PegasusEncoder", "pegasus.PegasusDecoder", "whisper.WhisperDecoder")(_stack)


@known("bart.BartModel", "mbart.MBartModel", "pegasus.PegasusModel", "whisper.WhisperModel")
def encoder_decoder(module: Any, name: str) -> Contribution:
    """Residual axes of the keys and values that read the encoder.

    Encoder and decoder have a stream each; with the embedding shared, both turn together.
    """
    contribution = Contribution()
    require_known(module.encoder)
    require_known(module.decoder)
    if hasattr(module, "shared"):
        add_embeddings(contribution, module, name, "shared")
    paths = [
        f"decoder.layers.{index}.encoder_attn.{part}"
        for index in range(len(module.decoder.layers))
        for part in PROJECTIONS[1:3]
    ]
    add_consumer(contribution, module, name, "encoder", *paths)
    return contribution


@known("bart.BartForConditionalGeneration", "mbart.MBartForConditionalGeneration")
@known("pegasus.PegasusForConditionalGeneration")
def bart_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, tied to the embedding or not."""
    return _decoder_head(module, name, "lm_head")


@known("whisper.WhisperForConditionalGeneration")
def whisper_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, tied to the embedding or not."""
    return _decoder_head(module, name, "proj_out")


def _decoder_head(module: Any, name: str, head: str) -> Contribution:
    require_known(module.model)
    return head_adapter("model.decoder", head)(module, name)


@known("whisper.WhisperEncoder")
def whisper_encoder(module: Any, name: str) -> Contribution:
    """Residual axis of the positions; the activation behind the convolutions breaks O(d)."""
    contribution = stack_adapter("embed_positions", norm="layer_norm")(module, name)
    contribution.residual_breakers.append(f"activation behind {qualified(name, 'conv2')}")
    return contribution


# T5: relative position biases, RMS norms, no scaling of scores.
norms("t5.T5LayerNorm")
T5_LAYERS = ("q", "k", "v", "o")


# The position bias is added to the scores.
plain_attention(T5_LAYERS, "t5.T5Attention", rank="key_value_proj_dim")
register_sublayer(dense("wi", "wo", "act"), "t5.T5DenseActDense")
register_sublayer(
    Sublayer(("wi_0", "wi_1"), ("wo",), units=Units("wi_1", "wo")), "t5.T5DenseGatedActDense"
)


@known("t5.T5Block")
def t5_block(module: Any, name: str) -> Contribution:
    """Norms in front of the branches; keys and values of a cross-attention read the encoder."""
    require(module.layer[0], *transformers_classes("t5.T5LayerSelfAttention"))
    branches = [Branch("layer.0.SelfAttention", before="layer.0.layer_norm")]
    if module.is_decoder:
        require(module.layer[1], *transformers_classes("t5.T5LayerCrossAttention"))
        norm = "layer.1.layer_norm"
        branches.append(Branch("layer.1.EncDecAttention", before=norm, cross=True))
    last = len(module.layer) - 1
    require(module.layer[last], *transformers_classes("t5.T5LayerFF"))
    branches.append(Branch(f"layer.{last}.DenseReluDense", before=f"layer.{last}.layer_norm"))
    return layer_adapter(*branches)(module, name)


known("t5.T5Stack")(stack_adapter("embed_tokens", norm="final_layer_norm"))


@known("t5.T5Model", "t5.T5ForConditionalGeneration", "t5.T5EncoderModel")
def t5_model(module: Any, name: str) -> Contribution:
    """Residual axes of the shared embedding, of what reads the encoder, and of the head."""
    contribution = Contribution()
    add_embeddings(contribution, module, name, "shared")
    require_known(module.encoder)
    if hasattr(module, "decoder"):
        require_known(module.decoder)
        paths = [
            f"decoder.block.{index}.layer.1.EncDecAttention.{part}"
            for index in range(len(module.decoder.block))
            for part in T5_LAYERS[1:3]
        ]
        add_consumer(contribution, module, name, "encoder", *paths)
    if hasattr(module, "lm_head"):
        add_consumer(contribution, module, name, "decoder", "lm_head")
    return contribution
