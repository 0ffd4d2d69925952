"""Decoders in the layout of Llama: rotary attention with grouped queries, gated MLP, RMS norms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from quotientopt.symmetries.adapters.attention_groups import (
    normalised_group,
    require_known_attention,
    rotary_group,
)
from quotientopt.symmetries.adapters.layers import (
    EMBEDDING,
    add_attention,
    add_branch,
    add_consumer,
    add_embedding,
    add_norm,
    consecutive,
    input_heads,
    output_heads,
    present_parameter,
    require,
    understands,
)
from quotientopt.symmetries.norm import register_norm
from quotientopt.symmetries.registry import Adapter, Contribution, NotUnderstoodError, qualified

ATTENTION_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def rotary_attention(
    module: Any, name: str, *, query_key_norms: Sequence[nn.Module] = ()
) -> Contribution:
    """(C*)^{r/2} on the query-key pair and GL(r) on the value-output pair of key-value heads.

    The query heads (and output blocks) of one key-value head are blocks of one factor; biases of
    queries, keys and values are columns. For ``query_key_norms`` see :func:`normalised_group`.
    """
    require_known_attention(module)
    rank, groups = module.head_dim, module.num_key_value_groups
    width = present_parameter(module.q_proj, "weight").shape[0]
    heads, rest = divmod(width, rank)
    if rest or heads % groups:
        raise NotUnderstoodError(f"{width} rows for heads of {rank} in groups of {groups}")
    shared = heads // groups
    views = {
        part: output_heads(
            getattr(module, path), qualified(name, path), count * rank, consecutive(count)
        )
        for part, path, count in (
            ("query", "q_proj", heads),
            ("key", "k_proj", shared),
            ("value", "v_proj", shared),
        )
    }
    output = input_heads(module.o_proj, qualified(name, "o_proj"), width, consecutive(heads))
    contribution = Contribution()
    add_attention(
        contribution,
        name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=output,
        qk_group=normalised_group(query_key_norms, rotary_group(module.config, rank)),
        query_groups=groups,
    )
    return contribution


def gated_layer(
    module: Any,
    name: str,
    *,
    prefix: str,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    attention_readers: Sequence[str] = ATTENTION_READERS,
    mlp_readers: Sequence[str] = ("mlp.gate_proj", "mlp.up_proj"),
) -> Contribution:
    """Residual axes of a layer, and the norms in front of attention and MLP."""
    contribution = Contribution()
    require(module.self_attn, f"{prefix}Attention")
    require(module.mlp, f"{prefix}MLP")
    for norm, readers, writer in (
        (norms[0], attention_readers, "self_attn.o_proj"),
        (norms[1], mlp_readers, "mlp.down_proj"),
    ):
        add_branch(contribution, module, name, readers=readers, writers=(writer,), norm=norm)
    return contribution


def decoder_model(module: Any, name: str, *, embedding: str = EMBEDDING) -> Contribution:
    """Residual axis of the embedding, and the final norm, whose output the model returns."""
    contribution = Contribution(outputs={name: qualified(name, "norm")})
    add_embedding(contribution, module.embed_tokens, qualified(name, "embed_tokens"), embedding)
    add_norm(contribution, module.norm, qualified(name, "norm"), [])
    return contribution


def language_model(module: Any, name: str, *, prefix: str) -> Contribution:
    """Residual axis of the head, tied to the embedding or not; it reads all the model returns."""
    contribution = Contribution()
    require(module.model, f"{prefix}Model")
    add_consumer(contribution, module, name, "model", "lm_head")
    return contribution


def register_decoder(
    prefix: str,
    *,
    attention: Adapter = rotary_attention,
    layer: Callable[..., Contribution] = gated_layer,
    embedding: str = EMBEDDING,
    neutral: float = 1.0,
) -> None:
    """Register the adapters of a family: its attention, layer, model, language model and norm.

    Parameters
    ----------
    prefix : str
        Module and first letters of the family's classes,
        ``"transformers.models.llama.modeling_llama.Llama"``.
    attention, layer : callable
        Adapters; ``layer`` also takes the keyword ``prefix``.
    embedding : str
        Class of the token embedding.
    neutral : float
        Value of a norm's parameter that multiplies by one.
    """
    register_norm(f"{prefix}RMSNorm", neutral=neutral)
    understands(f"{prefix}Attention")(attention)
    understands(f"{prefix}DecoderLayer")(functools.partial(layer, prefix=prefix))
    understands(f"{prefix}Model")(functools.partial(decoder_model, embedding=embedding))
    understands(f"{prefix}ForCausalLM")(functools.partial(language_model, prefix=prefix))
