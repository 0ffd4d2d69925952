"""Qwen3 of the transformers package: Llama with queries and keys normalised head by head."""

from __future__ import annotations

from typing import Any

from quotientopt.symmetries.adapters.rotary_decoder import register_decoder, rotary_attention
from quotientopt.symmetries.registry import Contribution


def qwen3_attention(module: Any, name: str) -> Contribution:
    """GL(r) on the value-output pair; trainable gains of q_norm and k_norm leave QK alone."""
    return rotary_attention(module, name, query_key_norms=(module.q_norm, module.k_norm))


register_decoder("transformers.models.qwen3.modeling_qwen3.Qwen3", attention=qwen3_attention)
