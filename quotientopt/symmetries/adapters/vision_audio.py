"""Vision and audio encoders: ViT, CLIP, SigLIP, DINO, wav2vec 2.0 of transformers; timm's ViT.

As for decoders, classes of other families with the same text as one named here are its copies.
"""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL, RotaryCommutant
from quotientopt.symmetries.adapters.attention import (
    add_score_gains,
    normalised_group,
    plain_attention,
    projected_attention,
    require_known_attention,
    stacked_attention,
)
from quotientopt.symmetries.adapters.branches import (
    Branch,
    Sublayer,
    add_embeddings,
    dense,
    head_adapter,
    layer_adapter,
    register_sublayer,
    require_known,
)
from quotientopt.symmetries.adapters.encoders import FEED_FORWARD
from quotientopt.symmetries.adapters.layers import (
    CONV2D,
    IDENTITY,
    add_branch,
    add_consumer,
    add_norm,
    add_reader,
    add_vectors,
    add_writer,
    known,
    present_parameter,
    require,
    transformers_classes,
    understands,
)
from quotientopt.symmetries.adapters.plain_torch import UNKNOWN_REST
from quotientopt.symmetries.registry import Contribution, follows, qualified
from quotientopt.symmetries.residual import register_norm

VIT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
register_sublayer(FEED_FORWARD, "clip.CLIPMLP")
register_sublayer(dense("up_proj", "down_proj", "act_fn"), "dinov3_vit.DINOv3ViTMLP")
register_sublayer(
    Sublayer(VIT_PROJECTIONS[:3], VIT_PROJECTIONS[3:]),
    "dinov3_vit.DINOv3ViTAttention",
)


plain_attention(VIT_PROJECTIONS, "vit.ViTAttention", "dinov2.Dinov2Attention")


@known("dinov3_vit.DINOv3ViTAttention")
def dinov3_attention(module: Any, name: str) -> Contribution:
    """(C*)^{r/2} on QK: rows and columns of an image turn different planes."""
    require_known_attention(module)
    rank = module.head_dim
    group = RotaryCommutant(rank)
    return projected_attention(module, name, rank=rank, layers=VIT_PROJECTIONS, qk_group=group)


def vision_attention(module: Any, name: str) -> Contribution:
    """(C*)^{r/2} on QK: rows and columns of an image turn different planes."""
    rank = module.head_dim
    return stacked_attention(
        module,
        name,
        rank=rank,
        heads=module.num_heads,
        layers=("qkv", "proj"),
        qk_group=RotaryCommutant(rank),
    )


known("qwen2_5_vl.Qwen2_5_VLVisionAttention", "qwen3_vl.Qwen3VLVisionAttention")(vision_attention)


known("vit.ViTLayer")(
    layer_adapter(
        Branch("attention", before="layernorm_before"), Branch("mlp", before="layernorm_after")
    )
)
known("clip.CLIPEncoderLayer", "siglip.SiglipEncoderLayer")(
    layer_adapter(Branch("self_attn", before="layer_norm1"), Branch("mlp", before="layer_norm2"))
)
known("dinov2.Dinov2Layer", "dinov3_vit.DINOv3ViTLayer")(
    layer_adapter(
        Branch("attention", before="norm1", scale="layer_scale1"),
        Branch("mlp", before="norm2", scale="layer_scale2"),
    )
)


def _add_patches(
    contribution: Contribution, embeddings: Any, name: str, patches: str, *tokens: str
) -> None:
    """Add what an image is embedded by: a convolution of patches, and tokens of its own."""
    path = qualified(name, patches)
    add_writer(contribution, embeddings.get_submodule(patches), path, CONV2D)
    for token in tokens:
        parameter = getattr(embeddings, token)
        if parameter is not None:
            present_parameter(embeddings, token)
            add_vectors(contribution, qualified(name, token), parameter.ndim - 1)


