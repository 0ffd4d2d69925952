"""BERT of the transformers package (MiniLM is one), and what RoBERTa shares with it."""

from __future__ import annotations

import functools
from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    add_reader,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, NotUnderstoodError, qualified

BERT = "transformers.models.bert.modeling_bert.Bert"


def encoder_attention(module: Any, name: str, *, prefix: str) -> Contribution:
    """GL(r) on both pairs of every head, of a self- or a cross-attention."""
    inner = require(module.self, f"{prefix}SelfAttention", f"{prefix}CrossAttention")
    require(module.output, f"{prefix}SelfOutput")
    if getattr(inner, "position_embedding_type", "absolute") != "absolute":
        raise NotUnderstoodError("positions enter the scores through the queries' coordinates")
    require_known_attention(inner)
    return plain_attention(
        module,
        name,
        rank=inner.attention_head_size,
        heads=inner.num_attention_heads,
        layers=("self.query", "self.key", "self.value", "output.dense"),
    )


def encoder_layer(module: Any, name: str, *, prefix: str) -> Contribution:
    """Residual axes of one layer, whose norms write to the stream (post-norm).

    Keys and values of a cross-attention read the encoder and are left out.
    """
    contribution = Contribution()
    readers: dict[str, tuple[str, ...]] = {"attention": ("query", "key", "value")}
    if hasattr(module, "crossattention"):
        readers["crossattention"] = ("query",)
    for part, reading in readers.items():
        require(getattr(module, part), f"{prefix}Attention")
        paths = tuple(f"{part}.self.{layer}" for layer in reading)
        add_branch(contribution, module, name, readers=paths, writers=(f"{part}.output.dense",))
        norm = f"{part}.output.LayerNorm"
        add_norm(contribution, module.get_submodule(norm), qualified(name, norm))
    require(module.intermediate, f"{prefix}Intermediate")
    require(module.output, f"{prefix}Output")
    add_branch(
        contribution, module, name, readers=("intermediate.dense",), writers=("output.dense",)
    )
    add_norm(contribution, module.output.LayerNorm, qualified(name, "output.LayerNorm"))
    return contribution


def encoder_model(module: Any, name: str, *, prefix: str) -> Contribution:
    """Residual axes of the embeddings, whose norm writes to the stream, and of the pooler."""
    contribution = Contribution(outputs={name: None})
    embeddings = require(module.embeddings, f"{prefix}Embeddings")
    path = qualified(name, "embeddings")
    for part in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        add_embedding(contribution, getattr(embeddings, part), qualified(path, part))
    add_norm(contribution, embeddings.LayerNorm, qualified(path, "LayerNorm"))
    if module.pooler is not None:
        require(module.pooler, f"{prefix}Pooler")
        add_reader(contribution, module.pooler.dense, qualified(name, "pooler.dense"))
    return contribution


def register_encoder(prefix: str) -> None:
    """Register the adapters of attention, layer and model of a family.

    Parameters
    ----------
    prefix : str
        Module and first letters of its classes.
    """
    understands(f"{prefix}Attention")(functools.partial(encoder_attention, prefix=prefix))
    understands(f"{prefix}Layer")(functools.partial(encoder_layer, prefix=prefix))
    understands(f"{prefix}Model")(functools.partial(encoder_model, prefix=prefix))


register_encoder(BERT)


@understands(f"{BERT}ForMaskedLM", f"{BERT}LMHeadModel")
def bert_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head's transform; what follows it is another space."""
    contribution = Contribution()
    require(module.bert, f"{BERT}Model")
    require(module.cls, f"{BERT}OnlyMLMHead")
    add_consumer(contribution, module, name, "bert", "cls.predictions.transform.dense")
    return contribution
