"""OPT of the transformers package: learned positions, norms before or after the branches."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.attention_groups import require_known_attention
from quotientopt.symmetries.adapters.layers import (
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    add_reader,
    add_writer,
    require,
    understands,
)
from quotientopt.symmetries.adapters.separate_projections import plain_attention
from quotientopt.symmetries.registry import Contribution, qualified

OPT = "transformers.models.opt.modeling_opt.OPT"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@understands(f"{OPT}Attention")
def opt_attention(module: Any, name: str) -> Contribution:
    """GL(r) on both pairs of every head."""
    require_known_attention(module)
    return plain_attention(
        module, name, rank=module.head_dim, heads=module.num_heads, layers=PROJECTIONS
    )


@understands(f"{OPT}DecoderLayer")
def opt_layer(module: Any, name: str) -> Contribution:
    """Residual axes of one layer; norms behind the branches (OPT-350m) write to the stream."""
    contribution = Contribution()
    require(module.self_attn, f"{OPT}Attention")
    readers = tuple(f"self_attn.{part}" for part in PROJECTIONS[:3])
    for norm, reading, writer in (
        ("self_attn_layer_norm", readers, "self_attn.out_proj"),
        ("final_layer_norm", ("fc1",), "fc2"),
    ):
        before = norm if module.do_layer_norm_before else None
        add_branch(contribution, module, name, readers=reading, writers=(writer,), norm=before)
        if before is None:
            add_norm(contribution, getattr(module, norm), qualified(name, norm))
    return contribution


@understands(f"{OPT}Decoder")
def opt_decoder(module: Any, name: str) -> Contribution:
    """Residual axes of embeddings and projections; the final norm, where there is one."""
    contribution = Contribution()
    positions = qualified(name, "embed_positions")
    add_embedding(
        contribution, module.embed_positions, positions, f"{OPT}LearnedPositionalEmbedding"
    )
    if module.project_in is None:
        add_embedding(contribution, module.embed_tokens, qualified(name, "embed_tokens"))
    else:
        add_writer(contribution, module.project_in, qualified(name, "project_in"))
    norm = None if module.final_layer_norm is None else qualified(name, "final_layer_norm")
    contribution.outputs[name] = norm
    if module.project_out is not None:
        reader = add_reader(contribution, module.project_out, qualified(name, "project_out"))
        contribution.consumers[name] = (reader,)
    if norm is not None:
        add_norm(contribution, module.final_layer_norm, norm, [])
    return contribution


@understands(f"{OPT}ForCausalLM")
def opt_language_model(module: Any, name: str) -> Contribution:
    """Residual axis of the head, unless the stream is projected to another width before it."""
    contribution = Contribution()
    require(module.model, f"{OPT}Model")
    decoder = require(module.model.decoder, f"{OPT}Decoder")
    heads = ("lm_head",) if decoder.project_out is None else ()
    add_consumer(contribution, module, name, "model.decoder", *heads)
    return contribution