@known("vit.ViTModel")
def vit_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches, tokens and positions, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "layernorm")})
    embeddings = require(module.embeddings, *transformers_classes("vit.ViTEmbeddings"))
    require(embeddings.patch_embeddings, *transformers_classes("vit.ViTPatchEmbeddings"))
    path = qualified(name, "embeddings")
    tokens = ("cls_token", "position_embeddings", "mask_token")
    _add_patches(contribution, embeddings, path, "patch_embeddings.projection", *tokens)
    readers = []
    if module.pooler is not None:
        require(module.pooler, *transformers_classes("vit.ViTPooler"))
        path = qualified(name, "pooler.dense")
        readers = [add_reader(contribution, module.pooler.dense, path)]
    add_norm(contribution, module.layernorm, qualified(name, "layernorm"), readers)
    return contribution


known("vit.ViTForImageClassification")(head_adapter("vit", "classifier"))


@known("dinov2.Dinov2Model")
def dinov2_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches, tokens and positions, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "layernorm")})
    embeddings = require(module.embeddings, *transformers_classes("dinov2.Dinov2Embeddings"))
    path = qualified(name, "embeddings")
    tokens = ("cls_token", "position_embeddings", "mask_token")
    _add_patches(contribution, embeddings, path, "patch_embeddings.projection", *tokens)
    add_norm(contribution, module.layernorm, qualified(name, "layernorm"), [])
    return contribution


@known("dinov3_vit.DINOv3ViTModel")
def dinov3_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches and tokens, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "norm")})
    classes = transformers_classes("dinov3_vit.DINOv3ViTEmbeddings")
    embeddings = require(module.embeddings, *classes)
    path = qualified(name, "embeddings")
    tokens = ("cls_token", "register_tokens", "mask_token")
    _add_patches(contribution, embeddings, path, "patch_embeddings", *tokens)
    add_norm(contribution, module.norm, qualified(name, "norm"), [])
    return contribution


@known("clip.CLIPTextModel", "siglip.SiglipTextModel")
def clip_text_model(module: Any, name: str) -> Contribution:
    """Residual axes of the embeddings, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "final_layer_norm")})
    classes = transformers_classes("clip.CLIPTextEmbeddings", "siglip.SiglipTextEmbeddings")
    embeddings = require(module.embeddings, *classes)
    parts = ("token_embedding", "position_embedding")
    add_embeddings(contribution, embeddings, qualified(name, "embeddings"), *parts)
    readers = []
    if hasattr(module, "head"):
        readers = [add_reader(contribution, module.head, qualified(name, "head"))]
    norm = qualified(name, "final_layer_norm")
    add_norm(contribution, module.final_layer_norm, norm, readers)
    return contribution


@known("clip.CLIPVisionModel")
def clip_vision_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches and positions; the norm behind them writes to the stream."""
    contribution = Contribution(outputs={name: qualified(name, "post_layernorm")})
    embeddings = require(module.embeddings, *transformers_classes("clip.CLIPVisionEmbeddings"))
    path = qualified(name, "embeddings")
    _add_patches(contribution, embeddings, path, "patch_embedding", "class_embedding")
    add_embeddings(contribution, embeddings, path, "position_embedding")
    add_norm(contribution, module.pre_layrnorm, qualified(name, "pre_layrnorm"))
    add_norm(contribution, module.post_layernorm, qualified(name, "post_layernorm"), [])
    return contribution


