"""CLIP of the transformers package: a text and a vision stream."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    CONV2D,
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    add_vectors,
    add_writer,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

CLIP = "transformers.models.clip.modeling_clip.CLIP"


@understands(f"{CLIP}Attention")
def clip_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.head_dim,
        heads=module.num_heads,
        layers=("q_proj", "k_proj", "v_proj", "out_proj"),
    )


@understands(f"{CLIP}EncoderLayer")
def clip_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer, and its norms."""
    contribution = Contribution()
    require(module.self_attn, f"{CLIP}Attention")
    require(module.mlp, f"{CLIP}MLP")
    readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    for norm, reading, writer in (
        ("layer_norm1", readers, "self_attn.out_proj"),
        ("layer_norm2", ("mlp.fc1",), "mlp.fc2"),
    ):
        add_branch(contribution, module, name, readers=reading, writers=(writer,), norm=norm)
    return contribution


@understands(f"{CLIP}TextModel")
def clip_text_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "final_layer_norm")})
    embeddings = require(module.embeddings, f"{CLIP}TextEmbeddings")
    path = qualified(name, "embeddings")
    for part in ("token_embedding", "position_embedding"):
        add_embedding(contribution, getattr(embeddings, part), qualified(path, part))
    add_norm(contribution, module.final_layer_norm, qualified(name, "final_layer_norm"), [])
    return contribution


@understands(f"{CLIP}VisionModel")
def clip_vision_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches and positions; the norm behind them writes to the stream."""
    contribution = Contribution(outputs={name: qualified(name, "post_layernorm")})
    embeddings = require(module.embeddings, f"{CLIP}VisionEmbeddings")
    path = qualified(name, "embeddings")
    patches = qualified(path, "patch_embedding")
    add_writer(contribution, embeddings.patch_embedding, patches, CONV2D)
    present_parameter(embeddings, "class_embedding")
    add_vectors(contribution, qualified(path, "class_embedding"), 0)
    positions = qualified(path, "position_embedding")
    add_embedding(contribution, embeddings.position_embedding, positions)
    add_norm(contribution, module.pre_layrnorm, qualified(name, "pre_layrnorm"))
    add_norm(contribution, module.post_layernorm, qualified(name, "post_layernorm"), [])
    return contribution


@understands(f"{CLIP}Model", f"{CLIP}TextModelWithProjection", f"{CLIP}VisionModelWithProjection")
def clip_model(module: Any, name: str) -> Contribution:
    """Residual axes of the projections, which read the pooled states."""
    contribution = Contribution()
    for part, projection, kind in (
        ("text_model", "text_projection", "TextModel"),
        ("vision_model", "visual_projection", "VisionModel"),
    ):
        if hasattr(module, part):
            require(getattr(module, part), f"{CLIP}{kind}")
            add_consumer(contribution, module, name, part, projection)
    return contribution
