"""ViT of the transformers package."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    CONV2D,
    add_branch,
    add_consumer,
    add_norm,
    add_reader,
    add_vectors,
    add_writer,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

VIT = "transformers.models.vit.modeling_vit.ViT"


@understands(f"{VIT}Attention")
def vit_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module,
        name,
        rank=module.head_dim,
        heads=module.num_attention_heads,
        layers=("q_proj", "k_proj", "v_proj", "o_proj"),
    )


@understands(f"{VIT}Layer")
def vit_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer, and its norms."""
    contribution = Contribution()
    require(module.attention, f"{VIT}Attention")
    require(module.mlp, f"{VIT}MLP")
    readers = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    for norm, reading, writer in (
        ("layernorm_before", readers, "attention.o_proj"),
        ("layernorm_after", ("mlp.fc1",), "mlp.fc2"),
    ):
        add_branch(contribution, module, name, readers=reading, writers=(writer,), norm=norm)
    return contribution


@understands(f"{VIT}Model")
def vit_model(module: Any, name: str) -> Contribution:
    """Residual axes of patches, tokens and positions, and the final norm."""
    contribution = Contribution(outputs={name: qualified(name, "layernorm")})
    embeddings = require(module.embeddings, f"{VIT}Embeddings")
    path = qualified(name, "embeddings")
    patches = require(embeddings.patch_embeddings, f"{VIT}PatchEmbeddings")
    projection = qualified(path, "patch_embeddings.projection")
    add_writer(contribution, patches.projection, projection, CONV2D)
    tokens = ["cls_token", "position_embeddings"]
    if embeddings.mask_token is not None:
        tokens.append("mask_token")
    for part in tokens:
        present_parameter(embeddings, part)
        add_vectors(contribution, qualified(path, part), 2)
    readers = []
    if module.pooler is not None:
        require(module.pooler, f"{VIT}Pooler")
        path = qualified(name, "pooler.dense")
        readers = [add_reader(contribution, module.pooler.dense, path)]
    add_norm(contribution, module.layernorm, qualified(name, "layernorm"), readers)
    return contribution


@understands(f"{VIT}ForImageClassification")
def vit_classifier(module: Any, name: str) -> Contribution:
    """Residual axis of the classifier, which reads the first of the states the model returns."""
    contribution = Contribution()
    require(module.vit, f"{VIT}Model")
    add_consumer(contribution, module, name, "vit", "classifier")
    return contribution