@known("siglip.SiglipVisionModel")
def siglip_vision_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches and positions; the pooling head is not followed."""
    contribution = Contribution(outputs={name: qualified(name, "post_layernorm")})
    classes = transformers_classes("siglip.SiglipVisionEmbeddings")
    embeddings = require(module.embeddings, *classes)
    path = qualified(name, "embeddings")
    _add_patches(contribution, embeddings, path, "patch_embedding")
    add_embeddings(contribution, embeddings, path, "position_embedding")
    add_norm(contribution, module.post_layernorm, qualified(name, "post_layernorm"))
    if module.use_head:
        contribution.residual_breakers.append(f"pooling by {qualified(name, 'head')}")
    return contribution


@known("clip.CLIPModel", "clip.CLIPTextModelWithProjection", "clip.CLIPVisionModelWithProjection")
def clip_model(module: Any, name: str) -> Contribution:
    """Residual axes of the projections, which read the pooled states."""
    contribution = Contribution()
    for part, projection in (
        ("text_model", "text_projection"),
        ("vision_model", "visual_projection"),
    ):
        if hasattr(module, part):
            require_known(getattr(module, part))
            add_consumer(contribution, module, name, part, projection)
    return contribution


# wav2vec 2.0 and HuBERT.
register_sublayer(
    dense("intermediate_dense", "output_dense", "intermediate_act_fn"),
    "wav2vec2.Wav2Vec2FeedForward",
)
known("wav2vec2.Wav2Vec2EncoderLayer")(
    layer_adapter(
        Branch("attention", after="layer_norm"), Branch("feed_forward", after="final_layer_norm")
    )
)
known("hubert.HubertEncoderLayer")(
    layer_adapter(
        Branch("attention", after="layer_norm"), Branch("feed_forward", after="final_layer_norm")
    )
)


@known("wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm", "hubert.HubertEncoderLayerStableLayerNorm")
def stable_layer(module: Any, name: str) -> Contribution:
    """Norms in front of the branches; adapters of languages are not followed."""
    contribution = layer_adapter(
        Branch("attention", before="layer_norm"), Branch("feed_forward", before="final_layer_norm")
    )(module, name)
    if module.adapter_layer is not None:
        contribution.residual_breakers.append(f"adapter {qualified(name, 'adapter_layer')}")
    return contribution


@known("wav2vec2.Wav2Vec2Model", "hubert.HubertModel")
def wav2vec2_model(module: Any, name: str) -> Contribution:
    """Residual axes behind the convolutions; an activation on positions breaks O(d)."""
    contribution = Contribution(outputs={name: None})
    features = module.feature_projection
    path = qualified(name, "feature_projection.projection")
    add_writer(contribution, features.projection, path)
    if hasattr(module, "masked_spec_embed"):
        add_vectors(contribution, qualified(name, "masked_spec_embed"), 0)
    norm = qualified(name, "encoder.layer_norm")
    add_norm(contribution, module.encoder.layer_norm, norm)
    positions = qualified(name, "encoder.pos_conv_embed")
    contribution.residual_breakers.append(f"activation of {positions}")
    return contribution


known("wav2vec2.Wav2Vec2ForCTC")(head_adapter("wav2vec2", "lm_head"))
known("hubert.HubertForCTC")(head_adapter("hubert", "lm_head"))

# Where timm has kept them from version to version.
TIMM_ATTENTIONS = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
TIMM_BLOCK = "timm.models.vision_transformer.Block"
TIMM_MLP = "timm.layers.mlp.Mlp"
LAYER_SCALE = ("timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale")

# Its RmsNorm has computed different things from version to version and is not among them.
register_norm("timm.layers.norm.LayerNorm", centres=True)
register_norm("timm.layers.norm.LayerNormFp32", centres=True)


@understands(*TIMM_ATTENTIONS)
def timm_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head; normalised queries and keys leave less or nothing on QK.

    A norm between the heads and the output matrix (``scale_norm``) is not understood.
    """
    if hasattr(module, "norm"):
        require(module.norm, IDENTITY)
    rank = module.head_dim
    contribution = stacked_attention(
        module,
        name,
        rank=rank,
        heads=module.num_heads,
        layers=("qkv", "proj"),
        qk_group=normalised_group((module.q_norm, module.k_norm), GL(rank)),
    )
    add_score_gains(contribution, module, name, ("q_norm", "k_norm"), GL(rank))
    return contribution


@understands(TIMM_BLOCK)
def timm_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; it cannot know the rest of the stream."""
    contribution = Contribution(residual_breakers=[UNKNOWN_REST])
    require(module.attn, *TIMM_ATTENTIONS)
    require(module.mlp, TIMM_MLP)
    require(module.mlp.norm, IDENTITY)
    for norm, reader, writer in (
        ("norm1", "attn.qkv", "attn.proj"),
        ("norm2", "mlp.fc1", "mlp.fc2"),
    ):
        add_branch(contribution, module, name, readers=(reader,), writers=(writer,), norm=norm)
    for part in ("ls1", "ls2"):
        if not follows(getattr(module, part), IDENTITY):
            require(getattr(module, part), *LAYER_SCALE)
            contribution.residual_breakers.append(f"layer scale {qualified(name, part)}")
    return contribution
