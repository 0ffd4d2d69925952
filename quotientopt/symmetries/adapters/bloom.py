"""BLOOM of the transformers package: ALiBi, queries, keys and values fused head by head."""

from __future__ import annotations

from typing import Any

from quotientopt.groups import GL
from quotientopt.symmetries.adapters.layers import (
    add_attention,
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    consecutive,
    input_heads,
    interleaved,
    output_heads,
    require,
    understands,
)
from quotientopt.symmetries.registry import Contribution, qualified

BLOOM = "transformers.models.bloom.modeling_bloom.Bloom"


@understands(f"{BLOOM}Attention")
def bloom_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head: ALiBi adds a constant to the scores."""
    heads, rank = module.num_heads, module.head_dim
    width = heads * rank
    query, key, value = (
        output_heads(
            module.query_key_value,
            qualified(name, "query_key_value"),
            3 * width,
            interleaved(heads, part, 3),
        )
        for part in range(3)
    )
    output = input_heads(module.dense, qualified(name, "dense"), width, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution, name, query=query, key=key, value=value, output=output, qk_group=GL(rank)
    )
    return contribution


@understands(f"{BLOOM}Block")
def bloom_block(module: Any, name: str) -> Contribution:
    """Residual axes of one block; the skip connection may start behind the norms."""
    contribution = Contribution()
    require(module.self_attention, f"{BLOOM}Attention")
    require(module.mlp, f"{BLOOM}MLP")
    for norm, reader, writer in (
        ("input_layernorm", "self_attention.query_key_value", "self_attention.dense"),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ):
        before = None if module.apply_residual_connection_post_layernorm else norm
        add_branch(contribution, module, name, readers=(reader,), writers=(writer,), norm=before)
        if before is None:
            add_norm(contribution, getattr(module, norm), qualified(name, norm))
    return contribution


@understands(f"{BLOOM}Model")
def bloom_model(module: Any, name: str) -> Contribution:
    """Residual axis of the embedding; the norm behind it writes to the stream."""
    contribution = Contribution(outputs={name: qualified(name, "ln_f")})
    add_embedding(contribution, module.word_embeddings, qualified(name, "word_embeddings"))
    norm = qualified(name, "word_embeddings_layernorm")
    add_norm(contribution, module.word_embeddings_layernorm, norm)
    add_norm(contribution, module.ln_f, qualified(name, "ln_f"), [])
    return contribution


@understands(f"{BLOOM}ForCausalLM")
def bloom_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, tied to the embedding or not."""
    contribution = Contribution()
    require(module.transformer, f"{BLOOM}Model")
    add_consumer(contribution, module, name, "transformer", "lm_head")
    return contribution
